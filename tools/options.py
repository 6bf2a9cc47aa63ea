"""Options that several commands take alike: numbers within limits, lists of values, schedules, files to write."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from engine.errors import ConfigError
from parallel.pipeline.costs import LIMITS, Limit
from parallel.pipeline.schedules import SCHEDULES
from parallel.process_group import read_world
from tools.places import check_place

COUNT = Limit(1, 1_000_000, is_whole=True)
"""Of ranks, micro-batches, stages and repetitions."""
_OWN_WORDS = {
    "parallel.pipeline_parallel_size": "--ranks",
    "parallel.schedule_policy": "--policy",
    "parallel.schedule": "--schedule",
    "parallel.virtual_stages": "--virtual-stages",
    "leave virtual_stages out": "leave that out",
}


class Parser(argparse.ArgumentParser):
    """Raises ConfigError for what is no option or has a wrong value, so that it is said once, however many ranks."""

    def error(self, message: str) -> NoReturn:
        """As ArgumentParser, which would print and exit."""
        raise ConfigError(message)


def number(limit: Limit) -> Callable[[str], Any]:
    """The type of an option that takes one number."""

    def read(text: str) -> Any:
        try:
            value = int(text) if limit.is_whole else float(text)
        except ValueError:
            value = None
        if value not in limit:
            raise argparse.ArgumentTypeError(f"{text} is not {limit}")
        return value

    return read


def cost(field: str) -> Callable[[str], Any]:
    """The type of an option that is a field of `Costs`."""
    return number(LIMITS[field])


def several(of: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of an option that takes one or several values: 4,8."""

    def read(text: str) -> list[Any]:
        return [of(part.strip()) for part in text.split(",")]

    return read


def virtual_stages_of_each(names: Sequence[str], given: int | None) -> dict[str, int | None]:
    """What `--virtual-stages` asks of each schedule: those that can hold any number of stages per rank follow it.

    Raises:
        ConfigError: it is given, and there is none that it could change.
    """
    known = [SCHEDULES[name] for name in names if name in SCHEDULES]
    if given is not None and not any(not s.is_fixed or s.virtual_stages == given for s in known):
        free = ", ".join(name for name, schedule in SCHEDULES.items() if not schedule.is_fixed)
        raise ConfigError(
            f"--virtual-stages {given} has no effect on {', '.join(names)}, whose number of stages per rank is fixed: "
            f"leave it out, or choose --schedule {free}"
        )
    return {name: given if name in SCHEDULES and not SCHEDULES[name].is_fixed else None for name in names}


@contextmanager
def refusing() -> Iterator[None]:
    """What a pipeline cannot be becomes a ConfigError that speaks of the command's flags."""
    try:
        yield
    except ValueError as error:  # a ScheduleError is one
        text = str(error)
        for key, flag in _OWN_WORDS.items():
            text = text.replace(key, flag)
        raise ConfigError(text) from error


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option `--weights`: which of a checkpoint's."""
    parser.add_argument(
        "--weights", choices=("weights", "average"), default="weights", help="their moving average, if the run kept one"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option `--json` of a benchmark, refused where the first rank could not write there."""

    def read(text: str) -> str:
        try:
            if read_world().rank == 0:
                check_place(Path(text))
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    parser.add_argument("--json", metavar="FILE", type=read, help="also write the rows to this file")
