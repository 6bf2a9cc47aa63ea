"""When a run saves, what it says of it, and that it can: the folder is checked before the first step is taken."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data import Dataset, captions_fingerprint, order_of
from engine.assembly import Assembly
from engine.checkpoint import folder as folders
from engine.checkpoint.saver import Saver, SaveReport, Votes
from engine.checkpoint.states import state_pieces
from engine.config import Config, plain
from engine.config.classes import fingerprints
from engine.errors import ConfigError
from engine.run.agreement import named_ranks
from engine.run.changed import SAMPLE_ORDER, TEACHERS
from engine.run.finite import check_finite
from engine.run.metrics import MetricsWriter
from engine.run.provenance import commit, launcher, machine, version
from engine.run.resume import check_resume, checkpoint_dir
from engine.run.run_dir import RunDir, prepare_folder, set_aside
from parallel import comm
from parallel.checkpoint import place
from parallel.comm import Axis
from parallel.grid import Grid

_PATIENCE = 10.0  # seconds until a network file system shows a new file everywhere


def prepare_checkpoints(config: Config, run_dir: Path) -> Path:
    """The folder of all checkpoints, made and tried if the run saves any.

    Raises:
        ConfigError: it cannot be written to, there is nothing to resume that must be, keys contradict each other.
    """
    _check_keys(config)
    folder = checkpoint_dir(config, run_dir)
    check_resume(config, folder)
    if config.checkpoint.save_interval is not None:
        prepare_folder(folder, "checkpoint.dir")
    return folder


def lock_folders(config: Config, run_dir: Path, folder: Path, world: Axis) -> tuple[RunDir, ...]:
    """run_dir, and the folder of checkpoints, which may be elsewhere: no other run writes there. Collective."""
    run = RunDir(run_dir, world)
    if config.checkpoint.save_interval is None:
        return (run,)
    return run, RunDir(folder, world, key="checkpoint.dir")


def prepare_to_save(config: Config, folder: Path, resumed_at: int | None) -> None:
    """On rank 0, once nothing can be refused any more: clear the folder of what a run that starts, or goes on after a
    step, must not meet there. What is whole is set aside, not deleted.
    """
    if config.checkpoint.save_interval is None:
        return
    folders.clean(folder)
    if resumed_at is not None:
        folders.set_damaged_aside(folder, after=resumed_at)
        _note(folder / place.name_of(resumed_at))
    elif config.checkpoint.dir is not None or folder.is_symlink():  # else with all that is in run_dir
        set_aside(folder, ["step-*"])


def _note(checkpoint: Path) -> None:
    """Tell a batch script how far the run has come: append to the file that it names in a variable of this process."""
    if file := os.environ.get("VITRUVIUS_CHECKPOINTS"):
        with suppress(OSError), Path(file).open("a") as out:
            out.write(f"{checkpoint}\n")


def _check_keys(config: Config) -> None:
    c, evaluations = config.checkpoint, config.train.eval_interval
    if (
        c.keep_best
        and c.save_interval is not None
        and c.save_interval
        and evaluations
        and c.save_interval % evaluations
    ):
        raise ConfigError(
            f"checkpoint.keep_best {c.keep_best}: steps that are saved (every {c.save_interval}) have no evaluation "
            f"(every {evaluations}) to be compared by: make checkpoint.save_interval a multiple of train.eval_interval"
        )
    if c.keep_best and not evaluations:
        raise ConfigError(f"checkpoint.keep_best {c.keep_best} goes by evaluations: set train.eval_interval")


def facts_for_manifests(
    config: Config, grid: Grid, device: torch.device, train_set: Dataset, eval_set: Dataset
) -> dict[str, Any]:
    """`config` and `about` of this run's manifests. Collective."""
    about = {
        "version": version(),
        "commit": commit(),
        "machine": machine(config, device),
        "layout": asdict(grid.shape),
        "launchers": sorted({known for known in comm.gather_objects(launcher(), grid.world) if known}),
        "zero_stage": config.parallel.zero_stage,
        SAMPLE_ORDER: order_of(config.data),
        "training images": f"{len(train_set)} of {train_set.fingerprint}",
        "held-out images": f"{len(eval_set)} of {eval_set.fingerprint}",
        "training texts": captions_fingerprint(train_set),
        "held-out texts": captions_fingerprint(eval_set),
    }
    if found := fingerprints(config, train_set.class_names):
        about[TEACHERS] = list(found)
    return {"config": plain(asdict(config)), "about": about}


def check_folder(folder: Path, assembly: Assembly) -> list[str]:
    """See that the folder is one and the same for all ranks, and has room. Collective. Returns warnings, on rank 0.

    Raises:
        ConfigError: on every rank, if not.
    """
    world = assembly.grid.world
    _check_shared(folder, world)
    own = sum((p.own.stop - p.own.start) * p.values.itemsize for p in state_pieces(assembly))
    size = comm.all_reduce(torch.tensor([float(own)], dtype=torch.float64, device=assembly.device), world).item()
    free = comm.gather_objects(shutil.disk_usage(folder).free if world.index == 0 else 0, world)[0]
    if size > free:
        raise ConfigError(
            f"a checkpoint takes {_megabytes(size)}, and {folder} has {_megabytes(free)} free: make room, choose "
            "another checkpoint.dir, or save nothing (checkpoint.save_interval null)"
        )
    kept = assembly.config.checkpoint.keep
    wanted = size * ((kept or 0) + 1)
    if wanted > free and len(place.steps_in(folder)) <= (kept or 0):
        return [
            f"warning: {kept} checkpoints and one that is being written take {_megabytes(wanted)}; {folder} has "
            f"{_megabytes(free)} free"
        ]
    return []


def _check_shared(folder: Path, world: Axis) -> None:
    token = comm.gather_objects(secrets.token_hex(8), world)[0]
    mark = folder / f"{folders.SEEN}{token}"
    if world.index == 0:
        mark.touch()
    comm.barrier(world)
    sees, until = mark.exists(), time.monotonic() + _PATIENCE
    while not sees and time.monotonic() < until:
        time.sleep(0.1)
        list(folder.iterdir())  # network file systems look again
        sees = mark.exists()
    blind = [rank for rank, seen in enumerate(comm.gather_objects(sees, world)) if not seen]
    if world.index == 0:
        with suppress(OSError):
            mark.unlink()
    if blind:
        raise ConfigError(
            f"{folder} is not one folder for all ranks: {named_ranks(blind)} "
            "cannot see what rank 0 writes there: give a checkpoint.dir on a file system that all hosts share"
        )


def _megabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


class Saving:
    """A run's saves.

    Args:
        assembly: what is saved. folder: of all checkpoints. facts: for manifests. writer: on rank 0 alone.
    """

    def __init__(
        self, assembly: Assembly, folder: Path, facts: Mapping[str, Any], writer: MetricsWriter | None
    ) -> None:
        self._assembly, self._writer, self._step = assembly, writer, 0
        self._stuck: set[int] = set()
        self.interval = assembly.config.checkpoint.save_interval
        self.saver = Saver(assembly, folder, assembly.config.checkpoint, facts, self._report)

    @property
    def newest(self) -> Path | None:
        """That this run has completed."""
        step = self.saver.newest
        return None if step is None else self.saver.folder / place.name_of(step)

    def is_due(self, step: int) -> bool:
        """Whether the interval is over."""
        return bool(self.interval) and step % (self.interval or 1) == 0

    def votes(self) -> Votes:
        """For the end of a step, see Saver."""
        return self.saver.votes()

    def after_step(self, step: int, total: Votes) -> None:
        """Go on with a save that is under way. Collective."""
        self._step = step
        self.saver.poll(total)

    def save(self, step: int, progress: Mapping[str, Any], evaluation: Mapping[str, float]) -> None:
        """Save what is finite. Collective.

        Raises:
            DivergedError: it is not, and is not saved. OutputError: it cannot be written.
        """
        self._step = step
        if self.saver.newest == step:
            return
        check_finite(self._assembly, step)
        if self._writer is not None:
            self._writer.sync()  # what tells of this step is on the disk before the checkpoint is
        self.saver.save(step, progress, evaluation)

    def finish(self) -> None:
        """Return when all is saved. Collective."""
        self.saver.finish()

    def _report(self, report: SaveReport) -> None:
        assert self._writer is not None
        values = {
            "saved_step": report.step,
            "bytes": report.bytes,
            "blocked_time": report.blocked,
            "write_time": report.seconds,
        }
        self._writer.write("save", self._step, values)
        waited = (
            f", training waited {1000 * report.blocked:.0f} ms" if self._assembly.config.checkpoint.async_save else ""
        )
        deleted = f"; deleted {', '.join(map(str, report.deleted))}" if report.deleted else ""
        self._writer.say(f" saved {report.path}: {_megabytes(report.bytes)} in {report.seconds:.2f} s{waited}{deleted}")
        _note(report.path)
        for step in sorted(set(report.stuck) - self._stuck):
            self._writer.say(f"warning: checkpoint {place.name_of(step)} is being read, or cannot be deleted: it stays")
        self._stuck = set(report.stuck)
