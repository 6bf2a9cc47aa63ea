"""What is otherwise than when a checkpoint was saved: what no run goes on with, and what is told and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from data import order_of
from engine.assembly import Assembly
from engine.checkpoint.states import Difference, differences, shapes_of
from engine.config import Config, plain
from engine.config.keys import default_of, key_types
from engine.errors import ConfigError
from engine.run.progress import Progress
from model import StageConfig
from parallel import comm
from parallel.checkpoint.manifest import Manifest
from parallel.checkpoint.read import Reader

# Keys that may change without a word: how a run is spread and watched, and where things are.
_FREE = (
    "parallel.", "recompute.", "log.", "checkpoint.", "run_dir", "device", "data.path", "data.val_path", "data.workers",
    "data.index_dir", "data.max_bad_share", "data.share_decoding", "contrastive.passes", "distillation.passes",
)  # fmt: skip
_FREE_TRAIN = ("micro_batch_size", "eval_interval", "stop_step", "time_limit", "check_interval", "max_bad_steps")
_TRAINED_BY = ("drop_path", "layer_scale", "head_bias", "preset")  # keys of the model that say how
_SHOWN = 10  # of what differs
TEACHERS = "teachers"
"""What of a manifest's `about` has the fingerprints of their weights and classes, where there are any."""
SAMPLE_ORDER = "order of samples"
"""What of a manifest's `about` names the rule by which draws become images; absent: a shuffled array."""


def check_state(a: Assembly, reader: Reader, teachers: Sequence[str]) -> list[str]:
    """What of the state begins anew or is left out. Collective.

    Raises:
        ConfigError: on every rank: it is the state of something else.
    """
    if reader.manifest.is_of_weights_alone:
        raise ConfigError(
            f"{reader.folder} has weights alone, as a conversion writes them, and no state of training to go on with: "
            "give it as checkpoint.load, and another run_dir or checkpoint.dir"
        )
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
    drawn, repeats = Progress.of(reader.manifest.progress).samples, a.config.data.repeats
    if drawn % repeats:
        raise ConfigError(
            f"data.repeats is {repeats}, and {reader.folder} has drawn {drawn} images, no multiple of it, so that rows "
            "of one image would be parted: use those of then, or checkpoint.load to start a new run from its weights"
        )
    then, now = reader.manifest.about.get(SAMPLE_ORDER, "a shuffled array"), order_of(a.config.data)
    if drawn and then != now:
        raise ConfigError(
            f"{reader.folder} has drawn {drawn} images in another order ({then}, and this run has {now}), so that some "
            "would come twice in an epoch and others never: go on with the data.shuffle_window, data.weights and "
            f"version of then ({reader.manifest.about.get('version')}), or checkpoint.load to start a new run from its "
            "weights"
        )
    if (taught := list(reader.manifest.about.get(TEACHERS, ()))) != list(teachers):
        raise ConfigError(
            f"{reader.folder} was taught by weights {taught}, and this run's teachers have {list(teachers)}: give the "
            "teacher of then, of a run the folder of that step, with names of classes as they were, or checkpoint.load "
            "to start a new run from its weights"
        )
    stored = _stored(reader.manifest.config, "optimizer.name")
    if stored != a.config.optimizer.name:
        raise ConfigError(
            f"{reader.folder} was saved by optimizer {stored}, and optimizer.name is {a.config.optimizer.name}: its "
            "state is of no use to another. Use that one, or checkpoint.load to start a new run from its weights"
        )
    return _notes_of(found)


def check_data(config: Config, reader: Reader, facts: Mapping[str, Any]) -> None:
    """Raise ConfigError, on every rank, where draws would be of other images or texts than those that were drawn."""
    then, now = _stored(reader.manifest.config, "train.seed"), config.train.seed
    about = reader.manifest.about
    changed = [f"train.seed {_shown(then)} -> {now}"] if then != now else []
    changed += [
        f"{name} {about[name]} -> {facts.get(name)}"
        for name in ("training images", "training texts")
        if name in about and about[name] != facts.get(name)
    ]
    if changed and Progress.of(reader.manifest.progress).samples:
        raise ConfigError(
            f"{reader.folder} goes on with other data: {'; '.join(changed)}. What is left of the epoch would not be "
            "what was not seen yet: use those of then, or checkpoint.load to start a new run from its weights, or, if "
            "the change is meant, checkpoint.accept_other_data true"
        )


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


def changes(a: Assembly, manifest: Manifest, facts: Mapping[str, Any]) -> list[str]:
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
    here = plain(asdict(config))
    return [
        f"{key} {_shown(then)} -> {_shown(now)}"
        for key in key_types()
        if not but(key) and (then := _then(manifest.config, key, config)) != (now := _stored(here, key))
    ]


def changed_images(manifest: Manifest, facts: Mapping[str, Any]) -> list[str]:
    """A warning for each list of images, or of what is said of them, that is another than in a checkpoint."""
    usual = {"training images": None, "held-out images": None, "training texts": "none", "held-out texts": "none"}
    return [
        f"warning: the list of {name} is another than when the checkpoint was saved"
        for name, absent in usual.items()
        if manifest.about.get(name, absent) != facts.get(name, absent)
    ]


def _is_of_the_function(key: str) -> bool:
    """Whether it decides what is computed with given weights, and not how they begin or are trained."""
    group, _, name = key.partition(".")
    return key == "objective" or (group in ("model", "text") and name not in _TRAINED_BY)


def _is_free(key: str) -> bool:
    group, _, name = key.partition(".")
    return key.startswith(_FREE) or (group == "train" and name in _FREE_TRAIN)


_MISSING = object()


def _stored(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
    return value


def _then(config: Mapping[str, Any], key: str, here: Config) -> Any:
    """As _stored; of a key of the model, or a group, that is younger than the checkpoint, what it is where it is left
    out."""
    value, (group, _, name) = _stored(config, key), key.partition(".")
    if value is _MISSING and name and group not in config:
        return plain(default_of(key))
    if key == "model.stages" and isinstance(value, list):  # of keys of a stage that are younger, too
        return [plain(asdict(StageConfig(**stage))) for stage in value]
    if value is not _MISSING or group != "model":
        return value
    absent: dict[str, Any] = {name: None}
    try:
        return plain(getattr(replace(here.model, **absent).resolve(), name))
    except ValueError:  # it cannot be left out
        return _MISSING


def _shown(value: Any) -> str:
    return "none" if value is _MISSING else "null" if value is None else str(value)
