"""Going on where an earlier run ended: which checkpoint, whether it is of this run, what changed since.

Of the checkpoints in the folder the newest that is whole is taken. One that turns out to be damaged while it is read is
named, and the one before it is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.assembly import Assembly
from engine.checkpoint.states import restore
from engine.config import Config
from engine.errors import ConfigError
from engine.run.changed import TEACHERS, changes, check_data, check_state
from engine.run.progress import Progress
from parallel import comm
from parallel.checkpoint import place
from parallel.checkpoint.manifest import (
    FILE,
    CheckpointError,
    Manifest,
    NoCheckpointError,
    UnreadableError,
    read_manifest,
)
from parallel.checkpoint.read import Reader


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        manifest: of the checkpoint; None: there is none, the run starts anew. notes: what to say.
    """

    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int | None:
        """That was done."""
        return None if self.manifest is None else self.manifest.step

    @property
    def progress(self) -> Progress:
        """Of the loop."""
        return Progress() if self.manifest is None else Progress.of(self.manifest.progress)


def checkpoint_dir(config: Config, run_dir: Path) -> Path:
    """Of all checkpoints of a run."""
    return Path(config.checkpoint.dir) if config.checkpoint.dir is not None else run_dir / "checkpoints"


def may_resume(config: Config, folder: Path) -> bool:
    """Whether there seems to be something to go on from."""
    try:
        return config.checkpoint.resume != "never" and bool(place.steps_in(folder))
    except CheckpointError:
        return False


def check_resume(config: Config, folder: Path) -> None:
    """Raise ConfigError, before ranks talk, where there is nothing to go on from and there must be, or where the folder
    is no folder of checkpoints, but one of them.
    """
    try:
        if (folder / FILE).exists():
            raise ConfigError(
                f"checkpoint.dir {folder} is one checkpoint, and a folder of all of a run's is meant: give the folder "
                "that it is in, or give it as checkpoint.load"
            )
        steps = place.steps_in(folder)
    except (CheckpointError, OSError) as error:
        raise ConfigError(f"checkpoint.dir: {error}") from error
    if config.checkpoint.resume == "must" and not steps:
        raise ConfigError(
            f"checkpoint.resume is must, and there is no checkpoint in {folder}: see run_dir and checkpoint.dir, or "
            "use resume auto, which then starts a new run"
        )


def resume(
    build: Callable[[], Assembly], folder: Path, *, steps: Callable[[Progress], int], facts: Mapping[str, Any]
) -> tuple[Assembly, Resumed]:
    """Make what this rank trains, with the state of the newest checkpoint that is whole, if there is one. Collective.

    Args:
        build: makes it new. steps: of the whole run, by what was done of it.
        facts: `about` of this run, as manifests have it, to be compared.

    Raises:
        ConfigError: on every rank: a checkpoint is of another model, optimizer or version of the format; or all are
            damaged, and one was a must.
        UnreadableError: on every rank: one cannot be read now, on some rank. Nothing was changed.
    """
    a = build()
    wanted, notes = a.config.checkpoint.resume, list[str]()
    candidates = _candidates(a, folder, facts)
    for step in reversed(candidates):
        path = folder / place.name_of(step)
        manifest, problem = take(a, path, steps, notes, facts.get(TEACHERS, ()), facts)
        if manifest is not None:
            notes += changes(a, manifest, facts)
            last = steps(Progress.of(manifest.progress))
            where = f"resume: from {path}, step {step} of {last}"
            if step == last:
                where += ": nothing is left; give more train.steps, another run_dir, or checkpoint.resume never"
            return a, Resumed(manifest=manifest, notes=[where, *notes])
        notes.append(f"warning: {path} is damaged: {problem}")
        del a  # some of its state is that checkpoint's
        a = build()
    if candidates and wanted == "must":
        raise ConfigError(
            f"checkpoint.resume is must, and no checkpoint in {folder} is whole: "
            + "; ".join(note.removeprefix("warning: ") for note in notes)
        )
    if candidates:
        notes.append(f"warning: no checkpoint in {folder} is whole: the run starts anew, they are set aside")
    return a, Resumed(notes=notes)


def _candidates(a: Assembly, folder: Path, facts: Mapping[str, Any]) -> list[int]:
    """Steps of the checkpoints to go on from, ascending, as rank 0 finds them. Collective.

    Where no earlier run is to be gone on with, those of this one are: a launcher starts its ranks again after a
    failure, or when hosts have come or gone. They are known by the launchers, of which those of then and now share one.
    """
    steps: list[int] = []
    if a.grid.world.index == 0:
        steps = place.steps_in(folder)
        if a.config.checkpoint.resume == "never":
            steps = [step for step in steps if _is_ours(folder / place.name_of(step), facts)]
    found: list[int] = comm.gather_objects(steps, a.grid.world)[0]
    return found


def _is_ours(path: Path, facts: Mapping[str, Any]) -> bool:
    try:
        return bool(set(read_manifest(path).about.get("launchers", ())) & set(facts.get("launchers", ())))
    except CheckpointError:
        return False


def take(
    a: Assembly,
    path: Path,
    steps: Callable[[Progress], int],
    notes: list[str],
    teachers: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> tuple[Manifest | None, str]:
    """(the manifest, "") of a checkpoint that was restored, or (None, how it is damaged). Collective.

    Args:
        steps: of the whole run, by what was done of it. notes: are added to, where state begins anew or is left out.
        teachers: fingerprints of those that this run has (engine.config.classes).
        facts: as of `resume`; None: other data are no matter.

    Raises:
        ConfigError, UnreadableError: as `resume`.
    """
    reader, manifest, problem = None, None, None
    try:
        reader = Reader(path, threads=2)
        manifest = reader.manifest
        last = steps(Progress.of(manifest.progress))
        if path.name != place.name_of(manifest.step):
            raise CheckpointError(f"{path} says that it is of step {manifest.step}: it was renamed, or copied")
    except CheckpointError as error:
        problem = error
    if (found := _worst(a, problem)) is not None:
        return None, found
    assert reader is not None and manifest is not None
    with reader:
        if manifest.step > last:
            raise ConfigError(
                f"train.steps is {last}, and {path} is at step {manifest.step} already: give more, another "
                "run_dir, or checkpoint.resume never"
            )
        notes_here = check_state(a, reader, teachers)
        if facts is not None and not a.config.checkpoint.accept_other_data:
            check_data(a.config, reader, facts)
        try:
            restore(a, reader)
        except CheckpointError as error:
            problem = error
    if (found := _worst(a, problem)) is not None:
        return None, found
    a.store.loaded()
    notes += notes_here
    return manifest, ""


def _worst(a: Assembly, problem: CheckpointError | None) -> str | None:
    """The first of all ranks' problems, None if there is none. Collective.

    Raises:
        ConfigError, UnreadableError: on every rank, if one rank's is no damage.
    """
    kinds = (NoCheckpointError, UnreadableError, CheckpointError)
    own = None if problem is None else (next(i for i, k in enumerate(kinds) if isinstance(problem, k)), str(problem))
    found = [p for p in comm.gather_objects(own, a.grid.world) if p is not None]
    if not found:
        return None
    kind, message = min(found, key=lambda p: p[0])
    if kinds[kind] is NoCheckpointError:
        raise ConfigError(f"{message}. Or start anew: checkpoint.resume never sets it aside")
    if kinds[kind] is UnreadableError:
        raise UnreadableError(f"{message}: see to that and start again; nothing was changed")
    return message
