"""TensorBoard's event file, written at once and by this process alone.

torch's SummaryWriter writes from a thread, which on a full disk ends with a page of its own, and goes on writing into a
file that was deleted. Here an event is appended to a `Journal`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.run.journal import Journal

EVENTS = "events.out.tfevents.*"


class Board:
    """One event file.

    Args:
        folder: where it goes. say: tells the user one line.
        goes_on: with the newest file of the folder, if there is one.

    Attributes:
        is_new: whether the file tells nothing yet.
    """

    def __init__(self, folder: Path, say: Callable[[str], None], *, goes_on: bool = False) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # a second of imports, on rank 0 alone
        from tensorboard.summary.writer.record_writer import RecordWriter

        path = folder / f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        if goes_on:
            path = max(folder.glob(EVENTS), default=path)  # names begin with the time, as TensorBoard sorts them
        self._journal = Journal(path, say, goes_on=goes_on)
        self.is_new = path.stat().st_size == 0
        self._event, self._records = Event, RecordWriter(self._journal)
        if self.is_new:
            self._write(file_version="brain.Event:2")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """A point in each curve."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard.summary import scalar

        together = Summary()
        for name, value in values.items():
            together.MergeFrom(scalar(name, value))
        self._write(step=step, summary=together)

    def picture(self, name: str, step: int, png: bytes) -> None:
        """A picture of this step."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        high, wide = (int.from_bytes(png[place : place + 4], "big") for place in (20, 16))  # of its header
        image = Summary.Image(height=high, width=wide, colorspace=3, encoded_image_string=png)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def text(self, name: str, text: str) -> None:
        """A page of markdown."""
        from torch.utils.tensorboard.summary import text as page

        self._write(step=0, summary=page(name, text))

    def hyperparameters(self, values: Mapping[str, Any], curves: Sequence[str]) -> None:
        """What the run was given, and the curves that TensorBoard's page of hyperparameters compares runs by."""
        from torch.utils.tensorboard.summary import hparams

        kinds = (bool, int, float, str)
        plain = {name: value if isinstance(value, kinds) else str(value) for name, value in values.items()}
        for summary in hparams(plain, dict.fromkeys(curves, 0.0)):
            self._write(summary=summary)

    def sync(self) -> None:
        """As of `Journal`."""
        self._journal.sync()

    def close(self) -> None:
        """Raises OutputError if events are missing."""
        self._journal.close()

    def _write(self, **event: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
