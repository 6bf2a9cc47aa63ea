"""Every key of the configuration by its dotted name, its type in words, and the valid key nearest to a wrong one."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.config import Config

OPTIONS = ("config", "print_config", "help")
"""Flags that are no keys."""

_WORDS = {int: "an integer", float: "a number", str: "a text", type(None): "null"}


@cache
def key_types() -> dict[str, Any]:
    """The type of each key that can be set, in the order of --help, e.g. `train.steps: int | None`."""
    return dict(_walk(Config, ""))


@cache
def groups() -> tuple[str, ...]:
    """Names of the groups of keys."""
    return tuple(dict.fromkeys(key.partition(".")[0] for key in key_types() if "." in key))


def default_of(key: str) -> Any:
    """The value of a key that is not set."""
    return value_of(Config(), key)


def value_of(config: Config, key: str) -> Any:
    """The value of a key in `config`."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def allows_null(key: str) -> bool:
    """Whether null is among the values of a key."""
    return type(None) in get_args(key_types()[key])


def takes_numbers(key: str) -> bool:
    """Whether a list of numbers is among the values of a key, e.g. of model.image_size."""
    hint = key_types().get(key)
    return any(get_origin(arg) is tuple and set(get_args(arg)) <= {int, float, ...} for arg in (hint, *get_args(hint)))


def takes_texts(key: str) -> bool:
    """Whether a key takes a list of texts, e.g. train.freeze."""
    hint = key_types().get(key)
    return get_origin(hint) is tuple and set(get_args(hint)) == {str, ...}


def entries_of(key: str) -> dict[str, tuple[Any, bool]] | None:
    """Of a key that takes a list of groups (model.stages): (type, whether it must be given) of each key of a group;
    None for any other."""
    for arg in get_args(key_types().get(key)):
        if get_origin(arg) is tuple and is_dataclass(get_args(arg)[0]):
            return _entries(get_args(arg)[0])
    return None


def _entries(cls: Any) -> dict[str, tuple[Any, bool]]:
    hints = get_type_hints(cls)
    return {field.name: (hints[field.name], field.default is MISSING) for field in fields(cls)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value read from YAML is of a type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin is tuple:
        length = isinstance(value, list) and (Ellipsis in args or len(value) == len(args))
        return length and all(fits(part, args[0]) for part in value)
    if is_dataclass(hint):  # a group in a list
        known = _entries(hint)
        return isinstance(value, dict) and all(
            fits(value[name], of) if name in value else not needed for name, (of, needed) in known.items()
        ) and value.keys() <= known.keys()  # fmt: skip
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    return isinstance(value, int | float if hint is float else hint)


def wanted(key: str) -> str:
    """What a key takes, in words: `an integer or null`, `1f1b or gpipe`, `a list of 2 numbers, such as [0.9, 0.99]`."""
    default = default_of(key)
    example = f", such as [{', '.join(map(str, default))}]" if isinstance(default, tuple) and default else ""
    return in_words(key_types()[key]) + example


def in_words(hint: Any) -> str:
    """A type, e.g. `an integer or null`."""
    words = _words(hint)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def nearest(key: str) -> str | None:
    """The valid key closest to a wrong one: with the same last part, else by the whole name, else by the last part."""
    key = key.replace("-", "_")
    leaves: dict[str, str] = {name.rpartition(".")[2]: name for name in reversed(key_types())}
    leaf = key.rpartition(".")[2]
    if key in key_types() or leaf in leaves:
        return key if key in key_types() else leaves[leaf]
    group = key.partition(".")[0]
    siblings = [name for name in key_types() if name.startswith(f"{group}.")] if "." in key else groups() + OPTIONS
    for candidates in (siblings, list(key_types())):
        if close := difflib.get_close_matches(key, candidates, n=1, cutoff=0.75):
            return close[0]
    close = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.75)
    return leaves[close[0]] if close else None


def _walk(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for field in fields(cls):
        hint, name = hints[field.name], prefix + field.name
        if is_dataclass(hint):
            yield from _walk(hint, f"{name}.")
        else:
            yield name, hint


def _words(hint: Any) -> list[str]:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return [word for arg in args for word in _words(arg)]
    if origin is Literal:
        return [str(arg) for arg in args]
    if origin in (tuple, list):
        if is_dataclass(args[0]):
            return ["a list of groups of keys"]
        if get_origin(args[0]) is Literal:
            return [f"a list of names among {in_words(args[0])}"]
        if get_origin(args[0]) is tuple:
            return [f"a list of lists of {len(get_args(args[0]))} {_WORDS[get_args(args[0])[0]].split()[-1]}s"]
        count = "" if origin is list or Ellipsis in args else f"{len(args)} "
        return [f"a list of {count}{_WORDS[args[0]].split()[-1]}s"]
    return ["true", "false"] if hint is bool else [_WORDS[hint]]
