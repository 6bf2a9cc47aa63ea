"""`python -m tools.visualize --checkpoint PATH --images FOLDER --method NAME --out DIR`: what a model attends to.

Exit codes: 0 done, 2 it cannot be.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import UnreadableImageError
from data.listing import SUFFIXES
from engine.errors import EXIT_DONE, ConfigError
from engine.run.launch import run_rank
from model.seeing.capture import choose
from parallel.process_group import World
from tools.convert.images import prepared
from tools.places import written_whole
from tools.visualize.methods import PAGE, READS, explained
from tools.visualize.models import Alone, Looked, WithTexts
from tools.visualize.of_rows import check, of_heads
from tools.visualize.options import BATCH, PROGRAM, asked_of, parse_options
from tools.visualize.shown import Asked, Shown
from tools.visualize.texts import similarities


def main(argv: Sequence[str], world: World) -> int:
    """Draw, and print where. Returns the exit code.

    Raises:
        ConfigError: what was asked for cannot be.
    """
    options, flags = parse_options(argv, world)
    paths = [] if options.watch else images_in(options.images, options.most, options.out)
    looked = _opened(options, flags, world)
    asked = asked_of(options)
    check(options.method, looked.config, asked, images=len(paths))
    if world.rank == 0:
        _make(options.out)
    if options.watch:
        lines = _watched(options, looked, asked)
    else:
        lines = (_page if options.method == PAGE else _pictures)(options, looked, asked, paths)
    if world.rank == 0:
        print("\n".join(lines), flush=True)
    looked.end()
    return EXIT_DONE


def _opened(options: argparse.Namespace, flags: Sequence[str], world: World) -> Looked:
    if world.size > 1:
        from tools.visualize.spread import Spread  # which asks tools.evaluate, that imports more

        return Spread(options, flags, world)
    return WithTexts(options, world) if options.text else Alone(options, world)


def _pictures(options: argparse.Namespace, looked: Looked, asked: Asked, paths: Sequence[Path]) -> list[str]:
    """Draw them; what is to be said."""
    images = torch.stack([read(path, looked) for path in paths])
    size = (options.batch or BATCH) if "batch" in READS[options.method] else len(images)  # of all together
    looked.begin(images)
    began = time.perf_counter()
    parts = [looked.shown(options.method, batch, asked) for batch in images.split(size)]
    here = [part for part in parts if part is not None]
    if not here:
        return []
    shown, seconds = joined(here), time.perf_counter() - began

    from tools.visualize.pictures import draw_all, names_of, scenes  # matplotlib: half a second

    _store(shown, paths, options.out / f"{options.method}.npz")
    names = names_of(paths)
    of = scenes(names, images, looked.how, looked.config.sizes.patch)
    written = draw_all(shown, of, options.method, options.out)
    return [
        *shown.says,
        *of_heads(shown),
        *(similarities(shown, names, options.text) if options.text else explained(shown, names)),
        f"{len(images)} images in {seconds:.2f} s, {seconds / len(images) * 1000:.1f} ms each, without drawing",
        f"{options.out}: {len(written)} pictures, {options.method}.npz",
    ]


def _watched(options: argparse.Namespace, looked: Looked, asked: Asked) -> list[str]:
    from tools.visualize.watch import watch  # matplotlib

    return watch(options, looked, asked, partial(_decoded, looked=looked))


def _page(options: argparse.Namespace, looked: Looked, asked: Asked, paths: Sequence[Path]) -> list[str]:
    """What there is room for, on one page; what is to be said."""
    from tools.visualize.page import Page, write_page
    from tools.visualize.pictures import names_of, scenes

    wanted = choose(looked.config, asked.layers, asked.heads)
    images = torch.stack([read(path, looked) for path in paths])
    of = scenes(names_of(paths), images, looked.how, looked.config.sizes.patch)
    page = Page.of(f"{options.checkpoint}: what it attends to", looked.config, wanted, of)
    looked.begin(images)
    return write_page(options.out / f"{PAGE}.html", page, looked.rows, images)


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}") from error


def images_in(folder: Path, most: int, out: Path) -> list[Path]:
    """The first images of a folder, by name, but what lies in `out`, a folder within; or the one image.

    Raises:
        ConfigError: there are none, or pictures would be written among them.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ConfigError(f"--images {folder}: there is no such folder")
    own, written = folder.resolve(), out.resolve()
    if written == own:
        raise ConfigError(f"--out {out} is the folder of images, and the next run would take its pictures for some")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if own in written.parents:
        found = [path for path in found if written not in path.resolve().parents]
    if not found:
        raise ConfigError(f"--images {folder} has no image: files that end with {', '.join(SUFFIXES)}")
    return found[:most]


def _decoded(path: Path, looked: Looked) -> Tensor:
    """An image as the model sees it [C, H, W]. Raises UnreadableImageError."""
    return prepared(path, looked.config.sizes.channels, looked.config.sizes.image, looked.how)


def read(path: Path, looked: Looked) -> Tensor:
    """The same, of the command's own images. Raises ConfigError if it cannot be decoded."""
    try:
        return _decoded(path, looked)
    except UnreadableImageError as error:
        raise ConfigError(f"--images: {error}") from error


def joined(parts: Sequence[Shown]) -> Shown:
    """Of several batches."""
    last = parts[-1]

    def cat(which: str) -> dict[tuple[str, str], Tensor]:
        return {key: torch.cat([getattr(part, which)[key] for part in parts]).cpu() for key in getattr(last, which)}

    arrays = {name: torch.cat([part.arrays[name] for part in parts]).cpu() for name in last.arrays}
    return replace(last, maps=cat("maps"), colors=cat("colors"), arrays=arrays)


def _store(shown: Shown, paths: Sequence[Path], out: Path) -> None:
    tensors = {"/".join(filter(None, key)): x for key, x in (shown.maps | shown.colors).items()} | shown.arrays
    arrays: dict[str, Any] = {name: x.detach().numpy() for name, x in tensors.items()}
    with written_whole(out) as part, part.open("wb") as file:
        np.savez_compressed(file, images=np.array([str(path) for path in paths]), **arrays)


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], PROGRAM, alone=True))
