"""What to call runs that are shown together: by the keys of their configurations that differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.errors import ConfigError

CONFIG = "config.yaml"
SEED = "train.seed"
Keys = Mapping[str, Any]

# Where and how often a run writes says nothing of what it is.
_NOT_SHOWN = re.compile(r"run_dir|checkpoint\.(dir|resume|save_interval|keep.*|async_save)|log\..*|parallel\.timeout")
_RANKS = re.compile(rb"^# ranks: (\d+)", re.MULTILINE)


def read_keys(folder: Path) -> Keys | None:
    """A run's configuration by dotted keys, with the number of `ranks`; None if it has none. Raises ConfigError if that
    cannot be read.
    """
    try:
        text = (folder / CONFIG).read_bytes()
        keys = yaml.safe_load(text)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{folder / CONFIG} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / CONFIG} is no YAML: move it away, and runs have their folders' names") from error
    if not isinstance(keys, dict):
        raise ConfigError(f"{folder / CONFIG} holds no keys: move it away, and runs have their folders' names")
    ranks = {"ranks": int(found[1])} if (found := _RANKS.search(text)) else {}
    return ranks | dict(_flat(keys, ""))


def _flat(keys: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in keys.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def names_of(
    folders: Sequence[Path], configs: Sequence[Keys | None], groups: Sequence[Sequence[int]] | None = None
) -> list[str]:
    """A name for each run that no other one has: `key=value` of each key that differs and is in all configurations, or
    the folder's name where there is no configuration. Runs that would be called alike bear their folders' names, too.

    Args:
        groups: of runs that share one name, from `grouped_by_seed`. None: each has its own.
    """
    groups = [[i] for i in range(len(folders))] if groups is None else groups
    own = [configs[group[0]] for group in groups]
    known = [keys for keys in own if keys is not None]
    shown = [key for key in differing(known) if key != SEED or all(len(group) == 1 for group in groups)]
    short = _short(shown, known[0] if known else {})
    ends = unique_ends(folders)
    by_folder = [ends[group[0]] for group in groups]
    names = [
        " ".join(f"{short[key]}={_text(keys[key])}" for key in shown) if keys is not None else folder
        for keys, folder in zip(own, by_folder, strict=True)
    ]
    counts = Counter(names)
    names = [  # equal configurations have no keys to show: their folders alone
        name if counts[name] == 1 and name else f"{name} ({folder})" if name else folder
        for name, folder in zip(names, by_folder, strict=True)
    ]
    return [f"{n} ({len(g)} seeds)" if len(g) > 1 else n for n, g in zip(names, groups, strict=True)]


def grouped_by_seed(configs: Sequence[Keys | None]) -> list[list[int]]:
    """Numbers of the runs whose configurations differ in nothing but the seed, together, in the order of the first."""
    groups: list[list[int]] = []
    for i, keys in enumerate(configs):
        for group in groups:
            first = configs[group[0]]
            if keys is not None and first is not None and set(differing([first, keys])) <= {SEED}:
                group.append(i)
                break
        else:
            groups.append([i])
    return groups


def differing(configs: Sequence[Keys]) -> list[str]:
    """Keys that all have, with values that are not all equal, in the order of the first. What a preset stands for is
    not told beside it.
    """
    if len(configs) < 2:
        return []
    common = [key for key in configs[0] if all(key in keys for keys in configs) and not _NOT_SHOWN.fullmatch(key)]
    found = [key for key in common if any(keys[key] != configs[0][key] for keys in configs)]
    if "model.preset" in found and all(keys["model.preset"] for keys in configs):
        found = [key for key in found if not (key.startswith("model.") and _follows(configs, key, "model.preset"))]
    return found


def _follows(configs: Sequence[Keys], key: str, other: str) -> bool:
    """Whether one value of `other` never stands beside two of `key`, which is another key."""
    values: dict[str, str] = {}
    return key != other and all(values.setdefault(repr(k[other]), repr(k[key])) == repr(k[key]) for k in configs)


def _short(shown: Sequence[str], keys: Keys) -> dict[str, str]:
    """The last component of each key, or all of it where another key ends alike."""
    ends = Counter(key.rpartition(".")[2] for key in keys)
    return {key: end if ends[end := key.rpartition(".")[2]] == 1 else key for key in shown}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(part)}" for key, part in value.items()) + "}"
    return Path(value).name or value if isinstance(value, str) and "/" in value else str(value)


def unique_ends(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from all others."""
    paths = [folder.resolve() for folder in folders]
    for count in range(1, max((len(path.parts) for path in paths), default=1)):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(map(str, paths))
