r"""`python -m tools.benchmark sweep`: images per second and memory of many layouts, and whether a change has cost any.

Every layout of a grid that fits is run in processes of its own, `--rounds` times: whole processes take turns, so that a
machine that becomes slower does so for all layouts, a GPU's memory is one layout's at a time, and the peak is its own.
Each run adds a line of JSON to the file. The same command goes on where it was stopped.

    python -m tools.benchmark sweep --config configs/digits.yaml --ranks 2 --steps 10 --json sweeps/new.jsonl \
        --grid "tensor=1,2 pipeline=1,2 micro=4,8 zero=0,3"
Two sweeps, of which the second is to be no slower (exit code 1 if it is):
    python -m tools.benchmark sweep --compare sweeps/old.jsonl sweeps/new.jsonl
Another checkout of this program, built, whose runs take turns with ours; its lines go to sweeps/new.against.jsonl:
    python -m tools.benchmark sweep ... --json sweeps/new.jsonl --against ../old

Run it without a launcher: it starts ranks itself, in the batch script of a SLURM job with srun over all its hosts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from parallel.process_group import World
from tools.benchmark.sweep.compare import compare
from tools.benchmark.sweep.coordinator import Options, sweep
from tools.benchmark.sweep.file import read_lines

_OF_COMPARE = ("tolerance", "clock")


def main(argv: Sequence[str], world: World) -> int:
    """Measure and print, or compare; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--grid", help="names and values, such as 'tensor=1,2 zero=0,3 optimizer.name=adamw,muon'")
    add("--json", type=Path, help="the file of lines; the picture goes beside it")
    add("--ranks", type=_count, help="processes of a layout (default: the tasks of the SLURM job)")
    add("--threads", type=_count, help="of each rank (default: the cores of this host, shared out)")
    add("--steps", type=_count, help="measured steps of a run (default 10)")
    add("--warmup", type=_count, help="steps before them (default 3)")
    add("--rounds", type=_count, help="runs of each layout (default 5)")
    add("--timeout", type=_count, help="seconds that a run may take (default 1800)")
    add("--fresh", action="store_true", help="keep what is in the file under another name, and begin anew")
    add("--retry", action="store_true", help="run layouts again that have failed")
    add("--launch", help="local, srun, or a command with {ranks} that ends with a Python")
    add("--against", type=Path, metavar="DIR", help="another checkout, whose runs take turns with ours")
    add("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="two files; nothing is run")
    add("--tolerance", type=_share, help="slower by less than this is no regression (default: see docs/performance.md)")
    add(
        "--clock",
        choices=("wall", "cpu"),
        help="what is compared: wall-clock time (default), or the CPU's",
    )
    known, flags = parser.parse_known_args(argv)
    options = vars(known)
    if "compare" in options:
        paths = options.pop("compare")
        if excess := [*(f"--{name}" for name in options if name not in _OF_COMPARE), *flags]:
            raise ConfigError(f"--compare runs nothing, and takes no {excess[0]}")
        old, new = map(read_lines, paths)
        return compare(old, new, **options)
    if world.size > 1:
        raise ConfigError("sweep starts ranks of its own: run it without a launcher")
    if not {"grid", "json"} <= options.keys():
        raise ConfigError("sweep needs --grid and --json FILE (or --compare OLD NEW); --help tells more")
    if "against" not in options and (excess := [name for name in _OF_COMPARE if name in options]):
        raise ConfigError(f"--{excess[0]} is for a comparison: with --against DIR, or --compare OLD NEW")
    return sweep(Options(**options), flags)


def _share(text: str) -> float:
    try:
        if 0 <= (share := float(text)) < 1:
            return share
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"is {text}: it must be a share, from 0 to 1")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 0 < int(text[:8]) < 10**6):
        raise argparse.ArgumentTypeError(f"is {text}: it must be a number from 1 to 999999")
    return int(text)
