"""Saves beside training: what is stored is the state as it was, whatever changes meanwhile; one snapshot, never two."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.checkpoint import saver as saver_module
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.saver import Saver, SaveReport, Votes
from engine.checkpoint.states import state_pieces
from engine.errors import OutputError
from engine.run.step import Stepper
from parallel.checkpoint.read import Reader
from parallel.checkpoint.write import Item, Written, write_file
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.checkpoint.test_layouts import Layout, assembled
from tests.engine.precision.test_scaled import batches_of


class Training:
    """One process, and the saver that goes with it."""

    def __init__(self, kind: str, folder: Path, timeout: float = 600.0) -> None:
        self.a: Assembly = assembled(kind, Layout(1, {"timeout": timeout}), World())
        self.reports: list[SaveReport] = []
        config = CheckpointConfig(async_save=True)
        self.saver = Saver(self.a, folder, config, {"config": {}, "about": {}}, self.reports.append)
        self.stepper = Stepper(self.a)
        self.stepper.before_change = self._before_change
        self.steps = 0
        self.changing = threading.Event()
        take = self.saver.snapshot.take

        def late(items: Sequence[Item]) -> list[Item]:
            self.changing.wait(1.0)  # then training has gone on if nothing holds it
            return take(items)

        self.saver.snapshot.take = late  # type: ignore[method-assign]

    def _before_change(self) -> None:
        self.changing.set()
        self.saver.before_change()

    def step(self, *, bad: bool = False) -> None:
        batches = batches_of(self.stepper, self.steps)
        for batch in batches if bad else ():
            batch.images.fill_(np.nan if self.a.scaler is None else 1e30)
        result = self.stepper.train_step(batches, 1e-2, votes=self.saver.votes)
        assert result.skipped is bad
        self.steps += 1
        self.saver.poll(Votes(*result.votes))

    def save(self) -> dict[str, Tensor]:
        """Returns what must be stored."""
        state = {piece.name: piece.values.clone() for piece in state_pieces(self.a)}
        self.changing.clear()
        self.saver.save(self.steps, {}, {})
        return state


def check(folder: Path, step: int, state: dict[str, Tensor]) -> None:
    with Reader(folder / f"step-{step:08d}") as reader:
        assert reader.manifest.tensors.keys() == state.keys()
        for name, values in state.items():
            assert torch.equal(reader.whole(name).reshape(-1), values), name


@pytest.mark.parametrize("kind", ["adamw, fp8", "adamw, fp16", "muon, bf16"])
def test_the_state_as_it_was(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes at the end of a step (loss scale, fp8 histories, weights, moments, average), at a skipped one, and
    in an evaluation of the average.
    """
    run = Training(kind, tmp_path)
    run.step()
    saved = {run.steps: run.save()}
    run.step()
    saved[run.steps] = run.save()
    memory = run.saver.snapshot.nbytes, run.saver.snapshot._memory.data_ptr()
    run.step(bad=True)
    saved[run.steps] = run.save()
    monkeypatch.setattr(run.stepper, "evaluate", lambda _: (run.changing.set(), time.sleep(0.1), {})[-1])
    run.stepper.evaluate_average([])
    run.step()
    run.saver.finish()
    for step, state in saved.items():
        check(tmp_path, step, state)
    assert any(not torch.equal(values, saved[2][name]) for name, values in saved[1].items())
    assert memory == (run.saver.snapshot.nbytes, run.saver.snapshot._memory.data_ptr())
    assert memory[0] == sum(values.nbytes for values in saved[1].values())  # one copy of what the rank writes
    assert [report.step for report in run.reports] == [1, 2, 3]
    assert all(0 < report.blocked <= report.seconds for report in run.reports)


def test_steps_see_a_save_end(tmp_path: Path) -> None:
    run = Training("adamw, fp16", tmp_path)
    state = run.save()
    while run.saver.newest is None:
        assert run.steps < 1000
        run.step()
    check(tmp_path, 0, state)


def test_a_disk_that_fails_ends_the_run_at_a_later_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training("adamw, fp16", tmp_path)
    state = run.save()
    run.saver.finish()
    run.step()

    def fail(path: Path, *_: object) -> Written:
        path.write_bytes(b"some of it")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(saver_module, "write_file", fail)
    run.save()
    with pytest.raises(OutputError, match=r"step-00000001 .*rank 0: No space left"):
        for _ in range(1000):
            run.step()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]
    check(tmp_path, 0, state)


def test_a_disk_that_writes_is_progress_and_one_that_has_stopped_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Training("adamw, fp16", tmp_path, timeout=1.0)
    where, moves, places = run.a.grid.meter.where, list[int](), set[str]()

    def slow(path: Path, items: list[Item], metadata: dict[str, str], on_disk: Callable[[int], None]) -> Written:
        for wait in (*(0.1 for _ in range(10)), 0.5, 0.5):  # then it has stopped
            on_disk(1 if wait < 0.5 else 0)
            time.sleep(wait)
            moves.append(where.moves)
            places.add(where.place)
        return write_file(path, items, metadata, on_disk)

    monkeypatch.setattr(saver_module, "write_file", slow)
    state = run.save()
    run.changing.set()
    run.saver.finish()
    assert len(set(moves[:10])) >= 5 and moves[10] == moves[11], moves
    assert any("writing a checkpoint, " in place for place in places)
    check(tmp_path, 0, state)


def save_on_slow_disk(world: World, folder: Path, timeout: float) -> int:
    """Rank 1 writes for longer than any collective may take. Returns this rank's moves."""
    a = assembled("adamw, fp16", Layout(2, {"timeout": timeout}), world)

    def slow(path: Path, items: list[Item], metadata: dict[str, str], on_disk: Callable[[int], None]) -> Written:
        until = time.monotonic() + 1.4 * timeout * world.rank
        while time.monotonic() < until:
            time.sleep(0.1)
            on_disk(1)
        return write_file(path, items, metadata, on_disk)

    saver_module.write_file = slow
    before = a.grid.meter.where.moves
    Saver(a, folder, CheckpointConfig(), {"config": {}, "about": {}}).save(1, {}, {})
    a.grid.close()
    return a.grid.meter.where.moves - before


@pytest.mark.slow
def test_ranks_wait_for_a_slow_disk_longer_than_for_each_other(tmp_path: Path) -> None:
    assert min(run_ranks(2, save_on_slow_disk, tmp_path, 5.0)) > 10
    with Reader(tmp_path / "step-00000001") as reader:
        reader.verify()
