"""`python -m tools.visualize --checkpoint PATH --images FOLDER --method NAME --out DIR`: what a model attends to.

The checkpoint is of any layout, or what tools.convert reads. Images are prepared as the model was trained to see them.
Written to DIR: METHOD-IMAGE.png for each image, METHOD-contact.png, and METHOD.npz with the arrays, unscaled; of the
method `page` page.html alone, on which one moves over patches, layers and heads.

Exit codes: 0 done, 2 it cannot be.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import UnreadableImageError
from data.listing import SUFFIXES
from engine.device import prepare_cpu
from engine.errors import EXIT_DONE, ConfigError
from engine.run.launch import run_rank
from model import ImageText, VisionTransformer
from model.formats.base import Preprocessing
from model.seeing.capture import choose
from parallel.process_group import World
from tools.convert.images import prepared
from tools.options import COUNT, Parser, add_weights, number
from tools.visualize import texts
from tools.visualize.methods import METHODS, PAGE, READS, Asked, Shown, of_heads

PROGRAM = "tools.visualize"
_OPTIONS = ("layers", "heads", "query", "target", "masks", "clusters", "batch")  # that not every method reads
_BATCH = 8


def main(argv: Sequence[str], world: World) -> int:
    """Draw, and print where. Returns the exit code.

    Raises:
        ConfigError: what was asked for cannot be.
    """
    options = _options(argv)
    paths = images_in(options.images, options.most, options.out)
    prepare_cpu(world)
    model, tokens = _opened(options)
    how = model.preprocessing or Preprocessing()
    if options.method == PAGE:
        assert isinstance(model, VisionTransformer)  # texts are for other methods
        return _page(options, model, how, paths)
    images = torch.stack([_read(path, model, how) for path in paths])
    _make(options.out)
    given = {name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None}
    size = given.pop("batch", _BATCH) if "batch" in READS[options.method] else len(images)  # of all together
    asked = Asked(**given)
    began = time.perf_counter()
    batches = images.split(size)
    if isinstance(model, ImageText):
        parts = [texts.explained(options.method, model, batch, asked, tokens, options.text) for batch in batches]
    else:
        parts = [METHODS[options.method](model, batch, asked) for batch in batches]
    shown = joined(parts)
    seconds = time.perf_counter() - began

    from tools.visualize.pictures import draw_all, names_of, scenes  # matplotlib: half a second

    likenesses = texts.similarities(shown, names_of(paths), options.text) if options.text else []
    for line in [*shown.says, *of_heads(shown), *likenesses]:
        print(line)
    _store(shown, paths, options.out / f"{options.method}.npz")
    written = draw_all(shown, scenes(names_of(paths), images, how, model.sizes.patch), options.method, options.out)
    print(f"{len(images)} images in {seconds:.2f} s, {seconds / len(images) * 1000:.1f} ms each, without drawing")
    print(f"{options.out}: {len(written)} pictures, {options.method}.npz")
    return EXIT_DONE


def _page(options: argparse.Namespace, model: VisionTransformer, how: Preprocessing, paths: Sequence[Path]) -> int:
    """What there is room for, on one page."""
    from tools.visualize.page import images_of, write_page
    from tools.visualize.pictures import names_of, scenes

    asked = {"layers": options.layers, "heads": options.heads}
    try:
        wanted = choose(model.config, **asked)
    except ValueError as error:
        raise ConfigError(f"--layers, --heads: {error}") from error
    shown = paths[: images_of(wanted)]
    images = torch.stack([_read(path, model, how) for path in shown])
    _make(options.out)
    lines = write_page(
        options.out / f"{PAGE}.html", f"{options.checkpoint}: what it attends to", model.config, wanted,
        lambda image: model.capture(image, **asked), images, scenes(names_of(shown), images, how, model.sizes.patch),
    )  # fmt: skip
    if len(shown) < len(paths):
        lines.append(f"the first {len(shown)} of {len(paths)} images: name fewer --layers or --heads for more")
    print("\n".join(lines))
    return EXIT_DONE


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}") from error


def _opened(options: argparse.Namespace) -> tuple[VisionTransformer | ImageText, Tensor]:
    """The model, or the two towers that texts are for, and these in their tokens."""
    if options.text:
        return texts.opened(options.checkpoint, options.weights, options.text, options.tokenizer)
    try:
        return VisionTransformer.from_pretrained(options.checkpoint, weights=options.weights), torch.empty(0)
    except ValueError as error:
        raise ConfigError(f"--checkpoint: {error}") from error


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a run, a step, or a model")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="of images, or one image")
    parser.add_argument("--method", required=True, choices=READS, metavar="NAME", help=f"one of {', '.join(READS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where pictures go; made if need be")
    add_weights(parser)
    parser.add_argument("--layers", type=_numbers, metavar="N,N", help="heads, mean, page: blocks (default: all)")
    parser.add_argument("--heads", type=_numbers, metavar="N,N", help="heads, page: which (default: all)")
    parser.add_argument(
        "--query", type=_numbers, metavar="ROW,COL", help="heads, mean: a patch (default: what the head pools)"
    )
    explain = "the class to explain, of methods that explain one (default: the most likely)"
    parser.add_argument("--target", type=int, metavar="N", help=explain)
    of_text = f"explain the likeness to this text instead; may be repeated ({', '.join(texts.METHODS)})"
    parser.add_argument("--text", action="append", help=of_text)
    parser.add_argument("--tokenizer", help="of --text, as data.tokenizer (default: the run's)")
    parser.add_argument("--masks", type=number(COUNT), help=f"rise: how many (default: {Asked.masks})")
    parser.add_argument("--clusters", type=number(COUNT), help=f"clusters: how many (default: {Asked.clusters})")
    parser.add_argument("--batch", type=number(COUNT), help=f"images at once, but of pca, clusters (default: {_BATCH})")
    parser.add_argument("--most", type=number(COUNT), default=32, help="images in all, in order of their names")
    options = parser.parse_args(argv)
    if options.query is not None and len(options.query) != 2:
        raise ConfigError("--query takes a row and a column, such as 3,5")
    reads = READS[options.method]
    if options.text and options.method not in texts.METHODS:
        raise ConfigError(f"--text: method {options.method} explains no score: take {', '.join(texts.METHODS)}")
    if options.text and options.target is not None:
        raise ConfigError("--text and --target: explain the likeness to texts, or a class")
    if options.tokenizer is not None and not options.text:
        raise ConfigError("--tokenizer is of --text: leave it out, or give texts")
    if idle := [f"--{name}" for name in _OPTIONS if getattr(options, name) is not None and name not in reads]:
        what = ", ".join(f"--{name}" for name in reads) or "none of its kind"
        raise ConfigError(f"--method {options.method} does not read {', '.join(idle)}: leave them out; it reads {what}")
    return options


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not numbers, such as 0,3") from error


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


def _read(path: Path, model: VisionTransformer | ImageText, how: Preprocessing) -> Tensor:
    try:
        return prepared(path, model.sizes.channels, model.sizes.image, how)
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
    try:
        np.savez_compressed(out, images=np.array([str(path) for path in paths]), **arrays)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], PROGRAM, alone=True))
