"""What is in one checkpoint, and what of it is damaged."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.checkpoint.examine import Examined, damaged_files, examine
from parallel.checkpoint.manifest import DTYPES, Manifest, StoredTensor
from parallel.checkpoint.read import Reader
from tools.inspect_checkpoint.text import (
    NUMBERS,
    bytes_of,
    counted,
    facts,
    flat,
    grouped,
    print_head,
    print_pairs,
    short,
    shown,
    size,
)


def inspect(reader: Reader, options: argparse.Namespace) -> dict[str, Any]:
    """Print what is in it as it is read, and then what is damaged; returns all of that, `damage` among it."""
    manifest = reader.manifest
    print_head(reader.folder, manifest)
    if options.config:
        print("config")
        print_pairs((f"  {key}", value) for key, value in flat(manifest.config))
    damage = [
        {"file": name, "tensor": None, "why": why} for name, why in damaged_files(reader, headers=not options.no_check)
    ]
    tensors = []
    for group, names in grouped(manifest.tensors).items():
        _print_group(group, [manifest.tensors[name] for name in names])
        width = max(len(short(name)) for name in names)
        for name in names:
            is_number, seen = group == NUMBERS and not manifest.tensors[name].shape, Examined()
            if is_number or options.norms or not options.no_check:
                seen = examine(reader, name, figures=options.norms or is_number)
            tensors.append(_row(manifest, name, seen, options, is_number))
            print(f"  {_line(tensors[-1], width)}")
            damage += [
                {"file": file, "tensor": name, "why": why}
                for file, why in dict.fromkeys((found.file, found.why) for found in seen.damage)
            ]
    print_damage(damage, checked=not options.no_check)
    files = [{"name": file.name, "bytes": file.bytes} for file in manifest.files]
    return {**facts(reader.folder, manifest), "files": files, "tensors": tensors, "damage": damage}


def _row(manifest: Manifest, name: str, seen: Examined, options: argparse.Namespace, is_number: bool) -> dict[str, Any]:
    tensor, figures = manifest.tensors[name], seen.figures
    row: dict[str, Any] = {"name": name, "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape)}
    row["bytes"], row["damaged"] = bytes_of(tensor), bool(seen.damage)
    if is_number:
        row["value"] = figures.least  # also the most, of one
    elif options.norms:
        row |= {"norm": figures.norm, "min": figures.least, "max": figures.most, "not_finite": figures.not_finite}
    if options.pieces:
        row["pieces"] = [
            {"file": manifest.files[piece.file].name, "offset": list(piece.box.offset), "shape": list(piece.box.shape),
             "start": piece.start}
            for piece in tensor.pieces
        ]  # fmt: skip
    return row


def _line(row: Mapping[str, Any], width: int) -> str:
    text = f"{short(row['name']):<{width}}  "
    if "value" in row:
        text += f"= {shown(row['value'])}" if row["value"] is not None else "= not finite" * (not row["damaged"])
    else:
        text += f"{row['shape']!s:<16} {row['dtype']:<4}"
    if "norm" in row:
        text += f"  norm {shown(row['norm'])}  min {shown(row['min'])}  max {shown(row['max'])}"
        text += f"  {row['not_finite']} NOT FINITE" * bool(row["not_finite"])
    text += "  DAMAGED" * row["damaged"]
    for piece in row.get("pieces", ()):
        spans = ", ".join(f"{a}:{a + n}" for a, n in zip(piece["offset"], piece["shape"], strict=True))
        text += f"\n      [{spans}] in {piece['file']} at byte {piece['start']}"
    return text.rstrip()


def _print_group(group: str, tensors: Sequence[StoredTensor]) -> None:
    if group == NUMBERS:
        print(f"\n{group}")
        return
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    print(f"\n{group}: {counted(len(tensors), 'tensor')}, {elements:,} elements, {size(sum(map(bytes_of, tensors)))}")


def print_damage(damage: Sequence[Mapping[str, Any]], *, checked: bool) -> None:
    """By file, each with what is wrong with it and with the tensors in it."""
    print()
    if not damage:
        print("every checksum is right" if checked else "no checksum was compared")
        return
    for file in dict.fromkeys(found["file"] for found in damage):
        print(f"DAMAGED: {file}")
        for found in damage:
            if found["file"] == file:
                print(f"  {found['tensor'] or 'the file'}: {found['why']}")
    files, tensors = ({found[key] for found in damage} - {None} for key in ("file", "tensor"))
    print(f"damaged: {counted(len(files), 'file')}, {counted(len(tensors), 'tensor')}")
