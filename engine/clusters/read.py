"""Cluster files: from YAML to a `Cluster`, every field there, known and possible."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from engine.clusters.cluster import Cluster, Curve
from engine.errors import ConfigError
from engine.yaml_file import read_yaml

_LEAST, _MOST = 1e-6, {"nodes": 10**6, "devices_per_node": 1024, "overlap": 1.0}
_MOST_OF_ALL = 1e9
"""No figure of a machine is beyond these, and times that are made of them can be counted."""
_MAY_BE_ZERO = ("overlap", "latency_us", "microseconds")
_EXAMPLE = "configs/clusters/h100_64.yaml"


def read_cluster(file: str) -> Cluster:
    """The machine that a file describes.

    Raises:
        ConfigError: it cannot be read, or a field is missing, unknown or impossible.
    """
    cluster: Cluster = _Reader(file).group(Cluster, read_yaml(file, "--cluster", _EXAMPLE), "")
    if cluster.nodes > 1 and cluster.between_nodes is None:
        raise ConfigError(
            f"{file}: nodes is {cluster.nodes}, but the field between_nodes, the links between them, is missing: add "
            f"it, as in {_EXAMPLE}, or set nodes to 1"
        )
    return cluster


class _Reader:
    """Of one file, which its errors name."""

    def __init__(self, file: str) -> None:
        self.file = file

    def group(self, cls: Any, values: Any, place: str) -> Any:
        """A dataclass from keys and values."""
        if not isinstance(values, dict):
            raise self.wrong(place, values, f"it must hold the fields {', '.join(_names(cls))}")
        hints = get_type_hints(cls)
        for name in values:
            if name not in _names(cls):
                raise self.unknown(place, name, _names(cls))
        for field in fields(cls):
            if field.name in _names(cls) and field.default is MISSING and field.name not in values:
                at = _join(place, field.name)
                cure = "add where the figures are from" if field.name == "source" else f"add it, as in {_EXAMPLE}"
                raise ConfigError(f"{self.file}: the field {at} is missing: {cure}")
        given = {name: self.value(hints[name], value, _join(place, name)) for name, value in values.items()}
        return cls(**given, file=self.file) if cls is Cluster else cls(**given)

    def value(self, hint: Any, value: Any, place: str) -> Any:
        """One field's."""
        if get_origin(hint) is not Literal and type(None) in get_args(hint):
            if value is None:
                return None
            hint = Union[tuple(arg for arg in get_args(hint) if arg is not type(None))]  # noqa: UP007
        if hint is Curve:
            return self.curve(value, place)
        if is_dataclass(hint):
            return self.group(hint, value, place)
        if get_origin(hint) is dict:
            return self.by_format(hint, value, place)
        if get_origin(hint) is Literal:
            if value not in get_args(hint):
                raise self.wrong(place, value, f"it must be {' or '.join(get_args(hint))}")
            return value
        if hint is str:
            if not isinstance(value, str) or not value.strip():
                raise self.wrong(place, value, "it must be a text")
            return value
        return self.number(value, place, is_whole=hint is int)

    def number(self, value: Any, place: str, *, is_whole: bool = False) -> Any:
        """Within what it may be."""
        name = place.rpartition(".")[2]
        least, most = 0 if name in _MAY_BE_ZERO else 1 if is_whole else _LEAST, _MOST.get(name, _MOST_OF_ALL)
        is_number = isinstance(value, int if is_whole else int | float) and not isinstance(value, bool)
        if not is_number or not least <= value <= most:  # of nan neither holds
            raise self.wrong(place, value, f"it must be a {'whole ' * is_whole}number from {least:g} to {most:g}")
        return value if is_whole else float(value)

    def curve(self, value: Any, place: str) -> Curve:
        """A number, the same everywhere, or points [x, value] with ascending x."""
        if isinstance(value, int | float):
            return Curve(((1.0, self.number(value, place)),))
        if not isinstance(value, list) or not value or any(not isinstance(p, list) or len(p) != 2 for p in value):
            raise self.wrong(place, value, "it must be a number, or a list of points such as [[128, 300], [1024, 600]]")
        points = tuple(
            (self.number(x, f"{place}[{i}]"), self.number(y, f"{place}[{i}]")) for i, (x, y) in enumerate(value)
        )
        xs = [x for x, _ in points]
        if any(a >= b for a, b in itertools.pairwise(xs)):
            raise self.wrong(place, value, "the first numbers of its points must ascend")
        return Curve(points)

    def by_format(self, hint: Any, values: Any, place: str) -> dict[str, Any]:
        """A group for each number format."""
        key, of = get_args(hint)
        if not isinstance(values, dict) or not values:
            raise self.wrong(place, values, f"it must have one of {', '.join(get_args(key))}, or more")
        for name in values:
            if name not in get_args(key):
                raise self.unknown(place, name, get_args(key))
        return {name: self.value(of, value, _join(place, name)) for name, value in values.items()}

    def wrong(self, place: str, value: Any, cure: str) -> ConfigError:
        """Of a value that cannot be."""
        text = repr(value)
        return ConfigError(
            f"{self.file}: {place or 'the file'} is {text if len(text) < 80 else f'{text[:76]} ...'}: {cure}"
        )

    def unknown(self, place: str, name: Any, known: Any) -> ConfigError:
        """Of a field that is none."""
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        cure = f"did you mean {_join(place, near[0])}?" if near else f"known are {', '.join(known)}"
        return ConfigError(f"{self.file}: there is no field {_join(place, str(name))}: {cure}")


def _names(cls: Any) -> list[str]:
    return [field.name for field in fields(cls) if (cls, field.name) != (Cluster, "file")]


def _join(place: str, name: str) -> str:
    return f"{place}.{name}".removeprefix(".")
