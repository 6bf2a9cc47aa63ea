"""`python -m tools.prepare_data index SHARDS`: ready tar files in the layout of webdataset, or parquet, for training.

    pack SRC DST    packs a folder PATH/CLASS/IMAGE, a table (CSV, TSV) of images and captions, or other shards into tar
                    files, with indexes; the same command goes on where it was stopped
    index SHARDS    makes the index beside each shard, which a run would make when it begins; --again: all anew, where
                    shards have changed and are meant to
    check SHARDS    compares every byte with the index, and decodes every image
    stats SHARDS    how many samples, of which classes and sizes

SHARDS is as data.path: shards/train-{000000..000146}.tar, or wildcards in quotation marks; parquet files end in
.parquet. Of several tasks, as of a
SLURM array, each takes its part with --part I/N (from 0 on).

Exit codes: 0 all is well, 1 check has found damage, 2 SHARDS cannot be used.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data.pairs import Columns
from data.shards.catalogue import open_shards
from data.shards.store import Store
from data.shards.stores import store_of
from engine.errors import EXIT_DONE, EXIT_FAULT
from tools.commands import run_command
from tools.prepare_data.look import check, stats
from tools.prepare_data.pack import Plan, pack
from tools.prepare_data.sources import format_of, source_of


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises ValueError for what cannot be used."""
    options = _options(argv)
    if options.command == "pack":
        return _pack(options)
    store = _opened(options)
    catalogue = store.catalogue
    match options.command:
        case "index":
            print(catalogue.describe())
        case "stats":
            print("\n".join(stats(store)))
        case "check":
            found = check(store, options.workers)
            for line in found:
                print(line)
            print(f"{len(catalogue)} images in {len(catalogue.files)} shards, {len(found)} faults")
            return EXIT_FAULT if found else EXIT_DONE
    return EXIT_DONE


def _pack(options: argparse.Namespace) -> int:
    source = source_of(options.src, _columns(options))
    plan = Plan(
        source=hashlib.sha256(source.fingerprint.encode()).hexdigest()[:16],
        images=len(source),
        images_per_shard=options.images_per_shard,
        shuffle=options.shuffle,
        shorter_side=options.shorter_side,
    )
    with tqdm(desc="shards packed", unit="", disable=None) as bar:
        lines = pack(source, options.dst, plan, part=options.part, workers=options.workers, told=bar.update)
    print("\n".join(lines))
    return EXIT_DONE


def _columns(options: argparse.Namespace) -> Columns:
    return Columns(image=options.image_column, caption=options.caption_column, label=options.label_column)


def _opened(options: argparse.Namespace) -> Store:
    form = format_of(options.shards, _columns(options))
    with tqdm(desc="shards indexed", unit="", disable=None) as bar:
        catalogue = open_shards(
            options.shards,
            "SHARDS",
            form=form,
            folder=options.index_dir,
            workers=options.workers,
            part=options.part,
            again=options.command == "index" and options.again,
            told=bar.update,
        )
    return store_of(catalogue, form)


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no part I/N, such as 0/8")
    return int(number), int(of)


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isdecimal() and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return int(text)

    return read


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("pack", "index", "check", "stats"):
        command = commands.add_parser(name)
        command.add_argument("--workers", type=_whole(1, 1024), metavar="N", help="processes; by default one per core")
        command.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="only these shards")
        command.add_argument("--image-column", default="image", metavar="NAME", help="as data.image_column")
        command.add_argument("--caption-column", default="caption", metavar="NAME", help="as data.caption_column")
        command.add_argument("--label-column", metavar="NAME", help="as data.label_column")
        if name == "pack":
            _add_packing(command)
            continue
        command.add_argument("shards", metavar="SHARDS", help="tar or parquet files, as data.path names them")
        command.add_argument("--index-dir", metavar="FOLDER", help="as data.index_dir")
        if name == "index":
            command.add_argument("--again", action="store_true", help="also those that have an index")
    return parser.parse_args(argv)


def _add_packing(command: argparse.ArgumentParser) -> None:
    command.add_argument("src", metavar="SRC", help="a folder, a table, or shards as data.path names them")
    command.add_argument("dst", metavar="DST", type=Path, help="folder for the tar files")
    command.add_argument("--images-per-shard", type=_whole(1, 10**7), default=10_000, metavar="N")
    command.add_argument("--shuffle", type=_whole(0, 2**63), metavar="SEED", help="pack in a random order")
    command.add_argument(
        "--shorter-side", type=_whole(1, 2**15), metavar="PIXELS",
        help="write JPEGs, larger ones made smaller to this; by default the bytes of images stay as they are",
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main, "tools.prepare_data", ValueError)
