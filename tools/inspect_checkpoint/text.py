"""How names, values and the head of a checkpoint are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from parallel.checkpoint.manifest import Manifest, StoredTensor

NUMBERS = "numbers"  # the group of what is no tensor of the model
_LONG = 600  # characters of a value, such as names of a thousand classes


def print_head(folder: Path, manifest: Manifest) -> None:
    """What there is to know of a checkpoint in a few lines."""
    parts = f"{counted(len(manifest.files), 'file')}, {counted(len(manifest.tensors), 'tensor')}"
    pairs: list[tuple[str, Any]] = [("checkpoint", folder), ("step", manifest.step)]
    pairs += list(towers_of(manifest.config))
    pairs += [*manifest.about.items(), ("progress", manifest.progress), ("evaluation", manifest.evaluation)]
    pairs.append(("size", f"{size(manifest.bytes)} in {parts}"))
    print_pairs(pairs)


def towers_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the towers of a contrastive model are, and how they meet."""
    if config.get("objective") != "contrastive":
        return
    keys, image, text = (config.get(group) or {} for group in ("contrastive", "model", "text"))
    side = image.get("image_size")
    yield "image tower", f"{_blocks(image)}; images of {side}, patches of {image.get('patch_size')}"
    if keys.get("pairs", "image_text") == "image_text":
        tokens, words = text.get("context_length"), text.get("vocabulary_size")
        yield "text tower", f"{_blocks(text)}; {tokens} tokens of a vocabulary of {words}, {text.get('attention')}"
    yield "pair", f"{keys.get('loss')}, {keys.get('embedding')} features"


def _blocks(tower: Mapping[str, Any]) -> str:
    size = "a pyramid" if tower.get("stages") else f"{tower.get('depth')} blocks of width {tower.get('width')}"
    return f"{size}, pool {tower.get('pool')}"


def print_pairs(named: Iterable[tuple[str, Any]]) -> None:
    """A line for each name and value."""
    pairs = [(shown(name), value) for name, value in named]
    width = max((len(key) for key, _ in pairs), default=0)
    for key, value in pairs:
        if isinstance(value, Mapping):
            value = ", ".join(f"{shown(name)} {shown(part)}" for name, part in flat(value)) or "none"
        text = shown(value)
        more = f" ... ({len(text):,} characters: --json has all)" if len(text) > _LONG else ""
        print(f"{key:<{width}}  {text[:_LONG]}{more}")


def facts(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What `print_head` shows, for JSON."""
    groups = {name: getattr(manifest, name) for name in ("progress", "evaluation", "about", "config")}
    return {"path": str(folder), "step": manifest.step, "bytes": manifest.bytes} | groups


def grouped(tensors: Iterable[str]) -> dict[str, list[str]]:
    """Names by what they are of: weights, the optimizer's, others; numbers of the run last."""
    groups: dict[str, list[str]] = {}
    for name in sorted(tensors, key=natural):
        groups.setdefault(name.partition("/")[0] if "/" in name else NUMBERS, []).append(name)
    order = sorted(groups, key=lambda group: (group == NUMBERS, group != "weights", natural(group)))
    return {group: groups[group] for group in order}


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested groups as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def natural(name: str) -> list[tuple[int, str]]:
    """To sort by: blocks.2 comes before blocks.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d{1,18})", name)]


def short(name: str) -> str:
    """Within its group."""
    return name.partition("/")[2] or name


def bytes_of(tensor: StoredTensor) -> int:
    """Of its elements."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def counted(count: int, what: str) -> str:
    """So many of something."""
    return f"{count} {what}{'s' * (count != 1)}"


def size(count: int) -> str:
    """Of so many bytes, with its unit."""
    unit = min(int(math.log10(max(count, 1))) // 3, 4)
    return f"{count / 1000**unit:.4g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


def shown(value: Any) -> str:
    """One value, without what a terminal would act on."""
    if isinstance(value, float):
        return f"{value:.7g}"
    text = "none" if value is None else str(value)
    return text if text.isprintable() else ascii(text)


def finite(value: Any) -> Any:
    """As JSON can have it: null for what is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
