"""The runs of `tools.benchmark retention`: what each trains, one after the other in this process, and which are done.

Of a seed comes its teacher, then his students. Seed s begins from other weights and another order. Of digits it holds
out fold s mod 5, so that five seeds that follow each other hold out every image once; of textures it has training crops
of its own, and all seeds are tested on the same.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from data.config import is_of
from data.held_out import FOLDS
from engine.config import Config
from engine.config.cli import parse
from engine.config.distillation import DistillationConfig
from engine.config.keys import key_types, value_of
from engine.errors import ConfigError, OutputError
from engine.run.trainer import pretrain
from parallel.config import ParallelConfig
from parallel.process_group import World


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a series is trained on. Attributes: teacher, student: recipes. longer: of the teacher, keys that are not the
    recipe's. students: of about so much of the teacher's weights, likewise, of the model."""

    teacher: str
    student: str
    longer: tuple[str, ...] = ()
    students: dict[str, dict[str, Any]]


SUBJECTS = {
    "digits": Subject(
        teacher="configs/digits.yaml", student="configs/digits_distillation.yaml", longer=("--train.steps", "1200"),
        students={"fifth": {"mlp_dim": 240}, "twentieth": {"width": 24, "mlp_dim": 112}},
    ),
    "textures": Subject(
        teacher="configs/textures_teacher.yaml", student="configs/textures_distillation.yaml",
        students={"fifth": {}, "twentieth": {"width": 24, "mlp_dim": 88}},
    ),
}  # fmt: skip
STUDENTS = ("fifth", "twentieth")
_KEYS = (
    "--train.global_batch_size=64", "--distillation.features_weight=1", "--distillation.relations=gram",
    "--distillation.relations_weight=10",
)  # fmt: skip
"""Of all students: what the recipe leaves out."""
LABELS: dict[str, dict[str, Any]] = {
    "all": {},
    "few_labels": {"labels_per_class": 10},
    "few_images": {"images_per_class": 10},
}
"""What the student is told: keys of the data."""
WAYS = {
    "scratch": (), "response": (), "features": ("features", "embeddings"), "relations": ("relations",),
    "all": ("features", "embeddings", "relations"),
}  # fmt: skip
"""What the student is to match of his teacher beside the response; from scratch nothing at all."""
_OWNED = {"features": ("features",), "relations": ("relations", "relation_heads"), "embeddings": ()}
_FILE = "runs.jsonl"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One of the series. Attributes: seed: also decides the fold. student, labels, way: of the tables above; of a
    teacher "teacher", "all", "scratch"."""

    seed: int
    student: str = "teacher"
    labels: str = "all"
    way: str = "scratch"


@dataclass(frozen=True, kw_only=True)
class Done:
    """A run that has ended. Attributes: config: a hash of what it was. accuracy, loss: of held-out images. seconds: of
    all threads."""

    run: Run
    config: str
    accuracy: float
    loss: float
    seconds: float


class Series:
    """Runs whose results are kept in a folder, so that each is trained once.

    Args:
        out: the folder; made if missing. on: of SUBJECTS. steps: of every run; None: as the recipes have it. flags:
            of pretrain_vit.py, for all students.

    Raises:
        ConfigError: flags that are none.
    """

    def __init__(self, out: Path, *, on: str = "digits", steps: int | None = None, flags: Sequence[str] = ()) -> None:
        self.out, self._steps, self._subject = out, steps, SUBJECTS[on]
        self._teacher, _ = parse(["--config", self._subject.teacher, *self._subject.longer])
        self._student, _ = parse(["--config", self._subject.student, *_KEYS, *flags])
        out.mkdir(parents=True, exist_ok=True)
        self._done = {of.config: of for of in _read(out / _FILE)}

    def config_of(self, run: Run) -> Config:
        """What a run trains."""
        if run.student == "teacher":
            config = self._teacher
        else:
            sized = replace(self._student, model=replace(self._student.model, **self._subject.students[run.student]))
            config = _student(sized, run, str(self._folder(Run(seed=run.seed))))
        steps = self._steps or config.train.steps
        assert steps is not None
        warmup = min(config.schedule.warmup_steps, steps // 2)
        return replace(
            config,
            data=replace(config.data, fold=run.seed % FOLDS if is_of(config.data.kind, "fold") else 0),
            train=replace(config.train, seed=run.seed, steps=steps, eval_interval=0, micro_batch_size=None),
            schedule=replace(config.schedule, warmup_steps=warmup),
            parallel=ParallelConfig(),
            checkpoint=replace(config.checkpoint, save_interval=steps if run.student == "teacher" else None),
            log=replace(config.log, tensorboard=False, interval=steps),
        )

    def done(self, run: Run) -> Done | None:
        """What came of it, if it has ended, or of another that trained the same: of what its configuration is now."""
        return self._done.get(self._hash(run))

    def train(self, run: Run, world: World) -> int:
        """Train it to its end. Returns the exit code of pretrain_vit.py."""
        began, is_teacher = time.process_time(), run.student == "teacher"
        with contextlib.ExitStack() as stack:
            folder = self._folder(run)
            if not is_teacher:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.out)))
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            code = pretrain(replace(self.config_of(run), run_dir=str(folder)), world)
            if code:
                return code
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["event"] == "eval"][-1]
        seconds = time.process_time() - began
        done = Done(run=run, config=self._hash(run), accuracy=last["accuracy"], loss=last["loss"], seconds=seconds)
        _append(self.out / _FILE, done)
        self._done[done.config] = done
        return code

    def _folder(self, run: Run) -> Path:
        """Of a teacher."""
        return self.out / f"teacher-{run.seed}-{self._hash(run)}"

    def _hash(self, run: Run) -> str:
        """Of keys that say something, so that later versions, which have others, know it; wherever the folder is."""
        config, usual = self.config_of(run), Config()
        said = {key: value for key in key_types() if (value := value_of(config, key)) != value_of(usual, key)}
        if (teacher := config.distillation.teacher) is not None:
            said["distillation.teacher"] = Path(teacher).name
        return blake2b(repr(said).encode(), digest_size=6).hexdigest()


def runs_of(seeds: Sequence[int], students: Sequence[str], labels: Sequence[str], ways: Sequence[str]) -> Iterator[Run]:
    """In their order: seed by seed, so that those which are done have all there is to compare."""
    for seed in seeds:
        yield Run(seed=seed)
        for student in students:
            for known in labels:
                for way in ways:
                    yield Run(seed=seed, student=student, labels=known, way=way)


def _student(recipe: Config, run: Run, teacher: str) -> Config:
    keys, usual = recipe.distillation, DistillationConfig()
    for target in {"features", "embeddings", "relations"} - set(WAYS[run.way]):
        off = {f"{target}_weight": 0.0} | {name: getattr(usual, name) for name in _OWNED[target]}
        keys = replace(keys, standardise=tuple(x for x in keys.standardise if x != target), **off)
    if not (keys.features_weight or keys.at_depth):
        keys = replace(keys, pairs=None)
    if not (keys.compares_rows or keys.embeddings_weight):
        keys = replace(keys, lift="drop")
    if not keys.relates_images:
        keys = replace(keys, passes="auto")
    known = LABELS[run.labels]
    if run.way == "scratch":  # an image without a label teaches nothing then
        count = max(known.values(), default=None)
        return replace(
            recipe, objective="supervised", distillation=usual, data=replace(recipe.data, images_per_class=count)
        )
    return replace(recipe, distillation=replace(keys, teacher=teacher), data=replace(recipe.data, **known))


def _read(file: Path) -> Iterator[Done]:
    """Raises ConfigError for a file of something else. Lines that were cut off are none."""
    lines = file.read_text().splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            said = json.loads(line)
        except ValueError:
            continue
        try:
            yield Done(**said | {"run": Run(**said["run"])})
        except (TypeError, KeyError) as error:
            raise ConfigError(f"{file}, line {number} is no run of this benchmark: give another --out") from error


def _append(file: Path, done: Done) -> None:
    try:
        with file.open("a+b") as at:
            if at.tell() and at.seek(-1, os.SEEK_END) and at.read(1) != b"\n":
                at.write(b"\n")
            at.write(json.dumps(asdict(done)).encode() + b"\n")
            at.flush()
            os.fsync(at.fileno())
    except OSError as error:
        raise OutputError(f"{file}: {error.strerror}") from error
