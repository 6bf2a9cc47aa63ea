"""`python -m tools.prepare_data index SHARDS`: ready tar files in the layout of webdataset for training.

    index SHARDS    makes the index beside each tar file, which a run would make when it begins; --again: all anew,
                    where shards have changed and are meant to
    check SHARDS    compares every byte with the index, and decodes every image
    stats SHARDS    how many samples, of which classes and sizes

SHARDS is as data.path: shards/train-{000000..000146}.tar, or wildcards in quotation marks. Of several tasks, as of a
SLURM array, each takes its part with --part I/N (from 0 on).

Exit codes: 0 all is well, 1 check has found damage, 2 SHARDS cannot be used.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from tqdm import tqdm

from data.shards.catalogue import Catalogue, open_shards
from engine.errors import EXIT_DONE, EXIT_FAULT, EXIT_USAGE
from tools.prepare_data.look import check, stats


def main(argv: Sequence[str]) -> int:
    """Returns the exit code. Raises ValueError for what cannot be used."""
    options = _options(argv)
    catalogue = _opened(options)
    match options.command:
        case "index":
            print(catalogue.describe())
        case "stats":
            print("\n".join(stats(catalogue)))
        case "check":
            found = check(catalogue, options.workers)
            for line in found:
                print(line)
            print(f"{len(catalogue)} images in {len(catalogue.tars)} shards, {len(found)} faults")
            return EXIT_FAULT if found else EXIT_DONE
    return EXIT_DONE


def _opened(options: argparse.Namespace) -> Catalogue:
    with tqdm(desc="shards indexed", unit="", disable=None) as bar:
        return open_shards(
            options.shards,
            "SHARDS",
            label=options.label_column,
            folder=options.index_dir,
            workers=options.workers,
            part=options.part,
            again=options.command == "index" and options.again,
            told=bar.update,
        )


def _part(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no part I/N, such as 0/8")
    return int(number), int(of)


def _workers(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 1024):
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 to 1024")
    return int(text)


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("index", "check", "stats"):
        command = commands.add_parser(name)
        command.add_argument("shards", metavar="SHARDS", help="tar files, as data.path names them")
        command.add_argument("--label-column", metavar="FIELD", help="as data.label_column")
        command.add_argument("--index-dir", metavar="FOLDER", help="as data.index_dir")
        command.add_argument("--workers", type=_workers, metavar="N", help="processes; by default one per core")
        command.add_argument("--part", type=_part, default=(0, 1), metavar="I/N", help="only these shards")
        if name == "index":
            command.add_argument("--again", action="store_true", help="also those that have an index")
    return parser.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, quietly
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(f"tools.prepare_data: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        sys.exit(130)
