"""Saving a run's state: each rank writes what it alone accounts for, rank 0 makes the whole a checkpoint.

The same steps serve a save that training waits for and one that it does not. A thread of each rank writes its file;
when all have, rank 0 is given what each has written, and a thread of it writes the manifest and renames the folder.
Threads never talk to other ranks: training does, at the end of each step, where the ranks' `votes` are added up with
the loss; so all of them see at the same step that a save is done, or has failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.assembly import Assembly
from engine.checkpoint import folder as folders
from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.snapshot import Snapshot
from engine.checkpoint.states import state_pieces
from engine.errors import OutputError
from parallel import comm
from parallel.checkpoint.manifest import Manifest, StoredPiece, StoredTensor
from parallel.checkpoint.write import Item, Written, in_order, items_of, write_file


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save took.

    Attributes:
        path: of the checkpoint. step: its. bytes: of all files. blocked: seconds that training stood still for it.
        seconds: from its beginning until it was complete. deleted, stuck: steps of older ones that went, or could not.
    """

    path: Path
    step: int
    bytes: int
    blocked: float
    seconds: float
    deleted: Sequence[int]
    stuck: Sequence[int]


class Votes(NamedTuple):
    """What a rank brings to the end of a step: 1 while it still writes, 1 if writing has failed."""

    busy: float
    failed: float


class _Task(threading.Thread):
    """Work beside training; its result or its error is asked for later."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name="checkpoint")
        self._work, self.result, self.error = work, None, None  # type: Callable[[], Any], Any, str | None
        self.start()

    def run(self) -> None:
        try:
            self.result = self._work()
        except OSError as error:
            self.error = _in_words(error)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


@dataclass
class _Save:
    """One that is under way."""

    step: int
    temporary: Path
    facts: Mapping[str, Any]
    began: float = field(default_factory=time.perf_counter)
    blocked: float = 0.0
    committing: bool = False
    bytes: int = 0


class Saver:
    """Saves the state of a run. All methods but `votes` and `before_change` are collective over the world.

    Args:
        assembly: whose state. folder: of all checkpoints, which all ranks see. config: the group of the configuration.
        facts: of the run, for manifests: `config` and `about`. report: told of each save that is complete, on rank 0.

    Raises:
        OutputError: from every method that is collective, on every rank: a save has failed. What was written of it is
            removed; earlier checkpoints are untouched.
    """

    def __init__(
        self,
        assembly: Assembly,
        folder: Path,
        config: CheckpointConfig,
        facts: Mapping[str, Any],
        report: Callable[[SaveReport], None] | None = None,
    ) -> None:
        self.assembly, self.folder, self.config, self._facts, self._report = assembly, folder, config, facts, report
        self.world = assembly.grid.world
        self.snapshot = Snapshot()
        self.newest: int | None = None
        self._save: _Save | None = None
        self._task: _Task | None = None
        self._copied: threading.Event | None = None
        self._bytes = 0  # that this rank has written of the save that is under way

    # -- around a step -------------------------------------------------------------------------------------------------

    def votes(self) -> Votes:
        """This rank's, for the sum over ranks that `poll` is given."""
        task = self._task
        if task is None:
            return Votes(0.0, 0.0)
        return Votes(float(task.is_alive()), float(not task.is_alive() and task.error is not None))

    def poll(self, total: Votes) -> None:
        """At the end of a step: go on with a save that is under way, as far as it can without waiting."""
        if self._save is not None and (total.failed or not total.busy):
            self._advance(well=not total.failed)

    def before_change(self) -> None:
        """The state is about to change: return when what is being saved has been copied."""
        if self._copied is not None and self._save is not None:
            began = time.perf_counter()
            self._copied.wait()
            self._save.blocked += time.perf_counter() - began
            self._copied = None

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(self, step: int, progress: Mapping[str, Any], evaluation: Mapping[str, float]) -> None:
        """Save the state as it is. With `async_save` the rest happens later, else it is complete on return.

        Args:
            step: steps done. progress, evaluation: for the manifest, see there.
        """
        began = time.perf_counter()
        self.finish()
        facts = {**self._facts, "progress": dict(progress), "evaluation": dict(evaluation)}
        temporary = folders.temporary_path(self.folder, step)
        error = None
        if self.world.index == 0:
            try:
                folders.begin(self.folder, step)
            except OSError as problem:
                error = _in_words(problem)
        self._raise_if_any(error, temporary)  # and nobody writes before the folder is there
        self._save, self._bytes = _Save(step, temporary, facts, began), 0
        self._begin_to_write(in_order(items_of(state_pieces(self.assembly))))
        self._save.blocked = time.perf_counter() - began
        if not self.config.async_save:
            self.finish()

    def _begin_to_write(self, items: list[Item]) -> None:
        assert self._save is not None
        path = self._save.temporary / f"rank-{self.world.index:05d}.safetensors"
        metadata = {"step": str(self._save.step), "rank": str(self.world.index), "format": "vitruvius"}
        if not self.config.async_save:
            self._task = _Task(lambda: write_file(path, items, metadata, self._count))
            return
        copied = self._copied = threading.Event()
        self.snapshot.begin(self.assembly.device)

        def copy_and_write() -> Written:
            try:
                copies = self.snapshot.take(items)
            finally:
                copied.set()
            return write_file(path, copies, metadata, self._count)

        self._task = _Task(copy_and_write)

    def finish(self) -> None:
        """Return when no save is under way."""
        while self._save is not None:
            self._advance()

    def _count(self, count: int) -> None:
        self._bytes += count  # by several threads: one may be lost, but that there are more is seen

    def _wait(self) -> None:
        """Return when the tasks of all ranks have ended. Collective.

        Ranks meet now and then as long as all that still write get on, so that a slow disk is not taken for a run that
        hangs, here or on ranks that have written; one whose disk has stopped stays away, and is.
        """
        where, interval = self.assembly.grid.meter.where, min(1.0, self.assembly.grid.timeout / 20)
        busy = True
        while busy:
            before = self._bytes
            if self._task is not None:
                self._task.join(interval)
                while self._task.is_alive() and self._bytes == before:
                    self._task.join(interval)
            own = self._task is not None and self._task.is_alive()
            where.now(f"writing a checkpoint, {self._bytes / 1e9:.3g} GB so far" if own else None)
            busy = any(comm.gather_objects(own, self.world))

    def _advance(self, *, well: bool = False) -> None:
        """All ranks' tasks have ended, or one has failed: the next stage. well: no rank's has, as votes have told."""
        save, task = self._save, self._task
        assert save is not None
        began = time.perf_counter()
        if not well:
            self._wait()
            self._raise_if_any(task.error if task is not None else None, save.temporary)
        save.blocked, began = save.blocked + time.perf_counter() - began, time.perf_counter()
        if save.committing:
            self._end(save, task)
            return
        written = comm.gather_objects_to_first(task.result if task is not None else None, self.world)
        self._task, self._copied, save.committing = None, None, True
        if written is not None:
            manifest = _manifest(save, written)
            save.bytes = manifest.bytes
            self._task = _Task(lambda: self._complete(save.temporary, manifest))
        save.blocked += time.perf_counter() - began

    def _complete(self, temporary: Path, manifest: Manifest) -> tuple[Path, tuple[list[int], list[int]]]:
        path = folders.commit(temporary, manifest)
        return path, folders.prune(self.folder, self.config)

    def _end(self, save: _Save, task: _Task | None) -> None:
        self._save, self._task, self.newest = None, None, save.step
        if task is not None and self._report is not None:
            path, (deleted, stuck) = task.result
            seconds = time.perf_counter() - save.began
            self._report(
                SaveReport(
                    path=path,
                    step=save.step,
                    bytes=save.bytes,
                    blocked=save.blocked,
                    seconds=seconds,
                    deleted=deleted,
                    stuck=stuck,
                )
            )

    def _raise_if_any(self, error: str | None, temporary: Path) -> None:
        """Raise OutputError on every rank if there is an error on one."""
        found = comm.gather_objects(error, self.world)
        if not any(found):
            return
        self._save = self._task = self._copied = None
        rank = next(rank for rank, problem in enumerate(found) if problem)
        if self.world.index == 0:
            folders.discard(temporary)
        raise OutputError(
            f"checkpoint {folders.final_path(temporary).name} cannot be written to {self.folder}: rank {rank}: "
            f"{found[rank]}. Earlier ones are complete: make room, or see to the disk, and start again to go on"
        )


def _in_words(error: OSError) -> str:
    """What it is, and of which file."""
    what = error.strerror or str(error) or type(error).__name__
    return what + (f" ({error.filename})" if error.filename else "")


def _manifest(save: _Save, written: Sequence[Written]) -> Manifest:
    pieces: dict[str, list[StoredPiece]] = {}
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for number, rank in enumerate(written):
        for name, dtype, shape, box, start, sums in rank.entries:
            pieces.setdefault(name, []).append(StoredPiece(number, box, start, sums))
            kinds[name] = dtype, shape
    tensors = {name: StoredTensor(*kinds[name], tuple(found)) for name, found in pieces.items()}
    return Manifest(step=save.step, files=tuple(rank.file for rank in written), tensors=tensors, **save.facts)
