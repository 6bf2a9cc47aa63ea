"""The command line of tools.visualize."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from parallel.process_group import World
from tools.options import COUNT, Parser, add_weights, number
from tools.visualize.methods import METHODS, READS
from tools.visualize.shown import Asked
from tools.visualize.texts import METHODS as OF_TEXTS

PROGRAM = "tools.visualize"
BATCH = 8
_MOST = 32
_OWN = ("layers", "heads", "query", "target", "masks", "steps", "clusters", "batch")  # that not every method reads
_OF_RANKS = ("parallel.", "precision.", "kernels")
_ABOUT = """What a model attends to, as pictures, arrays, or a page.

The checkpoint is of any layout, or what tools.convert reads. Images are prepared as the model was trained to see them.
Written to DIR: METHOD-IMAGE.png for each image, METHOD-contact.png, and METHOD.npz with the arrays, unscaled; of the
method `page` page.html alone, on which one moves over patches, layers and heads.
"""


def parse_options(argv: Sequence[str], world: World) -> tuple[argparse.Namespace, list[str]]:
    """The options, and keys of the configuration, of many ranks.

    Raises:
        ConfigError: an option says nothing here.
    """
    options, flags = _parser().parse_known_args(argv)
    if options.query is not None and len(options.query) != 2:
        raise ConfigError("--query takes a row and a column, such as 3,5")
    for name in ("layers", "heads"):
        if len(set(given := getattr(options, name) or ())) < len(given):
            raise ConfigError(f"--{name} {','.join(map(str, given))} names one twice: name each once")
    method, reads = options.method, READS[options.method]
    if options.text and method not in OF_TEXTS:
        raise ConfigError(f"--text: method {method} explains no likeness to texts: take {', '.join(OF_TEXTS)}")
    if options.text and options.target is not None:
        raise ConfigError("--text and --target: explain the likeness to texts, or a class")
    if options.tokenizer is not None and not options.text:
        raise ConfigError("--tokenizer is of --text: leave it out, or give texts")
    if idle := [f"--{name}" for name in _OWN if getattr(options, name) is not None and name not in reads]:
        what = ", ".join(f"--{name}" for name in reads) or "none of its kind"
        raise ConfigError(f"--method {method} does not read {', '.join(idle)}: leave them out; it reads {what}")
    for flag in (flag for flag in flags if flag.startswith("--")):
        if not flag.startswith(tuple(f"--{key}" for key in _OF_RANKS)):
            raise ConfigError(f"{flag} is no option: see --help")
        if world.size == 1:
            raise ConfigError(f"{flag} is of a model over several ranks: start them with tools.launch, or leave it out")
    if flags and not flags[0].startswith("--"):
        raise ConfigError(f"{flags[0]} is no option: see --help")
    if options.watch is None:
        options.most = options.most or _MOST
    else:
        _check_watch(options, world)
    return options, flags


def _check_watch(options: argparse.Namespace, world: World) -> None:
    if "batch" not in READS[options.method]:
        raise ConfigError(
            f"--watch takes frames one by one, and --method {options.method} does not: take another method"
        )
    if not options.watch.is_dir():
        raise ConfigError(f"--watch {options.watch} is no folder")
    if world.size > 1:
        raise ConfigError(f"--watch {options.watch} is for one process")
    if options.batch is not None:
        raise ConfigError(f"--watch {options.watch} takes no --batch")
    if options.out.resolve() == options.watch.resolve():
        raise ConfigError(f"--out {options.out} is the folder that is watched, and its pictures would be frames")


def asked_of(options: argparse.Namespace) -> Asked:
    """What is asked of the method."""
    given = {name: getattr(options, name) for name in _OWN if name != "batch"}
    return Asked(**{name: value for name, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="The model may be spread over ranks (tools.launch, torchrun, srun), "
        "by keys of the configuration: --parallel.tensor_parallel_size, ..., --precision.dtype, --kernels.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a run, a step, or a model")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", type=Path, metavar="FOLDER", help="of images, or one image")
    images.add_argument("--watch", type=Path, metavar="FOLDER", help="where frames come, of a camera, until Ctrl-C")
    parser.add_argument("--method", required=True, choices=READS, metavar="NAME", help=f"one of {', '.join(READS)}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where pictures go; made if need be")
    add_weights(parser)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)"
    )
    parser.add_argument("--layers", type=_numbers, metavar="N,N", help="heads, mean, page: blocks (default: all)")
    parser.add_argument("--heads", type=_numbers, metavar="N,N", help="heads, page: which (default: all)")
    parser.add_argument(
        "--query", type=_numbers, metavar="ROW,COL", help="heads, mean: a patch (default: what the head pools)"
    )
    explain = "the class to explain, of methods that explain one (default: the most likely)"
    parser.add_argument("--target", type=int, metavar="N", help=explain)
    of_text = f"explain the likeness to this text instead; may be repeated ({', '.join(OF_TEXTS)})"
    parser.add_argument("--text", action="append", help=of_text)
    parser.add_argument("--tokenizer", help="of --text, as data.tokenizer (default: the run's)")
    parser.add_argument("--masks", type=number(COUNT), help=f"rise: how many (default: {Asked.masks})")
    parser.add_argument("--steps", type=number(COUNT), help=f"integrated_gradients: how many (default: {Asked.steps})")
    parser.add_argument("--clusters", type=number(COUNT), help=f"clusters: how many (default: {Asked.clusters})")
    alone = ", ".join(name for name in METHODS if "batch" not in READS[name])
    parser.add_argument("--batch", type=number(COUNT), help=f"images at once, but of {alone} (default: {BATCH})")
    parser.add_argument(
        "--most", type=number(COUNT), help=f"images in all, in order of their names (default: {_MOST}); --watch: frames"
    )
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is not numbers, such as 0,3") from error
