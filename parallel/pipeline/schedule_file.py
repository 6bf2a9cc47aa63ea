"""Schedules as CSV files: one row per rank, actions in the printed notation, as people and spreadsheets write them.

Lines end as anywhere (LF, CR LF or CR). Cells are parted by commas, or by semicolons where a file has no comma, or by
tabs where it has neither; empty ones are allowed anywhere, so that columns can be moments. A stage is held by the rank
in whose row it stands. Sends and receives may be left out, all of them: then they are inserted.
The notation is that of `torch.distributed.pipelining`, whose files of F, B, I and W can be read.
"""

from __future__ import annotations

import re
import stat
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from parallel.pipeline.actions import Action, Place, Schedule, ScheduleError
from parallel.pipeline.communication import insert_communication
from parallel.pipeline.validation import validate, validate_compute_order

_MAX_BYTES = 64 * 2**20  # 1,000 ranks with 2,000 micro-batches take 50 MB of forwards and backwards
_LONGEST_ACTION = 40
_SEPARATORS = ",;\t"
_LINE_BREAK = re.compile(r"\r\n|\r|\n")  # str.splitlines knows many more


def is_schedule_file(name: str) -> bool:
    """Whether the name of a schedule is the path of a file."""
    return name.lower().endswith(".csv")


def read_schedule(
    path: str, num_ranks: int | None, num_micro_batches: int | None, virtual_stages: int | None = None
) -> Schedule:
    """The schedule of a file, validated, with its communication.

    Args:
        num_ranks, num_micro_batches, virtual_stages: what the run has; None: any number, of stages on each rank.

    Raises:
        ScheduleError: the file cannot be read, does not fit the run, or is wrong; the message names the rank (the first
            row is that of rank 0), the cell (from 1), and what is wrong there.
    """
    rows, cells = _parse(path, _read(path))
    if num_ranks not in (None, len(rows)):
        raise ScheduleError(
            f"parallel.schedule {path} has {len(rows)} row{'s' * (len(rows) != 1)}, one per rank, but "
            f"parallel.pipeline_parallel_size is {num_ranks}: they must be equal (rows of empty cells count)"
        )
    try:
        schedule = _schedule(path, rows, num_micro_batches)
        _check_held(schedule, virtual_stages)
        return _completed(schedule)
    except ScheduleError as error:
        place = error.place
        where = "" if place is None else f"rank {place.rank}, cell {cells[place.rank][place.position]}: "
        raise ScheduleError(f"parallel.schedule {path}: {where}{error.why}") from None


def to_csv(schedule: Schedule) -> str:
    """The text of a file from which `read_schedule` makes that schedule."""
    return "".join(",".join(map(str, program)) + "\n" for program in schedule.ranks)


def fingerprint(name: str) -> str:
    """What is the same wherever a schedule of that name is the same one: the name, of a file a hash of what it says.

    Raises:
        ScheduleError: the file cannot be read.
    """
    return blake2b(_read(name).encode(), digest_size=8).hexdigest() if is_schedule_file(name) else name


def _read(path: str) -> str:
    """The text of a file, if it is one, and of a size that can be."""
    try:
        file = Path(path).expanduser()
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise ScheduleError(f"parallel.schedule {path} is a folder or device: give a CSV file")
        if status.st_size > _MAX_BYTES:
            raise ScheduleError(
                f"parallel.schedule {path} has {status.st_size} bytes: schedules have at most {_MAX_BYTES}"
            )
        return file.read_bytes().decode("utf-8-sig")
    except ScheduleError:
        raise
    except UnicodeDecodeError:
        raise ScheduleError(f"parallel.schedule {path} is no text in UTF-8: save it as CSV in UTF-8") from None
    except (OSError, ValueError, RuntimeError) as error:  # no such file, no such path, no such home
        why = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(f"parallel.schedule {path} cannot be read: {why}") from None


def _parse(path: str, text: str) -> tuple[list[tuple[Action, ...]], list[list[int]]]:
    """The actions of each row, and the number of each one's cell, from 1; blank lines at the end are left out."""
    separator = next((mark for mark in _SEPARATORS if mark in text), _SEPARATORS[0])
    cell, text = re.compile(f"[^{separator}]+"), text.rstrip(" \t\r\n".replace(separator, ""))
    rows, cells = [], []
    for rank, line in enumerate(_LINE_BREAK.split(text) if text else ()):
        row, numbers, number, end = [], [], 1, 0
        for match in cell.finditer(line):
            number += match.start() - end
            end = match.end()
            word = match[0].strip(' \t"')
            if not word:
                continue
            try:
                row.append(Action.parse(word if len(word) <= _LONGEST_ACTION else f"{word[:_LONGEST_ACTION]}..."))
            except ValueError as error:
                raise ScheduleError(f"parallel.schedule {path}: rank {rank}, cell {number}: {error}") from None
            numbers.append(number)
        rows.append(tuple(row))
        cells.append(numbers)
    return rows, cells


def _schedule(path: str, rows: Sequence[tuple[Action, ...]], num_micro_batches: int | None) -> Schedule:
    """The schedule of these rows; raises ScheduleError where stages or micro-batches are not those of a schedule."""
    holders: dict[int, Counter[int]] = {}  # per stage: actions in each row
    largest = (-1, Place(0, 0))
    for rank, row in enumerate(rows):
        for position, action in enumerate(row):
            holders.setdefault(action.stage, Counter())[rank] += 1
            if action.micro_batch is None:
                raise ScheduleError(f"{action}: give F, R, B, I, W and their messages alone", Place(rank, position))
            largest = max(largest, (action.micro_batch, Place(rank, position)), key=lambda pair: pair[0])
    last, place = largest
    if num_micro_batches is None:
        num_micro_batches = last + 1
        if num_micro_batches > (count := max(map(len, rows), default=0)):
            raise ScheduleError(
                f"no row has a forward of each micro-batch up to {last}: the longest has {count} actions", place
            )
    if last != num_micro_batches - 1:
        raise ScheduleError(
            f"{rows[place.rank][place.position]} is of the last of {last + 1} micro-batches in this file, but a step "
            f"of this run has {num_micro_batches}: they must be equal",
            place,
        )
    missing = next(stage for stage in range(len(holders) + 1) if stage not in holders)
    if missing != len(holders):
        raise ScheduleError(f"stage {missing} is in no row, but stage {max(holders)} is")
    placement = tuple(holders[stage].most_common(1)[0][0] for stage in range(len(holders)))
    idle = next((rank for rank in range(len(rows)) if rank not in placement), None)
    if idle is not None:
        raise ScheduleError(f"rank {idle} holds no stage: each row needs one")
    return Schedule(
        name=path,
        num_stages=len(placement),
        num_micro_batches=num_micro_batches,
        stage_to_rank=placement,
        ranks=tuple(rows),
    )


def _check_held(schedule: Schedule, virtual_stages: int | None) -> None:
    for rank in range(schedule.num_ranks):
        held = len(schedule.stages_of(rank))
        if virtual_stages not in (None, held):
            raise ScheduleError(
                f"rank {rank} holds {held} of the stages, but parallel.virtual_stages is {virtual_stages}: leave it out"
            )


def _completed(schedule: Schedule) -> Schedule:
    """The schedule, validated as it is written, so that what is wrong has its place in the file; with messages."""
    has_messages = any(action.kind.is_message for row in schedule.ranks for action in row)
    (validate if has_messages else validate_compute_order)(schedule)
    if schedule.is_forward_only:
        raise ScheduleError("no stage has a backward (B, or I and W), and training needs them")
    if not has_messages:
        schedule = insert_communication(schedule)
        validate(schedule)
    return schedule
