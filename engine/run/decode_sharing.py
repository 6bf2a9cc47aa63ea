"""Ranks that see the same images decode a portion each (data.portions), and put them together on the device.

Those are the ranks along the tensor and context axes, which ask for the same micro-batches in the same order. What a
micro-batch is of goes round on the host; its images after they were moved, so that of a GPU's link to the host they
take a part as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from data import Batch, Circle, Cut, Relay, put_together
from engine.assembly import Assembly
from engine.config import Config
from model import MicroBatch
from parallel import comm
from parallel.comm import Axis
from parallel.grid import GridShape
from parallel.messages import is_on_host, open_on_host


def decode_sharing(a: Assembly, relay: Relay | None) -> Circle | None:
    """The ranks that share with this one; None: it decodes all for itself. Collective over them.

    Images that later pipeline stages read are theirs alone where they are told of bad samples: by then others know.
    """
    if not shared_by(a.config, a.grid.shape):
        return None
    axis = _axis(a)
    if not a.holds_images or not (relay is None or relay.decides):
        return None
    return _Ranks(axis if is_on_host(axis) else open_on_host(axis))


def shared_by(config: Config, shape: GridShape) -> int:
    """How many ranks share, by a resolved configuration; 0: none do."""
    ranks, asked, micro = shape.tensor * shape.context, config.data.share_decoding, config.train.micro_batch_size
    assert micro is not None
    if asked == "never" or (asked == "auto" and not config.data.reads_files) or ranks == 1:
        return 0
    count = Cut.of(micro, ranks, config.data).count
    return count if count > 1 else 0


def completed(moved: MicroBatch, batch: Batch, a: Assembly) -> MicroBatch:
    """A micro-batch on the device, with the images of all portions. Collective over the ranks that share, if any."""
    if batch.cut is None or moved.images is None:
        return moved
    axis = _axis(a)
    images = comm.all_gather_rows(moved.images, axis)
    return replace(moved, images=put_together(images, axis.size, batch.cut, batch.maps))


def _axis(a: Assembly) -> Axis:
    shape = a.grid.shape
    sizes = {"context": shape.context, "tensor": shape.tensor}
    return a.grid.along(*(name for name, size in sizes.items() if size > 1))


class _Ranks(Circle):
    """Along an axis whose group is on the host."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    @property
    def size(self) -> int:
        """As Circle."""
        return self._axis.size

    @property
    def index(self) -> int:
        """As Circle."""
        return self._axis.index

    def tell(self, own: Any) -> list[Any]:
        """As Circle."""
        return comm.gather_objects(own, self._axis)
