"""The part of `python -m tools.benchmark sweep` that finds what is to be measured, has it run, and reports."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from engine.device import processor
from engine.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, ConfigError
from engine.run.agreement import code_version
from engine.run.provenance import commit
from parallel import slurm
from tools.benchmark.bench import read_config
from tools.benchmark.sweep.compare import compare
from tools.benchmark.sweep.file import SweepFile, read_lines
from tools.benchmark.sweep.grid import NOT_MEASURED, PLACES, Layout, Place, Values, layouts_of, read_grid, settings
from tools.benchmark.sweep.ranks import choose_launch
from tools.benchmark.sweep.report import report
from tools.benchmark.sweep.runner import Options, Runner, Side, Stop, about, folder_beside, take_turns
from tools.benchmark.table import Row

_ROOT = Path(__file__).resolve().parents[3]
_WHO = """
import json, os, sys
import tools.benchmark.sweep.run
from engine.run.agreement import code_version
from engine.run.provenance import commit
ours = [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in
        ("tools", "engine", "model", "parallel", "data") and module.__file__]
print(json.dumps({"commit": commit(), "code": code_version(),
                  "elsewhere": [file for file in ours if not file.startswith(os.getcwd() + os.sep)]}))
"""


def sweep(options: Options, flags: Sequence[str]) -> int:
    """Measure all that is missing in the file, then report; returns the exit code.

    Raises:
        ConfigError: an option, the grid or the file is wrong; nothing was started.
    """
    _check(options)
    grid, launch, device_type = read_grid(options.grid), choose_launch(options.launch), _device_type(flags)
    cores = len(os.sched_getaffinity(0))
    place = Place(
        ranks=options.ranks or _job_ranks(grid),
        threads=options.threads or _told_threads(),
        cores=cores if launch is None else None,
        device_type=device_type,
    )
    for name in (name for name in PLACES if getattr(options, name) and name in grid):
        raise ConfigError(f"--{name} and {name} of --grid say the same: leave one out")
    layouts = layouts_of(grid, flags, place)
    identity = _identity(options, flags, grid, place)
    identities = {_ROOT: identity} | ({} if options.against is None else _other(options.against.resolve(), identity))
    _make_place(options)
    with ExitStack() as stack, Stop() as stop:
        sides = _open(options, identities, stack)
        _tell(layouts, flags, cores if launch is None and device_type == "cpu" else None)
        _list_skipped(sides, layouts)
        folder = stack.enter_context(folder_beside(options.json))
        by_steps = len(sides) > 1 and device_type == "cpu"  # a GPU's memory is one program's at a time
        runner = Runner(options=options, launch=launch, folder=folder, stop=stop, by_steps=by_steps)
        take_turns(sides, layouts, runner)
        return _end(options, sides, stop)


def _end(options: Options, sides: Sequence[Side], stop: Stop) -> int:
    lines = [side.file.lines for side in sides]
    report(lines[0], None if stop() else options.picture)
    if stop.signal is not None:
        name = signal.Signals(stop.signal).name
        print(f"sweep: stopped by {name}; the same command goes on from here", file=sys.stderr)
        return 130 if stop.signal == signal.SIGINT else EXIT_STOPPED
    if len(lines) > 1:
        print()
        return compare(lines[1], lines[0], options.tolerance, options.clock)
    return EXIT_DONE if any(line["status"] == "done" for line in lines[0]) else EXIT_FAULT


# -- what is measured, and what it belongs to --------------------------------------------------------------------------


def _check(options: Options) -> None:
    if options.json.suffix.lower() == ".png":
        raise ConfigError(
            f"--json {options.json}: the picture would have this name: give such as {options.json.stem}.jsonl"
        )
    if options.against is None:
        return
    if options.against.resolve() == _ROOT:
        raise ConfigError(f"--against {options.against} is this checkout itself: give another (git worktree add)")
    if options.rounds < 2:
        raise ConfigError("--against needs --rounds 2 or more: what one round shows may be noise")


def _make_place(options: Options) -> None:
    """The folder of the file and of the picture beside it."""
    from tools.figures import check_place  # takes half a second

    try:
        options.json.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json {options.json}: the folder cannot be made: {error.strerror}") from error
    check_place(options.picture)


def _device_type(flags: Sequence[str]) -> str:
    wanted = read_config(flags).device
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _told_threads() -> int | None:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else None


def _job_ranks(grid: Values) -> int:
    if tasks := slurm.tasks_of_job(os.environ):
        return tasks
    if "ranks" not in grid:
        raise ConfigError("sweep needs --ranks N, or ranks=... in the grid")
    return 1


def _identity(options: Options, flags: Sequence[str], grid: Values, place: Place) -> Row:
    """What all lines of a file have in common."""
    return {
        "commit": commit(),
        "code": code_version(),
        "torch": torch.__version__,
        "machine": f"{processor(torch.device('cpu'))}, {len(os.sched_getaffinity(0))} cores, "
        f"{torch.cuda.device_count()} GPUs",
        "config": _hash(settings(read_config(flags))),
        "grid": {name: list(values) for name, values in grid.items()},
        "ranks": place.ranks,
        "threads": place.threads,
        "steps": options.steps,
        "warmup": options.warmup,
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _other(root: Path, own: Row) -> dict[Path, Row]:
    """The identity of another checkout, as its own code tells it."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _WHO]
    try:
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
    except OSError as error:
        raise ConfigError(f"--against {root}: {error.strerror}") from error
    except (subprocess.CalledProcessError, ValueError, IndexError) as error:
        words = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise ConfigError(f"--against {root} has no sweep that can be run: {words}") from error
    if elsewhere := told.pop("elsewhere"):
        raise ConfigError(f"--against {root} is no whole checkout: what would run is {elsewhere[0]}")
    return {root: {**own, **told}}


def _open(options: Options, identities: Mapping[Path, Row], stack: ExitStack) -> list[Side]:
    paths = [options.json, options.json.with_suffix(f".against{options.json.suffix}")][: len(identities)]
    pair = _pair(identities, [] if options.fresh else paths) if len(paths) > 1 else None
    return [
        Side(root=root, file=stack.enter_context(SweepFile(path, {**identity, "pair": pair}, fresh=options.fresh)))
        for (root, identity), path in zip(identities.items(), paths, strict=False)
    ]


def _pair(identities: Mapping[Path, Row], paths: Sequence[Path]) -> str:
    """What two files have in common whose runs take turns, and no other two: by chance, or as one of them has it."""
    who = _hash([*identities.values()])
    found = [line["sweep"]["pair"] for path in paths if path.exists() for line in read_lines(path)[:1]]
    known = [pair for pair in found if pair is not None and pair.startswith(f"{who}-")]
    return known[0] if known else f"{who}-{secrets.token_hex(6)}"


def _tell(layouts: Sequence[Layout], flags: Sequence[str], cores: int | None) -> None:
    fit = [layout for layout in layouts if layout.why is None]
    print(f"sweep: {len(fit)} of {len(layouts)} entries are measured, {len(layouts) - len(fit)} are skipped")
    for flag in (flag for flag in flags if flag.startswith(tuple(f"--{start}" for start in NOT_MEASURED))):
        print(f"sweep: {flag.partition('=')[0]} does nothing here: no step hangs on it")
    for layout in fit:
        if cores is not None and layout.ranks * (layout.threads or 1) > cores:
            print(f"sweep: {layout.name}: {layout.ranks} ranks x {layout.threads} threads share {cores} cores")


def _list_skipped(sides: Sequence[Side], layouts: Sequence[Layout]) -> None:
    for side in sides:
        known = [line["entry"] for line in side.file.lines if line["status"] == "skipped"]
        for layout in layouts:
            if layout.why is not None and layout.entry not in known:
                side.file.append({"status": "skipped", **about(layout), "why": layout.why})
