"""From the command line and YAML files to a Config; every mistake is one readable ConfigError."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import jsonargparse
import yaml
from jsonargparse import ArgumentParser, Namespace

from engine.config import Config
from engine.config.keys import (
    OPTIONS,
    allows_null,
    entries_of,
    fits,
    groups,
    in_words,
    key_types,
    nearest,
    takes_numbers,
    takes_texts,
    wanted,
)
from engine.errors import ConfigError
from engine.yaml_file import excess_of, read_value, read_yaml, yaml_problem

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

_FAILURES = (jsonargparse.ArgumentError, ValueError, TypeError, KeyError, OverflowError)
_NUMBERS = r"[-+.\deE_]+(,\s*[-+.\deE_]+)+,?"
_LENGTHS = ("train.steps", "train.epochs")


@cache  # a third of a second: it reads the docstrings of all fields
def make_parser(program: str = "pretrain_vit.py") -> ArgumentParser:
    """A parser whose flags are the fields of Config."""
    parser = ArgumentParser(
        prog=program,
        description="Train a Vision Transformer. Keys of the YAML file are flags of the same name; flags win.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", help="YAML file; of several, the later ones win, and flags win over all.")
    parser.add_argument("--print_config", action="store_true", help="Print the resolved configuration and exit.")
    parser.add_class_arguments(Config, None)
    return parser


def parse(
    argv: Sequence[str], program: str = "pretrain_vit.py", *, stored: Mapping[str, Any] | None = None
) -> tuple[Config, bool]:
    """(the configuration as given, whether it is only to be printed).

    Args:
        stored: groups and keys that all files and flags win over.

    Raises:
        ConfigError: an unknown key (the nearest valid one is named), a wrong type, a value out of range, a file that
            cannot be read.
        SystemExit: after --help.
    """
    parser = make_parser(program)
    files, flags = _split(argv)
    # Without defaults, which Config has itself: the library looks for each key among all, again and again.
    given: Namespace | None = None
    if stored is not None:
        given = _translated(lambda: parser.parse_object(dict(stored), defaults=False), "stored: ")
    for file in files:
        values = _keys_of(file)
        given = _translated(lambda v=values, g=given: parser.parse_object(v, g, defaults=False), f"{file}: ")
        _displace(given, values.items())
    flag_values = list(_values_of(flags))
    _check_entries(flag_values)
    given = _translated(lambda: parser.parse_args(flags, namespace=given, defaults=False))
    _displace(given, flag_values)
    only_print = bool(given.pop("print_config", False))
    given.pop("config", None)
    _check_values(given)
    return _translated(lambda: Config(**vars(parser.instantiate(given)))), only_print


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files after --config, and everything else: so that flags win wherever they stand."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    known, rest = _translated(lambda: parser.parse_known_args(list(argv)))
    return known.config, _bracketed(rest)


def _bracketed(flags: Sequence[str]) -> list[str]:
    """Lists of numbers or texts may come without brackets: --model.image_size 48,96, --train.freeze embed,blocks.0."""
    out: list[str] = []
    for flag in flags:
        key, given, value = flag.rpartition("=") if flag.startswith("--") else (out[-1] if out else "", "", flag)
        if takes_numbers(name := key.removeprefix("--")) and re.fullmatch(_NUMBERS, value):
            value = f"[{value}]"
        elif takes_texts(name) and not value.startswith(("[", "--")):
            value = json.dumps([part.strip() for part in value.split(",")])
        out.append(f"{key if given else ''}{given}{value}")
    return out


def _keys_of(file: str) -> dict[str, Any]:
    """The keys of a YAML file; a group without keys counts as absent."""
    values = {name: value for name, value in read_yaml(file).items() if value is not None or name not in groups()}
    for name, value in values.items():
        if str(name).partition(".")[0] not in (*groups(), *key_types()):
            raise ConfigError(f"{file}: {_unknown(str(name))}")
        if name in groups() and not isinstance(value, dict):
            raise ConfigError(f"{file}: {_not_a_group(name, value)}")
        _check_entries(_below(str(name), value), f"{file}: ")
    return values


def _below(name: str, value: Any) -> list[tuple[str, Any]]:
    """(key, value) of each key of a group, or of the one key that has this name."""
    is_group = name in groups() and isinstance(value, dict)
    return [(f"{name}.{key}", part) for key, part in value.items()] if is_group else [(name, value)]


def _displace(given: Namespace, values: Iterable[tuple[str, Any]]) -> None:
    """How long to train is said by one of two keys: the one in this file, or in the flags, displaces an earlier
    file's other one."""
    new = {key for name, value in values for key, _ in _below(name, value)}
    told = [key for key in _LENGTHS if key in new and given.get(key) is not None]
    if len(told) == 1:
        given[_LENGTHS[told[0] == _LENGTHS[0]]] = None


def _check_values(given: Namespace) -> None:
    """What the parser lets pass: null for any key."""
    for name in groups():
        if name in given and not isinstance(given[name], Namespace):
            raise ConfigError(_not_a_group(name, given[name]))
    for key in key_types():
        if key in given and given[key] is None and not allows_null(key):
            raise ConfigError(f"{key} is null: it must be {wanted(key)}")


def _values_of(flags: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(key, value) of the flags that are keys or groups; text that is no YAML as it stands."""
    for i, flag in enumerate(flags):
        key, given, text = flag.removeprefix("--").partition("=")
        if not given:
            text = next(iter(flags[i + 1 :]), "--")
        if not flag.startswith("--") or text.startswith("--"):
            continue  # no key, or no value, of which the parser says so
        if (excess := excess_of(text)) is not None:
            raise ConfigError(f"--{key} {excess}")
        try:
            yield key, read_value(text)
        except yaml.YAMLError as error:
            if entries_of(key) or entries_of(_above(key)):
                raise ConfigError(f"{key} is not valid YAML: {yaml_problem(error)}") from error
            yield key, text


def _above(key: str) -> str:
    return key.rpartition(".")[0]


def _check_entries(values: Iterable[tuple[str, Any]], place: str = "") -> None:
    """Lists of groups, of which the parser's messages do not say where in the list the mistake is."""
    for key, value in values:
        if entries_of(_above(key)) is not None:
            raise ConfigError(place + _unknown(key))
        known = entries_of(key)
        if known is None or value is None:
            continue
        if not isinstance(value, list):
            shown = repr(value) if isinstance(value, str) else _shown(value)
            raise ConfigError(f"{place}{key} is {shown}: it must be {wanted(key)}")
        for i, entry in enumerate(value):
            if (wrong := _wrong_entry(f"{key}[{i}]", entry, known)) is not None:
                raise ConfigError(place + wrong)


def _wrong_entry(where: str, entry: Any, known: Mapping[str, tuple[Any, bool]]) -> str | None:
    """What is wrong with a group in a list."""
    if not isinstance(entry, dict):
        return f"{where} is {_shown(entry)}: it must be a group of keys, of {', '.join(known)}"
    for name, value in entry.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            cure = f"did you mean {where}.{near[0]}?" if near else f"choose among {', '.join(known)}"
            return f"unknown key {where}.{name}: {cure}"
        if not fits(value, known[name][0]):
            shown = repr(value) if isinstance(value, str) else _shown(value)
            return f"{where}.{name} is {shown}: it must be {in_words(known[name][0])}"
    missing = (name for name, (_, is_needed) in known.items() if is_needed and name not in entry)
    name = next(missing, None)
    return None if name is None else f"{where}.{name} is not set: it must be {in_words(known[name][0])}"


def _not_a_group(name: str, value: object) -> str:
    example = next(key for key in key_types() if key.startswith(f"{name}."))
    return f"{name} is {_shown(value)}: it must be a group of keys, such as {example}"


# -- the parser's messages, in our words -------------------------------------------------------------------------------


def _translated(run: Any, place: str = "") -> Any:
    """The result of `run()`; its failure as one line, with the file it comes from."""
    try:
        return run()
    except _FAILURES as error:
        raise ConfigError(place + readable(str(error))) from error


def readable(message: str) -> str:
    """A message of the parsing library as one line: what was given, why it cannot be, what would work."""
    message = _one_line(message)
    if (unknown := _unknown_key(message)) is not None:
        return _unknown(unknown)
    if found := re.search(r"unrecognized arguments: (.*)", message):
        return f"unexpected argument {found[1]}: options are --key value, and --help lists all keys"
    if found := re.search(r"argument --([\w.]+): expected one argument", message):
        return f"--{found[1]} has no value: it must be " + (wanted(found[1]) if found[1] in key_types() else "a file")
    found = re.search(r'[Pp]arser key "([\w.]+)": (.*)$', message)
    if found and found[1] in key_types() and (wrong := _wrong_value(found[2])) is not None:
        is_part, value = wrong
        holds = "holds" if is_part and "a list" in wanted(found[1]) else "is"
        return f"{found[1]} {holds} {_shown(value)}: it must be {wanted(found[1])}"
    if (found := re.search(r'[Pp]arser key "(\w+)": Unable to load config \'(.*?)\'', message)) and found[
        1
    ] in groups():
        return _not_a_group(found[1], found[2])
    return message


def _unknown(key: str) -> str:
    if key in OPTIONS:
        return f"{key} is an option of the command line, not a key of a file"
    near = nearest(key)
    return f"unknown key {key}: " + (f"did you mean {near}?" if near else "--help lists all keys")


_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}


def _wrong_value(message: str) -> tuple[bool, str] | None:
    """(whether it may be a part of a list, the value) that the parser refuses, in YAML's words."""
    part = re.search(r"Expected a <class '(?:int|float|str)'>\. Got value: ?(.*?)(?: - Expected a .*)?$", message)
    if whole := re.search(r"Given value type: <class '(\w+)'> Given value: ?(.*)$", message):  # one of several types
        if part is None or whole[1] != "list":
            return False, whole[2] if whole[1] == "str" else _PYTHON_WORDS.get(whole[2], whole[2])
    elif part is None:
        found = re.search(r"Got value: ?(.*)$", message)
        return None if found is None else (False, _PYTHON_WORDS.get(found[1], found[1]))
    return True, _PYTHON_WORDS.get(part[1], part[1])


_UNKNOWN = {
    r"unrecognized arguments: --([\w.-]+)": "{0}",
    r"Group '([\w.]+)' does not accept option '([^']+)'": "{0}.{1}",
    r"Option '([^']+)' is not accepted": "{0}",
    r"Key '([\w.]+)' is not expected": "{0}",
    r"does not accept (?:nested )?key '([^']+)'": "{0}",
}


def _unknown_key(message: str) -> str | None:
    for pattern, form in _UNKNOWN.items():
        if found := re.search(pattern, message):
            return form.format(*found.groups())
    return None


def _shown(value: object) -> str:
    """A value as it would stand in YAML, text in quotes."""
    if not isinstance(value, str):
        return _PYTHON_WORDS.get(str(value), str(value))
    try:
        is_text = not value or isinstance(yaml.safe_load(value), str)
    except yaml.YAMLError:
        is_text = True
    return repr(value) if is_text else value


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip()
