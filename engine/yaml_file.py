"""From a YAML file to its keys and values, within limits that no configuration comes near: size, depth, repetition."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from engine.errors import ConfigError

_MAX_BYTES = 256 * 1024
_MAX_DEPTH = 32
_MAX_VALUES = 100_000  # with every reference (*name) written out: ten lines of them can make a billion


def read_yaml(file: str, option: str = "--config", example: str = "configs/digits.yaml") -> dict[Any, Any]:
    """What a YAML file holds.

    Args:
        option: of the command line that names it. example: of such a file.

    Raises:
        ConfigError: that is anything but keys and values.
    """
    if not file:
        raise ConfigError(f"{option} is empty: give a YAML file, such as {example}")
    try:
        with Path(file).open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)  # no more, also of what has no end
        if len(raw) > _MAX_BYTES:
            raise ConfigError(f"{option} {file} is larger than {_MAX_BYTES // 1024} KiB, which no configuration is")
        text = raw.decode()
        if (excess := excess_of(text)) is not None:
            raise ConfigError(f"{option} {file} {excess}")
        node = yaml.compose(text, yaml.SafeLoader)
        values = read_value(text)
        if isinstance(node, yaml.MappingNode) and not isinstance(values, dict):
            values = yaml.safe_load(text)  # that loader takes a lone `train:` for a text
    except OSError as error:
        raise ConfigError(f"{option} {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {file} is not a text file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{option} {file} is not valid YAML: {yaml_problem(error)}") from error
    if (repeated := _repeated_key(node)) is not None:
        raise ConfigError(f"{file}: key {repeated} is given twice: merge them into one")
    if not isinstance(values, dict | None):
        raise ConfigError(f"{option} {file} holds no `key: value` lines")
    return values or {}


def read_value(text: str) -> Any:
    """What a text in YAML stands for, with 1e-3 as a number, where plain YAML has a text. Raises YAMLError."""
    try:
        return jsonargparse.get_loader("yaml")(text)
    except (ValueError, OverflowError, TypeError) as error:  # numbers of thousands of digits, 2024-13-45, {[1]: 2}
        if isinstance(error, yaml.YAMLError):
            raise
        raise yaml.YAMLError(str(error)) from error


def excess_of(text: str) -> str | None:
    """By what a text in YAML exceeds the limits; None if by nothing (or if it is no YAML, as others will say).

    Goes through the events of the parser, which neither recurses nor follows references.
    """
    sizes: dict[str | None, int] = {}
    counts = [0]  # values so far, of the file and of each list and group that is open
    names: list[str | None] = []  # of those lists and groups
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                counts.append(1)
                names.append(event.anchor)
            elif isinstance(event, yaml.CollectionEndEvent):
                sizes[names.pop()] = count = counts.pop()
                counts[-1] += count
            elif isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
                counts[-1] += 1
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor in names:
                    return f"holds *{event.anchor} within &{event.anchor}: a value cannot be a part of itself"
                counts[-1] += sizes.get(event.anchor, 1)
            if len(counts) > _MAX_DEPTH:
                return f"is nested more than {_MAX_DEPTH} deep, which no configuration is"
            if counts[-1] > _MAX_VALUES:
                return f"stands for more than {_MAX_VALUES} values, which no configuration has"
    except yaml.YAMLError:
        return None
    return None


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong, and where."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return re.sub(r"\s+", " ", str(error)).strip()
    return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"


def _repeated_key(node: yaml.Node | None, place: str = "") -> str | None:
    """The first key that a group, or one in a list, has twice."""
    if isinstance(node, yaml.SequenceNode):
        parts = [(f"{place}[{i}]", value) for i, value in enumerate(node.value)]
    elif isinstance(node, yaml.MappingNode):
        parts = [(f"{place}.{key.value}".removeprefix("."), value) for key, value in node.value]
    else:
        return None
    seen: set[str] = set()
    for name, _ in parts:
        if name in seen:
            return name
        seen.add(name)
    return next((found for name, value in parts if (found := _repeated_key(value, name))), None)
