r"""`python -m tools.benchmark convert`: how fast weights are converted, and in how much memory.

A source of random numbers in the tensors of a real model is written, forgotten by the page cache, and converted by
`python -m tools.convert` in a process of its own, in turn with the disk's own rates on the same number of bytes, from
the same folder. A row for each conversion:

    GB                      of the source
    seconds, MB_per_s       of the conversion, without the program's start; median over rounds
    of_write, of_copy       the rate of the conversion over that of writing so many bytes and seeing them on the disk,
                            and over that of reading them from the disk and writing them
    memory_GB               most that the process held beyond what it had before

    python -m tools.benchmark convert --model.preset vit_l16 --from hf_vit --to vitruvius
    python -m tools.benchmark convert --model.preset vit_22b --model.depth 4 --dtype bf16 --from vitruvius --to timm
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config.cli import parse
from model import ModelConfig
from model.formats.api import save_weights
from model.formats.base import Description
from model.formats.registry import KINDS
from model.formats.sources import Entry
from model.layers import logical_shapes
from parallel.process_group import World
from tools.benchmark.checkpoint_ways import Plain, forget_pages
from tools.benchmark.table import Row, show
from tools.convert.report import size_of
from tools.options import add_json

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print. Options that are not the benchmark's own are keys of the model."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="source", choices=KINDS, default="hf_vit", help="kind of the source")
    parser.add_argument("--to", choices=KINDS, nargs="+", default=["vitruvius"], help="kinds that it is converted to")
    parser.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the source")
    parser.add_argument("--dir", type=Path, help="folder on the disk in question (default: the temporary one)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3)")
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    model = parse(flags, "tools.benchmark convert")[0].model.resolve()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=options.dir) as name:
        source = Path(name) / ("source.npz" if options.source == "big_vision" else "source")
        save_weights(RandomWeights(model, _DTYPES[options.dtype]), source, options.source)
        rows = [_row(source, options.source, kind, options.repeats) for kind in options.to]
    show(rows, options.json)


class RandomWeights:
    """As model.formats.weights.Weights: numbers without meaning, made when they are read."""

    kind, path = "random", Path()

    def __init__(self, model: ModelConfig, dtype: torch.dtype) -> None:
        self.description = Description(model=model)
        self.carried: Mapping[str, Entry] = {}
        self.tensors: Mapping[str, Entry] = {n: Entry(shape, dtype) for n, shape in logical_shapes(model).items()}

    def read(self, name: str) -> Tensor:
        """As Weights."""
        entry = self.tensors[name]
        return torch.randn(entry.shape, dtype=entry.dtype)

    def read_carried(self, name: str) -> Tensor:
        """As Weights."""
        raise KeyError(name)

    def close(self) -> None:
        """As Weights."""


def _row(source: Path, kind: str, to: str, repeats: int) -> Row:
    target = source.with_name("target.npz" if to == "big_vision" else "target")
    files = [p for p in source.rglob("*") if p.is_file()] if source.is_dir() else [source]
    size = size_of(source)
    plain = Plain(0, size)
    copied, figures, memory = source.with_name("copied"), source.with_name("figures.json"), 0
    command = [sys.executable, "-m", "tools.convert", "--from", kind, "--to", to, str(source), str(target)]

    def convert() -> float:
        nonlocal memory
        subprocess.run([*command, "--json", str(figures)], check=True, stdout=subprocess.DEVNULL)
        found = json.loads(figures.read_text())
        memory = max(memory, found["memory_bytes"])
        return float(found["seconds"])

    def copy() -> float:
        return _seconds(lambda: _copy(files, copied))

    times: dict[str, list[float]] = {"convert": [], "write": [], "copy": []}
    for _ in range(repeats):
        for name, way in (
            ("convert", convert),
            ("write", lambda: _seconds(lambda: plain.write(copied))),
            ("copy", copy),
        ):
            _remove(target, copied)
            forget_pages(source.parent)
            times[name].append(way())
    _remove(target, copied)
    seconds = {name: statistics.median(found) for name, found in times.items()}
    alone = seconds["convert"]
    return {
        "from": kind,
        "to": to,
        "GB": size / 1e9,
        "seconds": alone,
        "MB_per_s": size / 1e6 / alone,
        "of_write": seconds["write"] / alone,
        "of_copy": seconds["copy"] / alone,
        "memory_GB": memory / 1e9,
    }


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _copy(files: Sequence[Path], folder: Path) -> None:
    folder.mkdir()
    for path in files:
        copied = folder / path.name
        shutil.copyfile(path, copied)
        with copied.open("rb+") as file:
            os.fsync(file.fileno())


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
