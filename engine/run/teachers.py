"""The weights of teachers: which a run goes on with, and read into the layers that stand for them, in any layout."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from engine.assembly import Assembly
from engine.checkpoint.load import load_weights, plan_load
from engine.config import Config
from engine.config.classes import class_orders
from engine.config.distillation import TeacherConfig
from engine.config.teachers import Found, computed, fingerprint_of, found_of, taught_by
from engine.config.tower_teachers import FoundTowers, tower_teacher_of, towers_at
from engine.errors import ConfigError
from engine.run.agreement import check_agreement
from engine.run.resume import checkpoint_dir, may_resume
from model import TEACHER, Teacher, build_layers
from model.formats.api import open_weights
from model.formats.base import ConversionError
from model.formats.pairs import layers_of
from model.formats.weights import StoredWeights
from model.inherit import in_order, is_classifier
from parallel.checkpoint import place
from parallel.checkpoint.manifest import FILE, CheckpointError, read_manifest


def with_teachers_of_then(config: Config) -> Config:
    """A configuration, with the very steps that taught where it has folders of several and there is a run to go on
    with: a teacher's own run may have gone on. Where his step is gone, his folder stays, and is compared.
    """
    path = config.contrastive.teacher if config.objective == "contrastive" else None
    if (config.objective != "distillation" and path is None) or config.run_dir is None:
        return config
    folder = checkpoint_dir(config, Path(config.run_dir))
    if not may_resume(config, folder):
        return config
    try:
        then = read_manifest(folder / place.name_of(place.steps_in(folder)[-1])).config
        if path is not None:
            step = _step_in(path, Path(then["contrastive"]["teacher"]).name)
            return replace(config, contrastive=replace(config.contrastive, teacher=step))
        then = then["distillation"]
        names = [Path(of["path"]).name for of in then["teachers"] or [{"path": then["teacher"]}]]
    except (CheckpointError, KeyError, TypeError):
        return config  # what is wrong is said when it is read
    keys = config.distillation
    if len(names) < len(keys.all_teachers):
        return config
    paths = [_step_in(of.path, name) for of, name in zip(keys.all_teachers, names, strict=False)]
    return replace(config, distillation=keys.at(paths))


def _step_in(path: str, name: str) -> str:
    """A step's folder by its name, if a path means a folder of steps that has it; else the path."""
    found = (Path(path) / inner / name for inner in (".", "checkpoints"))
    return next((str(step) for step in found if name.startswith("step-") and (step / FILE).exists()), path)


def load_teachers(a: Assembly, classes: Sequence[str] | None = None) -> None:
    """Fill the frozen weights of all teachers, if the objective has any, each rank with what it holds. Collective.

    Args:
        classes: names of the data's, in order; None: they have none.

    Raises:
        ConfigError: on every rank, if one has found damage, or other weights than ranks have agreed upon, or a
            teacher's tensors are not those of its model.
    """
    load_towers(a)
    if a.config.objective != "distillation":
        return
    orders, given = class_orders(a.config, classes), computed(a.config)
    for teacher in taught_by(a.config):
        if isinstance(teacher, Teacher):
            load_teacher(a, teacher, given[teacher.name], orders[teacher.name].places)


def load_towers(a: Assembly) -> None:
    """Those of a contrastive student's teacher, if it has one. Collective. Raises as `load_teachers`."""
    teacher, keys = tower_teacher_of(a.config), a.config.contrastive
    if teacher is None:
        return
    assert keys.teacher is not None
    found = towers_at(keys.teacher, keys.teacher_load_weights)
    weights = _the_same(a, keys.teacher, found, whole=True)
    try:
        with closing(weights):
            layers = layers_of(found.description)
            assert layers is not None
            plan = plan_load(weights, found.description.model, layers, a.config.data, teacher.text)
            load_weights(a, weights, plan, f"{TEACHER}.")
    except ConversionError as error:
        raise ConfigError(f"contrastive.teacher {keys.teacher}: {error}") from error


def load_teacher(a: Assembly, teacher: Teacher, given: TeacherConfig, order: Sequence[int] | None) -> None:
    """One of them, whose layers are among those of the assembly. Collective. Raises as `load_teachers`.

    Args:
        order: for each of the student's classes, the teacher's; None: the same.
    """
    weights = _the_same(a, given.path, found_of(given), name=teacher.name)
    try:
        with closing(weights):
            plan = plan_load(weights, teacher.model, build_layers(teacher.model), a.config.data)
            lacks = [f for f in plan.fits if f.how in ("new", "left out")]
            if not teacher.model.num_classes:  # nobody asks for his classes
                lacks = [f for f in lacks if not is_classifier(f.name)]
            if lacking := [f.describe() for f in lacks]:
                raise ConversionError(f"it cannot be shown images of this size: {'; '.join(lacking[:3])}")
            chosen = None if order is None else in_order(plan.parts, order)
            load_weights(a, weights, plan, f"{teacher.name}.", chosen)
    except ConversionError as error:
        raise ConfigError(f"the teacher {given.path}: {error}") from error


def _the_same(
    a: Assembly, path: str, found: Found | FoundTowers, *, name: str = TEACHER, whole: bool = False
) -> StoredWeights:
    """A teacher's weights, which are those of then on all ranks. Collective. Raises as `load_teachers`."""
    weights, now = _opened(found, whole=whole)
    check_agreement({f"weights of the {name}": now}, a.grid.world)
    if weights is None or now != found.fingerprint:
        raise ConfigError(
            f"the teacher {path} is no longer what it was when this run began ({found.fingerprint}): {now}. Start "
            "again, with a teacher that nothing writes to"
        )
    return weights


def _opened(found: Found | FoundTowers, *, whole: bool) -> tuple[StoredWeights | None, str]:
    """Weights and their fingerprint; or none, and why."""
    try:
        weights = open_weights(found.path, only_model=True, which=found.which, whole=whole)
        return weights, fingerprint_of(weights, found.which)
    except ConversionError as error:
        return None, str(error)
