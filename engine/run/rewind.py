"""Files of a run that goes on from a checkpoint are cut back to it: what was written later is of steps that are lost.

Lines and records are in the order of their steps, so that each file is cut at one place. A file is read in order, in
little memory, and cut where it is: a crash leaves it as it was, to be cut again, or cut.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from engine.errors import OutputError

_LONGEST_LINE = 1 << 20  # zeros that a power cut left may go on for gigabytes
_COMPARED = 256  # records
_HEADER, _CHECKSUM = struct.Struct("<QI"), struct.Struct("<I")


class Kept(NamedTuple):
    """Where a file is to end, in bytes, and the last step before that (0: none)."""

    size: int
    step: int


def rewind(path: Path, measure: Callable[[BinaryIO, int], Kept], step: int) -> tuple[Kept, int]:
    """Cut the regular file at `path`: no link is followed. Returns what was kept and how many bytes were cut off.

    Args:
        measure: `whole_lines` or `whole_records`. step: the last that is kept.

    Raises:
        OutputError: it cannot be read or cut.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OutputError(f"{path} is no file: move it elsewhere, and start again")
            kept = measure(file, step)
            if more := os.fstat(file.fileno()).st_size - kept.size:
                os.ftruncate(file.fileno(), kept.size)
                os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"{path} cannot be cut back to step {step}: {error.strerror}") from error
    return kept, more


def whole_lines(file: BinaryIO, step: int) -> Kept:
    """Up to the last line of metrics.jsonl before the first of a later step. Lines that cannot be read are only kept
    between others: the last ones may be the half line of a process that was killed.
    """
    size, kept = 0, Kept(0, 0)
    while line := file.readline(_LONGEST_LINE):
        size += len(line)
        if (found := _step_of(line)) is not None:
            if found > step:
                break
            kept = Kept(size, found)
    return kept


def _step_of(line: bytes) -> int | None:
    try:
        value = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if type(step) is int else None


def whole_records(file: BinaryIO, step: int) -> Kept:
    """Up to the first record of TensorBoard's event file that is of a later step or damaged: nobody can read on after
    that one. Nothing is kept where no curve is: the file then begins anew, with the configuration in force.

    The data's checksums are compared in the last records alone: their Python takes a tenth of a second for a megabyte,
    and what is older had reached the disk before a checkpoint was complete.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    ends = deque([Kept(0, 0)], maxlen=_COMPARED + 1)
    while (data := _record(file)) is not None:
        try:
            found = Event.FromString(data[_HEADER.size : -_CHECKSUM.size]).step
        except DecodeError:
            break
        if found > step:
            break
        ends.append(Kept(file.tell(), found))
    kept = ends.popleft()
    file.seek(kept.size)
    for end in ends:
        if not _is_sound(file.read(end.size - kept.size)):
            break
        kept = end
    return kept if kept.step else Kept(0, 0)


def _record(file: BinaryIO) -> bytes | None:
    """The next: length, checksum of the length, data, checksum of the data. None: no whole one follows."""
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        return None
    length, checksum = _HEADER.unpack(header)
    left = os.fstat(file.fileno()).st_size - file.tell()
    if _masked(header[:8]) != checksum or length + _CHECKSUM.size > left:
        return None
    return header + file.read(length + _CHECKSUM.size)


def _is_sound(record: bytes) -> bool:
    data, checksum = record[_HEADER.size : -_CHECKSUM.size], record[-_CHECKSUM.size :]
    return _CHECKSUM.pack(_masked(data)) == checksum


def _masked(data: bytes) -> int:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    return int(masked_crc32c(data))
