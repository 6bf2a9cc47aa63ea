"""`python -m tools.plot RUN [RUN ...]`: a picture of one run, or of several together, from their metrics.jsonl.

RUN is a run directory, or its metrics.jsonl; the run may be going on. One run is drawn to RUN/plot.png, several to
comparison.png in the folder that all of them are in, with names from what differs in their configurations. So that
`runs/*` can be given again, that name is passed over among RUNs.

Exit codes: 0 done, 2 a RUN has nothing to draw, or the picture cannot be written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from engine.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from tools.plot.names import grouped_by_seed, names_of, read_keys
from tools.plot.panels import PANELS, Traced, trace
from tools.plot.read import locate, read_run

_Given = TypeVar("_Given")
_Found = TypeVar("_Found")
_WIDEST_MEDIAN = 100_000
_COMPARISON = "comparison.png"


class Refusals(Exception):
    """What was asked for cannot be; each argument is a reason of one line."""


def main(argv: Sequence[str]) -> int:
    """Draw and print where. Returns the exit code. Raises Refusals or ConfigError."""
    options = _options(argv)
    files = _each(locate, options.runs)
    if len(set(map(os.path.realpath, files))) < len(files):
        raise ConfigError("a run is given twice: each has one curve")
    folders = [file.parent for file in files]
    configs = _each(read_keys, folders)
    groups = grouped_by_seed(configs) if options.group_seeds else [[i] for i in range(len(files))]

    from tools.figures import check_place, save, style  # matplotlib: half a second

    place = check_place(options.out or _place(folders))
    averaged = {i for group in groups if len(group) > 1 for i in group}
    traced = _each(lambda i: _read(files[i], options, to_average=i in averaged), range(len(files)))

    from tools.plot.draw import Shown, draw, panels_of

    names = names_of(folders, configs, groups)
    shown = [Shown(name=name, runs=[traced[i] for i in group]) for name, group in zip(names, groups, strict=True)]
    for group in shown:
        _tell_shorter(group.name, [run.end for run in group.runs], options.x)
    panels = panels_of(shown, options.panels)
    if missing := [name for name in options.panels or () if name not in panels]:
        raise ConfigError(f"--panels {','.join(missing)}: the metrics have no numbers of that (null, or missing)")
    title = f"{len(files)} runs" if len(files) > 1 else str(folders[0] if folders[0].name else folders[0].resolve())
    with style():
        save(draw(shown, panels, options.x, title=title, logarithmic=options.log), place)
    print(place)
    return EXIT_DONE


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="a run directory, or its metrics.jsonl")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where to draw to")
    parser.add_argument(
        "--x", choices=("steps", "images", "time"), default="steps",
        help="time: of training, without the time between a run's attempts (default: steps)",
    )  # fmt: skip
    parser.add_argument(
        "--panels", type=_panels, metavar="NAME,...",
        help=f"of {', '.join(PANELS)} (default: those that have something to tell)",
    )  # fmt: skip
    parser.add_argument(
        "--smooth", type=_smoothing, metavar="N",
        help="of what is noisy: below 1 the weight of an exponential average, as in TensorBoard, from 2 on the median "
        "of N lines; what it was is shown faintly",
    )  # fmt: skip
    parser.add_argument("--log", action="store_true", help="loss and gradient norm on logarithmic scales")
    parser.add_argument("--from", dest="first", type=_step, default=0, metavar="STEP", help="the first step")
    parser.add_argument("--to", dest="last", type=_step, metavar="STEP", help="the last step")
    parser.add_argument(
        "--group-seeds", action="store_true", help="runs that differ in their seeds alone: their mean, with a band"
    )
    options = parser.parse_args(argv)
    options.runs = [run for run in options.runs if run.name != _COMPARISON]
    if not options.runs:
        parser.error(f"{_COMPARISON} is a picture: give run directories")
    if options.last is not None and options.last < options.first:
        parser.error(f"--from {options.first} is after --to {options.last}")
    return options


def _panels(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in PANELS]:
        raise argparse.ArgumentTypeError(f"there is no {unknown[0]!r}: choose from {', '.join(PANELS)}")
    return list(dict.fromkeys(names))


def _smoothing(text: str) -> float:
    try:
        if 0 < (value := float(text)) < 1 or (value.is_integer() and 2 <= value <= _WIDEST_MEDIAN):
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(
        f"is {text}: it must be a weight between 0 and 1, or a number of lines from 2 to {_WIDEST_MEDIAN}"
    )


def _step(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 15):
        raise argparse.ArgumentTypeError(f"is {text}: it must be a step, 0 or more")
    return int(text)


def _each(function: Callable[[_Given], _Found], items: Iterable[_Given]) -> list[_Found]:
    """What the function gives for each item. Raises Refusals with the reasons of all items that it refuses."""
    found, reasons = [], []
    for item in items:
        try:
            found.append(function(item))
        except ConfigError as error:
            reasons.append(str(error))
    if reasons:
        raise Refusals(*reasons)
    return found


def _place(folders: Sequence[Path]) -> Path:
    if len(folders) == 1:
        return folders[0] / "plot.png"
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    here = Path.cwd()
    return (common.relative_to(here) if common.is_relative_to(here) else common) / _COMPARISON


def _tell_shorter(name: str, ends: Sequence[float], axis: str) -> None:
    """A mean is of what all have: it ends where the first of them does."""
    if min(ends) < max(ends):
        what = "seconds" if axis == "time" else axis
        told = f"the mean of {name} ends after {min(ends):.6g} {what}, where a run ends, of {max(ends):.6g}"
        print(f"tools.plot: warning: {told}", file=sys.stderr)


def _read(file: Path, options: argparse.Namespace, *, to_average: bool) -> Traced:
    """One run at a time: of long ones little stays in memory."""
    run = read_run(file, options.first, options.last)
    if run.damaged:
        which = ", ".join(map(str, run.damaged[:5])) + (" ..." if len(run.damaged) > 5 else "")
        print(f"tools.plot: warning: {file}: {len(run.damaged)} damaged line(s) left out: {which}", file=sys.stderr)
    return trace(run, options.panels or list(PANELS), options.x, options.smooth, to_average=to_average)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (Refusals, ConfigError) as error:
        for reason in error.args:
            print(f"tools.plot: error: {reason}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
