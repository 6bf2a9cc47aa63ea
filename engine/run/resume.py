"""Going on where an earlier run ended: which checkpoint, whether it is of this run, what changed since.

Of the checkpoints in the folder the newest that is whole is taken. One that turns out to be damaged while it is read is
named, and the one before it is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engine.assemble import Assembly
from engine.checkpoint import folder as folders
from engine.checkpoint.manifest import CheckpointError, Manifest
from engine.checkpoint.read import Reader
from engine.checkpoint.states import Difference, differences, restore, shapes_of
from engine.config import Config
from engine.config.keys import key_types, value_of
from engine.errors import ConfigError
from engine.run.progress import Progress
from parallel import comm

# Keys that may change without a word: how a run is spread and watched, and where things are.
_FREE = ("parallel.", "log.", "checkpoint.", "run_dir", "device", "data.path", "data.val_path", "data.workers")
_FREE_TRAIN = ("micro_batch_size", "eval_interval", "stop_step", "time_limit", "check_interval", "max_bad_steps")
_TRAINED_BY = ("drop_path", "layer_scale", "head_bias", "preset")  # keys of the model that say how
_SHOWN = 10  # of what differs


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        manifest: of the checkpoint; None: there is none, the run starts anew. notes: what to say. spoiled: whether
            the state was overwritten by a checkpoint that turned out to be damaged, and must be made anew.
    """

    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)
    spoiled: bool = False

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


def goes_on(config: Config) -> bool:
    """Whether a checkpoint in the folder is one to go on from. Where the launcher has started this rank again, after a
    failure or because hosts have come, those there are this run's, whatever it was told of earlier ones.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or "VITRUVIUS_STARTED_AGAIN" in os.environ
    return config.checkpoint.resume != "never" or again


def may_resume(config: Config, folder: Path) -> bool:
    """Whether there seems to be something to go on from."""
    try:
        return goes_on(config) and bool(folders.steps_in(folder))
    except CheckpointError:
        return False


def check_resume(config: Config, folder: Path) -> None:
    """Raise ConfigError, before ranks talk, where there is nothing to go on from and there must be."""
    try:
        steps = folders.steps_in(folder)
    except CheckpointError as error:
        raise ConfigError(f"checkpoint.dir: {error}") from error
    if config.checkpoint.resume == "must" and not steps:
        raise ConfigError(
            f"checkpoint.resume is must, and there is no checkpoint in {folder}: see run_dir and checkpoint.dir, or "
            "use resume auto, which then starts a new run"
        )


def resume(assembly: Assembly, folder: Path, *, steps: Callable[[Progress], int], facts: Mapping[str, Any]) -> Resumed:
    """Take the state of the newest checkpoint that is whole. Collective.

    Args:
        steps: of the whole run, by what was done of it.
        facts: `about` of this run, as manifests have it, to be compared.

    Raises:
        ConfigError: on every rank: it is of another model or optimizer; or all are damaged, and one was a must.
    """
    config, world = assembly.config, assembly.grid.world
    if not any(comm.gather_objects(goes_on(config), world)):  # a host that has just come knows of no earlier start
        return Resumed()
    notes: list[str] = []
    candidates: list[int] = comm.gather_objects(folders.steps_in(folder) if world.index == 0 else [], world)[0]
    for step in reversed(candidates):
        path = folder / folders.name_of(step)
        manifest, problem = take(assembly, path, steps, notes)
        if manifest is not None:
            notes += _changes(assembly, manifest, facts)
            last = steps(Progress.of(manifest.progress))
            where = f"resume: from {path}, step {step} of {last}"
            if step == last:
                where += ": nothing is left; give more train.steps, another run_dir, or checkpoint.resume never"
            return Resumed(manifest=manifest, notes=[where, *notes])
        notes.append(f"warning: {path} is damaged: {problem}")
    if candidates and config.checkpoint.resume == "must":
        raise ConfigError(f"checkpoint.resume is must, and no checkpoint in {folder} is whole: {'; '.join(notes)}")
    if candidates:
        notes.append(f"warning: no checkpoint in {folder} is whole: the run starts anew, they are set aside")
    return Resumed(notes=notes, spoiled=bool(candidates))


def take(a: Assembly, path: Path, steps: Callable[[Progress], int], notes: list[str]) -> tuple[Manifest | None, str]:
    """(the manifest, "") of a checkpoint that was restored, or (None, what is wrong with it). Collective.

    Args:
        steps: of the whole run, by what was done of it. notes: are added to, where state begins anew or is left out.

    Raises:
        ConfigError: on every rank: it is the state of something else.
    """
    manifest, problem = None, None
    try:
        reader = Reader(path, threads=2)
    except CheckpointError as error:
        problem = str(error)
    if (found := _first(a, problem)) is not None:
        return None, found
    with reader:
        manifest = reader.manifest
        last = steps(Progress.of(manifest.progress))
        if manifest.step > last:
            raise ConfigError(
                f"train.steps is {last}, and {path} is at step {manifest.step} already: give more, another "
                "run_dir, or checkpoint.resume never"
            )
        notes_here = _check_state(a, reader)
        try:
            restore(a, reader)
        except CheckpointError as error:
            problem = str(error)
    if (found := _first(a, problem)) is not None:
        return None, found
    a.store.loaded()
    notes += notes_here
    return manifest, ""


def _first(a: Assembly, problem: str | None) -> str | None:
    """Of all ranks' problems. Collective."""
    return next((found for found in comm.gather_objects(problem, a.grid.world) if found is not None), None)


def _check_state(a: Assembly, reader: Reader) -> list[str]:
    """What of the state begins anew or is left out. Collective.

    Raises:
        ConfigError: on every rank: it is the state of something else.
    """
    everywhere = comm.gather_objects(shapes_of(a), a.grid.world)
    shapes = {name: shape for found in everywhere for name, shape in found.items()}
    found = differences(shapes, reader)
    differ = [d.describe().removeprefix("weights/") for d in found if d.name.startswith("weights/")]
    if not differ:  # what computes something else with the same tensors
        differ = changed_keys(a.config, reader.manifest, but=lambda key: not _is_of_the_function(key))
    if differ:
        more = f" and {len(differ) - _SHOWN} more" if len(differ) > _SHOWN else ""
        raise ConfigError(
            f"{reader.folder} is of another model: {'; '.join(differ[:_SHOWN])}{more}. Use the model's configuration "
            "of then, another run_dir, checkpoint.resume never, or checkpoint.load to start a new run from its weights"
        )
    stored = _stored(reader.manifest.config, "optimizer.name")
    if stored != a.config.optimizer.name:
        raise ConfigError(
            f"{reader.folder} was saved by optimizer {stored}, and optimizer.name is {a.config.optimizer.name}: its "
            "state is of no use to another. Use that one, or checkpoint.load to start a new run from its weights"
        )
    return _notes_of(found)


def _notes_of(found: Sequence[Difference]) -> list[str]:
    """A line for each kind of state that is only on one side, or of another shape."""
    lines = []
    for kind in dict.fromkeys(d.name.partition("/")[0].partition(".")[0] for d in found):
        of_kind = [d for d in found if d.name.startswith(kind)]
        new = sum(d.stored is None for d in of_kind)
        gone = sum(d.here is None for d in of_kind)
        other = len(of_kind) - new - gone
        parts = [f"{n} {what}" for n, what in ((new, "new"), (gone, "left out"), (other, "of another shape")) if n]
        lines.append(f"resume: state of {kind}: {', '.join(parts)} (first: {of_kind[0].describe()})")
    return lines


def _changes(a: Assembly, manifest: Manifest, facts: Mapping[str, Any]) -> list[str]:
    """What is not as it was when the checkpoint was saved."""
    lines = []
    shape = asdict(a.grid.shape)
    if (before := manifest.about.get("layout")) != shape:
        axes = (" x ".join(f"{axis} {size}" for axis, size in (layout or {}).items()) for layout in (before, shape))
        lines.append("resume: saved by {}, read by {}: the same up to rounding from here on".format(*axes))
    changed = changed_keys(a.config, manifest, but=_is_free)
    if changed:
        lines.append(f"resume: changed since: {'; '.join(changed)}")
    return lines + changed_images(manifest, facts)


def changed_keys(config: Config, manifest: Manifest, but: Callable[[str], bool] = lambda key: False) -> list[str]:
    """What a resolved configuration has otherwise than that of a checkpoint, as `key then -> now`."""
    return [
        f"{key} {_shown(then)} -> {_shown(now)}"
        for key in key_types()
        if not but(key) and (then := _stored(manifest.config, key)) != (now := plain(value_of(config, key)))
    ]


def changed_images(manifest: Manifest, facts: Mapping[str, Any]) -> list[str]:
    """A warning for each list of images that is another than in a checkpoint."""
    return [
        f"warning: the list of {name} is another than when the checkpoint was saved"
        for name in ("training images", "held-out images")
        if manifest.about.get(name) != facts.get(name)
    ]


def _is_of_the_function(key: str) -> bool:
    """Whether it decides what is computed with given weights, and not how they begin or are trained."""
    group, _, name = key.partition(".")
    return key == "objective" or (group == "model" and name not in _TRAINED_BY)


def _is_free(key: str) -> bool:
    group, _, name = key.partition(".")
    return key.startswith(_FREE) or (group == "train" and name in _FREE_TRAIN)


def plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value


_MISSING = object()


def _stored(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def _shown(value: Any) -> str:
    return "none" if value is _MISSING else "null" if value is None else str(value)
