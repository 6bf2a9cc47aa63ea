"""The command line of tools.teacher_outputs: its own options, and the configuration of the student's run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import Config
from engine.config.cli import parse
from engine.config.distillation import TeacherConfig
from engine.config.objective_keys import check_objective
from engine.config.teachers import teachers_of
from engine.errors import ConfigError
from engine.recompute.config import RecomputeConfig
from engine.teacher_outputs.meta import is_outputs
from model import Teacher
from parallel.process_group import World
from tools.evaluate.source import values_of
from tools.options import COUNT, Parser, number

PROGRAM = "tools.teacher_outputs"
ROWS_PER_FILE, FILE_BYTES = 8192, 2**28
_MICRO_BATCH = 64
_OF_RANKS = ("parallel.", "device", "train.micro_batch_size")  # flags that are of these ranks, not of the run


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        run: the student's configuration, its model resolved. config: of the teacher's forward on these ranks, resolved.
        given, teacher: the teacher, as the configuration has him, and as he is shown the student's images.
    """

    options: argparse.Namespace
    run: Config
    config: Config
    given: TeacherConfig
    teacher: Teacher


def request_of(argv: Sequence[str], world: World) -> Request:
    """By the same code on every rank, before they talk.

    Raises:
        ConfigError: it is no configuration of a student, the teacher cannot be run so, an option is none.
    """
    options, rest = make_parser().parse_known_args(argv)
    run, _ = parse(rest, PROGRAM)
    check_objective(run)
    if run.objective != "distillation":
        raise ConfigError(f"objective is {run.objective}: give the configuration of a run with objective distillation")
    if (run.train.steps is None) == (run.train.epochs is None):
        raise ConfigError("give either train.steps or train.epochs of the run: how many draws there are hangs on it")
    try:
        run = replace(run, model=run.model.resolve())
    except ValueError as error:
        raise ConfigError(str(error)) from error
    known = run.distillation.all_teachers
    if not 0 <= options.teacher < len(known):
        raise ConfigError(f"--teacher is {options.teacher}: give 0 to {len(known) - 1}, of the teachers in their order")
    given = known[options.teacher]
    if is_outputs(given.path):
        raise ConfigError(f"the teacher {given.path} is stored outputs already: give a checkpoint or another --teacher")
    teacher = teachers_of(run)[sum(not is_outputs(of.path) for of in known[: options.teacher])]
    if (classes := teacher.model.sizes.classes) != (own := run.model.sizes.classes):
        raise ConfigError(
            f"the teacher {given.path} does not tell the {own} classes of the student, and outputs are of logits: take "
            "another teacher, or this one beside the student"
        )
    if options.top_k is not None and options.top_k > classes:
        raise ConfigError(f"--top-k is {options.top_k}, and the teacher has {classes} classes: leave it out for all")
    if strange := [n for n in options.blocks if not 0 <= n < teacher.model.sizes.depth]:
        raise ConfigError(
            f"--blocks has {strange[0]}, and the teacher {given.path} has blocks 0 to {teacher.model.sizes.depth - 1}"
        )
    options.blocks = sorted(set(options.blocks))
    return Request(options, run, _on_these_ranks(run, rest, teacher, world), given, teacher)


def _on_these_ranks(run: Config, flags: Sequence[str], teacher: Teacher, world: World) -> Config:
    """The teacher's model as that of a configuration, in the layout that flags say, with batches that it can have."""
    of_ranks = (f"--{key}={value}" for key, value in values_of(flags).items() if key.startswith(_OF_RANKS))
    own, _ = parse([*of_ranks], PROGRAM)
    micro = own.train.micro_batch_size or _MICRO_BATCH
    config = Config(
        model=teacher.model, data=replace(run.data, labels_per_class=None), parallel=own.parallel,
        train=replace(run.train, freeze=()),
        precision=run.precision, recompute=RecomputeConfig(), kernels=run.kernels, device=own.device,
    )  # fmt: skip
    shape = config.grid_shape(world.size)
    batch = micro * shape.data * config.pipeline(shape).pieces  # a step's, of which there will be none
    train = replace(config.train, micro_batch_size=micro, global_batch_size=batch, steps=1, epochs=None)
    return replace(config, train=train).resolve(world.size)


def make_parser() -> argparse.ArgumentParser:
    """Of the options; all else is left over."""
    parser = Parser(
        prog=PROGRAM,
        description="Write what a teacher makes of every image that a student's run will draw, so that the run needs "
        "no teacher: give the run's configuration (--config, and flags of its keys) with the teacher's checkpoint. "
        "What is there already is kept, so the same command goes on after an end, and writes more of a longer run.",
        epilog="parallel keys, device and train.micro_batch_size are of the ranks that write, as flags alone say.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the outputs; made if missing")
    parser.add_argument(
        "--top-k", type=number(COUNT), metavar="K",
        help="keep the K likeliest classes of each image, and the mass of all others at distillation.temperature "
        "(default: all classes)",
    )  # fmt: skip
    parser.add_argument("--features", action="store_true", help="keep the pooled features before the classifier, too")
    parser.add_argument(
        "--blocks", type=int, nargs="+", default=[], metavar="N",
        help="keep the features of the patches of these blocks, from 0, too (of features_weight and relations gram)",
    )  # fmt: skip
    parser.add_argument(
        "--number-format", choices=("fp32", "fp16"), default="fp32", help="of logits and features (default: fp32)"
    )
    parser.add_argument("--teacher", type=int, default=0, metavar="N", help="which of several, from 0 (default: 0)")
    parser.add_argument(
        "--rows-per-file", type=number(COUNT),
        help=f"of a new folder (default: {ROWS_PER_FILE}, of long rows as many as {FILE_BYTES >> 20} MiB have); what "
        "is written at once",
    )  # fmt: skip
    return parser
