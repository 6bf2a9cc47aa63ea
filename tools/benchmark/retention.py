r"""`python -m tools.benchmark retention`: what students keep of their teacher's accuracy, on digits or textures.

A teacher (configs/digits.yaml, configs/textures_teacher.yaml), then students of a fifth and a twentieth of its weights
(configs/digits_distillation.yaml, configs/textures_distillation.yaml), each from scratch, or with the teacher's
response, also his features, also his relations, or all three. Students are told: all labels; few_labels, of 10 images
of each class, all others being shown to the teacher alone; few_images, there being no images but these 10 of each
class. Over seeds, each with a teacher of its own and, of digits, a held-out fold of its own.

    OMP_NUM_THREADS=1 python -m tools.benchmark retention --on digits --seeds 0 1 2 3 4 --out runs/retention

What is done is kept in the folder, so the same command goes on where it was stopped; --only-show prints what there is.
Other options are those of pretrain_vit.py, for all students. Intervals are of 95 % (Student's t over seeds), and
differences are of the same seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EXIT_DONE
from parallel.pipeline.costs import Limit
from parallel.process_group import World
from tools.benchmark.retention_runs import LABELS, STUDENTS, SUBJECTS, WAYS, Run, Series, runs_of
from tools.benchmark.table import Row, show_markdown
from tools.options import COUNT, Parser, add_json, number

LEVEL = 0.95
_BASES = ("scratch", "response")  # that other ways are compared with


def main(argv: Sequence[str], world: World) -> int:
    """Train what is not done, and print a row for the teacher and each kind of student. Returns the exit code."""
    options, flags = _options(argv)
    series = Series(options.out, on=options.on, steps=options.steps, flags=flags)
    runs = list(runs_of(options.seeds, options.students, options.labels, options.ways))
    for count, run in enumerate(runs, 1):
        if options.only_show or series.done(run) is not None:
            continue
        began = time.monotonic()
        if code := series.train(run, world):
            return code
        done = series.done(run)
        assert done is not None
        what = f"seed {run.seed} {run.student} {run.labels} {run.way}"
        print(f"{count}/{len(runs)} {what}: {done.accuracy:.4f}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    rows = rows_of(runs, {run: done.accuracy for run in runs if (done := series.done(run)) is not None})
    if rows:
        show_markdown([_in_words(row) for row in rows])
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return EXIT_DONE


def rows_of(runs: Sequence[Run], accuracies: dict[Run, float]) -> list[Row]:
    """A row for each kind of run of which some are done. In percent, each mean with half its interval, `_ci`."""
    rows = []
    for kind in dict.fromkeys(_with_seed(run, 0) for run in runs):
        own = {run.seed: accuracies[run] for run in runs if _with_seed(run, 0) == kind and run in accuracies}
        if not own:
            continue
        row: Row = {"student": kind.student, "labels": kind.labels, "way": kind.way, "seeds": len(own)}
        row |= _mean("accuracy_percent", [100 * one for one in own.values()])
        teachers = {seed: accuracies.get(Run(seed=seed)) for seed in own}
        kept = [100 * own[seed] / of for seed, of in teachers.items() if of]
        row |= _mean("retention_percent", kept if kind != Run(seed=0) else [])
        for base in _BASES:
            others = {seed: accuracies.get(_with_seed(kind, seed, base)) for seed in own}
            more = [100 * (own[seed] - of) for seed, of in others.items() if of is not None]
            row |= _mean(f"points_over_{base}", more if base != kind.way else [])
        rows.append(row)
    return rows


def _with_seed(run: Run, seed: int, way: str | None = None) -> Run:
    return Run(seed=seed, student=run.student, labels=run.labels, way=way or run.way)


def _mean(name: str, values: Sequence[float]) -> Row:
    return {name: statistics.fmean(values) if values else None, f"{name}_ci": half_interval(values)}


def half_interval(values: Sequence[float]) -> float | None:
    """Half the confidence interval of a mean of values that are normally distributed; None of fewer than two."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # takes a second

    return float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def _in_words(row: Row) -> Row:
    """Means and intervals as one text."""
    words: Row = {name: row[name] for name in ("student", "labels", "way", "seeds")}
    for name in ("accuracy_percent", "retention_percent", *(f"points_over_{base}" for base in _BASES)):
        mean, half = row[name], row[f"{name}_ci"]
        text = None if mean is None else f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"
        words[name.replace("_", " ")] = text
    return words


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser(
        prog="tools.benchmark retention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/retention"), help="folder (default runs/retention)")
    parser.add_argument("--on", choices=list(SUBJECTS), default="digits", help="images (default digits)")
    parser.add_argument("--seeds", type=number(Limit(0, 2**31, True)), nargs="+", default=[0, 1, 2, 3, 4])
    for name, known in (("students", STUDENTS), ("labels", LABELS), ("ways", WAYS)):
        parser.add_argument(f"--{name}", choices=list(known), nargs="+", default=list(known))
    parser.add_argument("--steps", type=number(COUNT), help="of every run (default: as the recipes have it)")
    parser.add_argument("--only-show", action="store_true", help="train nothing, print what is done")
    add_json(parser)
    return parser.parse_known_args(argv)
