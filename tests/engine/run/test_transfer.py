"""How micro-batches come to the device: on a GPU by a stream of its own, in order with what computes."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data import Batch, DataConfig, EvalStream
from data.datasets import SyntheticDataset
from engine.assemble import assemble
from engine.assembly import Assembly
from engine.run.transfer import AHEAD, InPlace, SideStream, transfer_to
from model import MicroBatch
from parallel.grid import make_grid
from parallel.process_group import World
from tests.engine.small import small


def batches(count: int) -> list[Batch]:
    images = SyntheticDataset(first=0, size=8 * count, image_shape=(1, 8, 8), num_classes=10, seed=0)
    return [*EvalStream(images, config=DataConfig(), micro_batch_size=8, data_rank=0, data_size=1)]


def assembly_on(device: torch.device) -> Assembly:
    config = small().resolve(1)
    return assemble(config, make_grid(config.grid_shape(1), World(), device), device)


def moved(batch: Batch) -> MicroBatch:
    """In the memory where it is."""
    own = {name: getattr(batch, name) for name in ("images", "labels", "sample_ids", "weights")}
    return MicroBatch(**own, teachers=({"rows": batch.weights},))


class Recorded:
    """What is done by torch.cuda's interface, in words; copies and kernels are done when an event is waited for."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stream(self, name: str) -> Any:
        def record_event(event: Any = None) -> Any:
            self.said.append(f"{name} notes")
            event = event or self.event()
            event.of = name
            return event

        def wait_event(event: Any) -> None:
            self.said.append(f"{name} waits for {event.of}")

        return SimpleNamespace(name=name, record_event=record_event, wait_event=wait_event)

    def event(self, enable_timing: bool = False) -> Any:
        return SimpleNamespace(
            synchronize=lambda: self.said.append("host waits"), query=lambda: True, elapsed_time=lambda other: 3.0
        )

    @contextmanager
    def on(self, stream: Any) -> Any:
        self.said.append(f"on {stream.name}")
        yield
        self.said.append("on compute")


def test_copies_are_ordered_by_events_and_the_host_stays_near(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, pinned = Recorded(), list[int]()
    compute = cuda.stream("compute")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: cuda.stream("side"))
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", cuda.on)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: x.dtype == torch.float32)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x.shape[0]) or x)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: cuda.said.append(f"kept for {stream.name}"))
    side = SideStream(torch.device("cuda"))
    for n, batch in enumerate(batches(AHEAD + 1)):
        pinned.clear()
        cuda.said.clear()
        assert side.move(batch, moved).images is batch.images
        assert len(pinned) == 3  # labels, ids and indices; images and weights were
        assert cuda.said == [
            *["host waits"] * (n == AHEAD), "compute notes", "on side", "side notes", "on compute",
            "compute notes", "compute waits for side", "compute notes", *["kept for compute"] * 5,
        ]  # fmt: skip
    assert side.late() == pytest.approx(0.003 * (AHEAD + 1)) and side.late() == 0.0


def test_on_a_cpu_nothing_is_done() -> None:
    transfer, (batch,) = transfer_to(torch.device("cpu")), batches(1)
    assert isinstance(transfer, InPlace) and transfer.late() == 0.0
    assembly = assembly_on(torch.device("cpu"))
    assert transfer.move(batch, partial(assembly.to_device, training=True)).images is batch.images


@pytest.mark.gpu
def test_a_micro_batch_arrives_while_the_gpu_computes() -> None:
    """And what it is of is not overwritten by the copies after it, before it was read."""
    device = torch.device("cuda")
    side, sums, own = SideStream(device), list[torch.Tensor](), batches(6)
    assembly = assembly_on(device)
    for batch in own[:AHEAD]:
        torch.cuda._sleep(200_000_000)  # a tenth of a second, in cycles
        arrived = side.move(batch, partial(assembly.to_device, training=True))
        side.stream.synchronize()
        assert not torch.cuda.current_stream(device).query(), "the copy has waited for what computes"
        assert arrived.images is not None
        sums.append(arrived.images.double().sum())
    for batch in own[AHEAD:]:
        torch.cuda._sleep(20_000_000)
        arrived = side.move(batch, partial(assembly.to_device, training=True))
        assert arrived.images is not None
        sums.append(arrived.images.double().sum())
        del arrived
    expected = [batch.images.double().sum().item() for batch in own if batch.images is not None]
    assert [x.item() for x in sums] == pytest.approx(expected, rel=1e-12)
    torch.cuda.synchronize(device)
    assert 0 <= side.late() < 1
