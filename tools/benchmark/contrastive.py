r"""`python -m tools.benchmark contrastive`: losses over pairs, forward and backward, against open_clip's.

open_clip's ClipLoss(local_loss=True, gather_with_grad=True) and SigLipLoss, differentiated by autograd, and ours, on as
many ranks each, a thread a rank, in processes of their own, taking turns: what counts is the median of the ratios of
neighbours. Both must have the same loss and gradients. They are compared at --batch, or at the largest half, quarter,
... of it whose logits theirs has memory for, by what a smaller one takes; ours is also measured at --batch.

A loss takes products of N x N x E, 2 N N E operations each: of ours InfoNCE four, the sigmoid loss three; of theirs six
and three. `share_of_gemm` is the time that ours would take at the rate of a product of 2,048 x 2,048, measured in turn
on the same ranks, over the time that it took.

    python -m tools.benchmark contrastive --batch 32768 --width 1024 --loss infonce,sigmoid --against open_clip
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from parallel.process_group import World
from tools.benchmark.table import Row, show
from tools.benchmark.turns import Answer, Program, Running, started
from tools.options import COUNT, add_json, number

OURS, THEIRS = "vitruvius", "open_clip"
PRODUCTS = {"infonce": {OURS: 4, THEIRS: 6}, "sigmoid": {OURS: 3, THEIRS: 3}}
_SHARE_OF_MEMORY = 0.85
_WARM = 8192  # larger batches of one program alone need no round that warms up
_PROBE = 8  # the part of the batch that their memory is found by


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark contrastive", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=number(COUNT), default=32768, help="pairs of all ranks (default 32768)")
    parser.add_argument("--width", type=number(COUNT), default=1024, help="of an embedding (default 1024)")
    parser.add_argument("--loss", default="infonce,sigmoid", help=f"some of {','.join(PRODUCTS)} (default: both)")
    parser.add_argument("--against", default="", choices=["", THEIRS], help="open_clip, or (default) nobody")
    parser.add_argument("--ranks", type=number(COUNT), default=2, help="of each program (default 2)")
    parser.add_argument("--threads", type=number(COUNT), default=1, help="of a rank (default 1)")
    parser.add_argument("--rounds", type=number(COUNT), default=5, help="measured, after one that warms up (default 5)")
    parser.add_argument("--scale", type=float, default=10.0, help="1 / temperature (default 10)")
    parser.add_argument("--bias", type=float, default=-10.0, help="of the sigmoid loss (default -10)")
    add_json(parser)
    options = parser.parse_args(argv)
    losses = options.loss.split(",")
    if strange := [name for name in losses if name not in PRODUCTS]:
        raise ConfigError(f"--loss {','.join(strange)}: give some of {', '.join(PRODUCTS)} with commas between them")
    if options.batch % options.ranks:
        raise ConfigError(f"--batch {options.batch} does not divide among --ranks {options.ranks}")
    if options.against and importlib.util.find_spec(THEIRS) is None:
        raise ConfigError(f"--against {THEIRS}: it is not installed here; make setup installs it (tests/libraries.txt)")
    names = [OURS, *([THEIRS] if options.against else [])]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        programs = [_program(name, options) for name in names]
        running = dict(zip(names, stack.enter_context(started(programs, Path(folder))), strict=True))
        for loss in losses:
            rows += _compare(loss, running, options)
    show(rows, options.json)


def _program(name: str, options: argparse.Namespace) -> Program:
    return Program(
        name=name, interpreter=sys.executable, module="tools.benchmark.contrastive_ranks", ranks=options.ranks,
        threads=options.threads, task={"program": name}, environment={},
    )  # fmt: skip


def _compare(loss: str, running: dict[str, Running], options: argparse.Namespace) -> list[Row]:
    """A row for each program, and one of ours at the whole batch where they meet at a smaller one."""
    batch = options.batch
    if THEIRS in running:
        batch = _largest(loss, running[THEIRS], options)
    measured = _rounds(loss, batch, running, options)
    rows = [_row(loss, name, batch, measured, options) for name in running]
    if batch < options.batch:
        alone = _rounds(loss, options.batch, {OURS: running[OURS]}, options)
        rows.append(_row(loss, OURS, options.batch, alone, options))
    return rows


def _largest(loss: str, theirs: Running, options: argparse.Namespace) -> int:
    """The batch, or the largest half of a half of it that they have memory for; logits grow with its square."""
    probe = max(options.ranks, options.batch // _PROBE // options.ranks * options.ranks)
    taken = sum(answer["peak"] for answer in theirs.ask(_message(loss, probe, options)))
    batch = options.batch
    while batch > probe and taken * (batch / probe) ** 2 > _SHARE_OF_MEMORY * _available():
        batch = batch // 2 // options.ranks * options.ranks
    return batch


def _available() -> int:
    """Bytes of memory that nobody has."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def _message(loss: str, batch: int, options: argparse.Namespace) -> dict[str, Any]:
    return {"loss": loss, "batch": batch, "width": options.width, "scale": options.scale, "bias": options.bias}


def _rounds(
    loss: str, batch: int, running: dict[str, Running], options: argparse.Namespace
) -> dict[str, list[list[Answer]]]:
    """Answers of each program in each round that counts, and of `gemm`, what ranks of ours multiply at."""
    answers: dict[str, list[list[Answer]]] = {name: [] for name in (*running, "gemm")}
    warm = THEIRS in running or batch < _WARM
    for count in range(options.rounds + 1 if warm else (options.rounds + 1) // 2):
        for name, program in running.items():
            answers[name].append(program.ask(_message(loss, batch, options)))
        answers["gemm"].append(running[OURS].ask({"loss": "gemm"}))
        if not count:
            _agree(loss, {name: answers[name][0] for name in running})
    return {name: found[warm:] for name, found in answers.items()}


def _agree(loss: str, answers: dict[str, list[Answer]]) -> None:
    """Loss and gradients are those of the others."""
    ours = answers[OURS]
    for name, theirs in answers.items():
        total, expected = (sum(answer["loss"] for answer in found) for found in (ours, theirs))
        pairs = [
            (total, expected),
            *((a[s], b[s]) for a, b in zip(ours, theirs, strict=True) for s in ("left", "right")),
        ]
        if not all(abs(a - b) <= 1e-3 * abs(b) for a, b in pairs):
            raise ConfigError(f"{loss}: {name} has another loss or gradients: {pairs}")


def _row(loss: str, name: str, batch: int, measured: dict[str, list[list[Answer]]], options: argparse.Namespace) -> Row:
    times = {key: [max(a["seconds"] for a in found) for found in measured[key]] for key in measured if key != "gemm"}
    rates = [sum(answer["flop_per_second"] for answer in found) for found in measured["gemm"]]
    least = PRODUCTS[loss][name] * 2 * batch**2 * options.width
    share = statistics.median(least / rate / took for rate, took in zip(rates, times[name], strict=True))
    faster = None
    if THEIRS in times:
        faster = statistics.median(a / b for a, b in zip(times[THEIRS], times[name], strict=True))
    embeddings = 2 * batch // options.ranks * options.width * 4
    return {
        "loss": loss,
        "program": name,
        "ranks": options.ranks,
        "threads": options.threads,
        "batch": batch,
        "width": options.width,
        "scale": options.scale,
        "seconds": statistics.median(times[name]),
        "speed_over_open_clip": faster,
        "products": PRODUCTS[loss][name],
        "share_of_gemm": share,
        "embeddings_and_gradients_MiB": 2 * embeddings / 2**20,
        "peak_beside_MiB": statistics.median(max(a["peak"] for a in found) for found in measured[name]) / 2**20,
    }
