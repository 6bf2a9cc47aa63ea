"""The layouts of a sweep: what `--grid` says, multiplied out, and each entry checked before anything starts."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import yaml

from engine.config import Config, plain
from engine.config.keys import default_of, fits, key_types, nearest, value_of, wanted
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.yaml_file import read_value
from tools.benchmark.bench import read_config

SHORT = {
    "tensor": "parallel.tensor_parallel_size",
    "pipeline": "parallel.pipeline_parallel_size",
    "context": "parallel.context_parallel_size",
    "sequence": "parallel.sequence_parallel",
    "zero": "parallel.zero_stage",
    "schedule": "parallel.schedule",
    "micro": "train.micro_batch_size",
    "batch": "train.global_batch_size",
    "dtype": "precision.dtype",
}
"""Keys of the configuration that have a short name in a grid."""

PLACES = ("ranks", "threads")
"""What a grid may also vary: processes, and threads of each."""

_MOST = 4096

NOT_MEASURED = ("run_dir", "data.", "log.", "checkpoint.", "schedule.", "train.steps", "train.epochs")
"""How the keys begin that no step hangs on."""

Values = dict[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """An entry of the grid.

    Attributes:
        entry: what the grid says, by its names. config: as given, not resolved. ranks, threads: processes, and threads
            of each; None leaves those to the ranks. shape: pipeline x data x context x tensor. why: what makes it
            impossible, or the same as another; None: it is measured. idle: keys that do nothing in it, and why.
            identity: a hash of all that its speed hangs on.
    """

    entry: dict[str, Any]
    config: Config
    ranks: int
    threads: int | None
    shape: str | None = None
    why: str | None = None
    identity: str = ""
    idle: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The entry as it would be written."""
        return in_words(self.entry)


def in_words(entry: Mapping[str, Any]) -> str:
    """An entry of the grid as it would be written there."""
    return " ".join(f"{name}={_written(value)}" for name, value in entry.items())


def read_grid(text: str) -> Values:
    """Names and values of `tensor=1,2 optimizer.name=adamw,muon model.image_size=[48,96],64`.

    Raises:
        ConfigError: it is empty, has an unknown name, one that nothing measured hangs on, a name or value twice, or a
            value of a wrong type.
    """
    grid: Values = {}
    for part in filter(None, _split(text, " \t\n")):
        name, given, values = part.partition("=")
        if not given or not name:
            raise ConfigError(f"--grid: {part!r} is not name=value,value: write such as tensor=1,2")
        if name in grid:
            raise ConfigError(f"--grid: {name} is given twice: give all its values at once, with commas between them")
        if not values:
            raise ConfigError(f"--grid: {name} has no values: write such as {name}=1,2")
        grid[name] = [_value(name, value) for value in _split(values, ",")]
        if twice := [v for i, v in enumerate(grid[name]) if v in grid[name][:i]]:
            raise ConfigError(f"--grid: {name} has the value {_written(twice[0])} twice")
    if not grid:
        raise ConfigError("--grid is empty: give such as 'tensor=1,2 pipeline=1,2 micro=4,8 zero=0,3'")
    if len({SHORT.get(name, name) for name in grid}) < len(grid):
        raise ConfigError("--grid: a key has its short and its whole name: give one of them")
    if (count := prod(map(len, grid.values()))) > _MOST:
        raise ConfigError(f"--grid has {count} entries: give at most {_MOST}")
    return grid


def _split(text: str, at: str) -> list[str]:
    """Parts between the characters `at`, but for those in brackets."""
    parts, depth = [""], 0
    for character in text:
        depth = max(0, depth + (character in "[{") - (character in "]}"))
        if character in at and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _value(name: str, text: str) -> Any:
    key = SHORT.get(name, name)
    if key.startswith(NOT_MEASURED):
        raise ConfigError(f"--grid: {name} is nothing that a step hangs on, which is what is measured: leave it out")
    if key not in key_types() and key not in PLACES:
        near = [*difflib.get_close_matches(name, short := (*SHORT, *PLACES), n=1), nearest(key)][0]
        cure = f"did you mean {near}? " if near in short or near in key_types() else ""
        raise ConfigError(
            f"--grid: unknown name {name}: {cure}Give {', '.join(short)}, or a key such as optimizer.name"
        )
    try:
        value = read_value(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--grid: {name} has the value {text!r}, which is no YAML") from error
    if key in PLACES:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"--grid: {name} has the value {text!r}: it must be a positive integer")
    elif not fits(value, key_types()[key]):
        raise ConfigError(f"--grid: {name} has the value {text!r}: it must be {wanted(key)}")
    if isinstance(value, int) and not isinstance(value, bool) and str(value) != text.strip():
        raise ConfigError(f"--grid: {name} has the value {text!r}, which is {value} in YAML: write it so")
    return value


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where layouts are to run. ranks, threads: unless the grid says. cores: of this host, if threads are to share
    them; None leaves them to the ranks. device_type: cpu or cuda.
    """

    ranks: int
    threads: int | None
    cores: int | None
    device_type: str

    def of(self, entry: Mapping[str, Any]) -> tuple[int, int | None]:
        """(ranks, threads) of an entry."""
        ranks = entry.get("ranks", self.ranks)
        shared = None if self.cores is None else max(1, self.cores // ranks)
        return ranks, entry.get("threads", self.threads or shared)


def layouts_of(grid: Values, flags: Sequence[str], place: Place) -> list[Layout]:
    """Every entry of the full product in the grid's order, checked by what would train it.

    Raises:
        ConfigError: the flags are wrong, whatever the grid adds, or set what the grid varies; or no entry can be.
    """
    given = [flag.partition("=")[0] for flag in flags]
    if double := [name for name in grid if f"--{SHORT.get(name, name)}" in given]:
        raise ConfigError(f"--{SHORT.get(double[0], double[0])} and {double[0]} of --grid are one key: leave one out")
    read_config(flags)
    found: dict[str, Layout] = {}
    layouts: list[Layout] = []
    for values in itertools.product(*grid.values()):
        layout = _checked(dict(zip(grid, values, strict=True)), flags, place)
        if layout.why is None and (same := found.setdefault(layout.identity, layout)) is not layout:
            keys = tuple(f"{SHORT.get(name, name)} " for name in layout.entry)
            why = "; ".join(text for text in layout.idle if text.startswith(keys)) or "all keys are equal"
            layout = replace(layout, why=f"the same as {same.name}: {why}")
        layouts.append(layout)
    if not found:
        raise ConfigError(f"--grid: no entry can be; {layouts[0].name}: {layouts[0].why}")
    return layouts


def _checked(entry: dict[str, Any], flags: Sequence[str], place: Place) -> Layout:
    ranks, threads = place.of(entry)
    own = [f"--{SHORT.get(name, name)}={_written(value)}" for name, value in entry.items() if name not in PLACES]
    layout = Layout(entry=entry, config=Config(), ranks=ranks, threads=threads)
    try:
        config = read_config([*flags, *own])
        layout = replace(layout, config=config)
        resolved, shape = config.resolve(ranks), config.grid_shape(ranks)
        idle = without_effect(resolved, shape, place.device_type, steps=1)
        identity = _identity(resolved, idle, ranks, threads)
        return replace(layout, shape="x".join(map(str, shape.sizes)), idle=tuple(idle), identity=identity)
    except ConfigError as error:
        return replace(layout, why=str(error))


def _identity(config: Config, idle: Sequence[str], ranks: int, threads: int | None) -> str:
    """A hash of the resolved configuration, ranks and threads: of keys that are not at their defaults, so that another
    commit's new key changes no hash, without those that do nothing in this layout.
    """
    without = [text.partition(" ")[0] for text in idle]
    counted = {key: value for key, value in settings(config).items() if key not in without}
    text = json.dumps({**counted, "ranks": ranks, "threads": threads}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def settings(config: Config) -> dict[str, Any]:
    """Keys that are not at their defaults, but for those that no step hangs on, with values as JSON has them."""
    values = {key: value_of(config, key) for key in key_types() if not key.startswith(NOT_MEASURED)}
    return {key: _plain(value) for key, value in values.items() if value != default_of(key)}


def to_yaml(keys: Mapping[str, Any]) -> str:
    """A file for --config of what `settings` gives."""
    groups: dict[str, Any] = {}
    for key, value in keys.items():
        group, dot, name = key.partition(".")
        if dot:
            groups.setdefault(group, {})[name] = value
        else:
            groups[key] = value
    return yaml.safe_dump(groups, sort_keys=False)


def _plain(value: Any) -> Any:
    """Lists of groups (model.stages) as lists of dictionaries."""
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value


def _written(value: Any) -> str:
    """As in a grid or after a flag's `=`, which read JSON."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
