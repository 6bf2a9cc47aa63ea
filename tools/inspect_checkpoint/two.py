"""How two checkpoints differ."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from engine.checkpoint.examine import Different, compare
from parallel.checkpoint.manifest import DTYPES, CheckpointError
from parallel.checkpoint.read import Reader
from tools.inspect_checkpoint.text import bytes_of, facts, flat, natural, print_head, shown


def compare_two(one: Reader, other: Reader) -> dict[str, Any]:
    """Read both, print what is not the same; returns all of that, `different` and `damage` among it."""
    a, b = one.manifest, other.manifest
    for reader in (one, other):
        print_head(reader.folder, reader.manifest)
        print()
    keys = {group: _different_keys(getattr(a, group), getattr(b, group)) for group in ("config", "about", "progress")}
    for group, pairs in keys.items():
        for key, (left, right) in pairs.items():
            print(f"{group} {key}: {shown(left)}, {shown(right)}")
    names = sorted(a.tensors.keys() | b.tensors.keys(), key=natural)
    different: list[dict[str, Any]] = []
    damage: list[dict[str, Any]] = []
    with tqdm(total=a.bytes, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for name in names:
            try:
                found = _difference(one, other, name)
            except CheckpointError as error:
                damage.append({"file": None, "tensor": name, "why": str(error)})
                bar.write(f"{name}: {error}")
            else:
                if found is not None:
                    different.append({"name": name, **found})
                    bar.write(f"{name}: {_described(found)}")
            bar.update(bytes_of(a.tensors[name]) if name in a.tensors else 0)
    equal = len(names) - len(different) - len(damage)
    print(f"{equal} of {len(names)} tensors are equal bit for bit, {len(different)} differ, {len(damage)} are damaged")
    heads = {"one": facts(one.folder, a), "other": facts(other.folder, b)}
    return {**heads, "keys": keys, "equal": equal, "different": different, "damage": damage}


def _difference(one: Reader, other: Reader, name: str) -> dict[str, Any] | None:
    """For JSON; None if there is none."""
    a, b = one.manifest.tensors.get(name), other.manifest.tensors.get(name)
    if a is None or b is None:
        return {"only_in": "other" if a is None else "one"}
    found: dict[str, Any] = {}
    if a.dtype != b.dtype:
        found["dtypes"] = [DTYPES[a.dtype], DTYPES[b.dtype]]
    if a.shape != b.shape:
        return found | {"shapes": [list(a.shape), list(b.shape)]}
    values: Different = compare(one, other, name)
    if values.differing:
        found |= {"elements": math.prod(a.shape), **values._asdict()}
    return found or None


def _described(found: Mapping[str, Any]) -> str:
    if "only_in" in found:
        return f"only in the {'first' if found['only_in'] == 'one' else 'second'}"
    parts = []
    if "dtypes" in found:
        parts.append("{} in the first, {} in the second".format(*found["dtypes"]))
    if "shapes" in found:
        parts.append("{} in the first, {} in the second".format(*found["shapes"]))
    if "differing" in found:
        left, right = map(shown, found["values"])
        parts.append(
            f"{found['differing']} of {found['elements']} elements differ, by at most {shown(found['largest'])}; "
            f"first at {found['first']}: {left}, {right}"
        )
    return "; ".join(parts)


def _different_keys(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    left, right = dict(flat(a)), dict(flat(b))
    both = {key: (left.get(key, "none"), right.get(key, "none")) for key in left | right}
    return {key: pair for key, pair in both.items() if pair[0] != pair[1]}
