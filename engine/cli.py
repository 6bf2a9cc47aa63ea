"""From the command line and a YAML file to a Config; every mistake is one readable ConfigError."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import jsonargparse
from jsonargparse import ActionConfigFile, ArgumentParser

from engine.config import Config
from engine.errors import ConfigError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def make_parser(program: str = "pretrain_vit.py") -> ArgumentParser:
    """A parser whose flags are the fields of Config."""
    parser = ArgumentParser(
        prog=program,
        description="Train a Vision Transformer. Keys of the YAML file are flags of the same name; flags win.",
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; flags after it win over it.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    parser.add_class_arguments(Config, None)
    return parser


def parse(argv: Sequence[str], program: str = "pretrain_vit.py") -> tuple[Config, bool]:
    """(the configuration as given, whether it is only to be printed).

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a wrong type, a value out of range, a file that
            cannot be read.
        SystemExit: after --help.
    """
    parser = make_parser(program)
    try:
        namespace = parser.parse_args(list(argv))
        only_print = bool(namespace.pop("print_config"))
        namespace.pop("config", None)
        values: dict[str, Any] = vars(parser.instantiate(namespace))
        return Config(**values), only_print
    except (jsonargparse.ArgumentError, ValueError, TypeError, KeyError, OSError) as error:
        raise ConfigError(_readable(str(error), parser)) from error


def known_keys(parser: ArgumentParser) -> list[str]:
    """Every dotted key that can be set."""
    return [a.dest for a in parser._actions if a.dest not in ("help", "config", "print_config")]


def _readable(message: str, parser: ArgumentParser) -> str:
    """The parser's message on one line, with the nearest valid key where a key is unknown."""
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    unknown = _unknown_key(message)
    if unknown is None:
        return message
    near = _nearest(unknown, known_keys(parser))
    hint = f"did you mean {near}?" if near else "--help lists all keys"
    return f"unknown key {unknown}: {hint}"


def _unknown_key(message: str) -> str | None:
    patterns = {
        r"unrecognized arguments: --([\w.]+)": "{0}",
        r"Group '([\w.]+)' does not accept option '([\w.]+)'": "{0}.{1}",
        r"Key '([\w.]+)' is not expected": "{0}",
        r"does not accept (?:nested )?key '([\w.]+)'": "{0}",
        r"(?:[Uu]nexpected|[Uu]nknown) (?:key|option)s?:? '?([\w.]+)": "{0}",
    }
    for pattern, form in patterns.items():
        match = re.search(pattern, message)
        if match:
            return form.format(*match.groups())
    return None


def _nearest(key: str, keys: list[str]) -> str | None:
    """The closest valid key: by the whole dotted name, else by its last part."""
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if close:
        return close[0]
    leaves = {k.rpartition(".")[2]: k for k in keys}
    close = difflib.get_close_matches(key.rpartition(".")[2], list(leaves), n=1, cutoff=0.6)
    return leaves[close[0]] if close else None
