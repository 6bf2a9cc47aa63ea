"""Keys of objective distillation: who teaches, how he is run, and what of him the student is to match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Literal, Self

from engine.errors import ConfigError
from model.matching import RELATIONS

BETWEEN_IMAGES = ("distances", "angles")
"""Relations of whole images, by their pooled features."""
STANDARDISED = {"features": "features", "embeddings": "embeddings", "logits": "response"}
"""What can be brought on one scale, and the target that it is of."""
SHOWN_BY = ("dtype", "image_size", "mean", "std", "load_weights")
"""Keys of how a teacher is run; of a single one they begin with `teacher_`."""
_WEIGHTS = ("response_weight", "embeddings_weight", "features_weight", "relations_weight", "label_weight")


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """One of several teachers."""

    path: str
    """A checkpoint of any layout, or what tools.convert reads."""

    weight: float = 1.0
    """Of what is learnt from him, before weights are divided by their sum."""

    dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    """As distillation.teacher_dtype."""

    image_size: int | tuple[int, int] | None = None
    """As distillation.teacher_image_size."""

    mean: tuple[float, ...] | None = None
    """As distillation.teacher_mean."""

    std: tuple[float, ...] | None = None
    """As distillation.teacher_std."""

    load_weights: Literal["weights", "average"] = "weights"
    """As distillation.teacher_load_weights."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Who teaches, and what of him the student is to match, beside the labels. Each target has a weight."""

    teacher: str | None = None
    """A checkpoint of any layout (its newest step), or a file or folder that tools.convert reads."""

    teacher_dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    """What the teacher is kept and computed in; fp8: the linears of its blocks multiply in 8 bits, the rest is bf16;
    null: precision.dtype (of fp8: bf16)."""

    teacher_image_size: int | tuple[int, int] | None = None
    """Rows and columns of the images that it is shown; null: those of its checkpoint."""

    teacher_mean: tuple[float, ...] | None = None
    """Of the pixels that it is shown; null: as its checkpoint says, else data.mean."""

    teacher_std: tuple[float, ...] | None = None
    """Likewise; null: as its checkpoint says, else data.std."""

    teacher_load_weights: Literal["weights", "average"] = "weights"
    """Of a checkpoint: the weights themselves, or their moving average."""

    teachers: tuple[TeacherConfig, ...] | None = None
    """Several teachers, each a group of path, weight, dtype, image_size, mean, std, load_weights, instead of one."""

    start_from: tuple[int, ...] | str | None = None
    """Start from weights of the teacher, of several the first one: from its first blocks (first), from evenly spread
    ones (even), or a list of one for each of the student's, from 0; of its heads and features from evenly spaced ones;
    null: from new ones."""

    response: Literal["kl", "sigmoid", "hard"] = "kl"
    """Of the logits: KL divergence of classes, or of each class by itself, softened by the temperature; or cross
    entropy with the teacher's first class (DeiT)."""

    response_weight: float = 1.0
    """Of that; 0: it is no target."""

    temperature: float = 2.0
    """Logits of both are divided by it; the divergence is multiplied by its square (Hinton et al. 2015)."""

    embeddings_weight: float = 0.0
    """Of 1 less the cosine of the pooled features before the classifier, the student's projected to the teacher's width
    where that differs; 0: it is no target."""

    features: Literal["mse", "cosine", "smooth_l1"] = "mse"
    """What patches of matched blocks differ by, each normalised over its features (FitNets; Romero et al. 2015)."""

    features_weight: float = 0.0
    """Of that, the mean over pairs of blocks; 0: it is no target."""

    relations: tuple[str, ...] = ("gram",)
    """How tokens of an image relate to each other in matched blocks: gram (the cosines of patches, as DINOv3's Gram
    matrices), queries, keys, values (MiniLMv2), maps (of attention, MiniLM); or images of a batch by their pooled
    features: distances, angles (RKD). A weight may stand behind, as queries:2."""

    relations_weight: float = 0.0
    """Of what these differ by, each times its own weight, the mean over pairs of blocks; 0: they are no target."""

    relation_heads: int | None = None
    """That queries, keys and values of both models are cut into anew; null: as many as the student's heads."""

    lift: Literal["drop", "keep"] = "drop"
    """What becomes of the projection of the student's last block to the teacher's width: it goes with the match, or is
    a part of the student, behind which its head has that width."""

    pairs: tuple[tuple[int, int], ...] | str | None = None
    """Blocks to be matched: even:N, which are evenly spread, or a list of [student's, teacher's], from 0, rising in
    both; null: even:4, or as many as there are."""

    standardise: tuple[str, ...] = ()
    """Of several teachers, or of one with features of many scales, what is brought on one scale: features, embeddings
    (less their mean, over one deviation, of all that was seen in the steps before), logits (of student and teachers,
    each image's; response kl)."""

    passes: Literal["auto", 1, 2] = "auto"
    """Over the pipeline in a step, for distances and angles, which are of all images of a step: 2 runs forwards twice,
    1 needs a schedule that runs all forwards first; auto: 1 with such a schedule, or one micro-batch."""

    label_weight: float = 1.0
    """Of the ordinary loss of the labels (train.loss); 0: labels are no target."""

    def __post_init__(self) -> None:
        for name in _WEIGHTS:
            if getattr(self, name) < 0:
                raise ValueError(f"distillation.{name} is {getattr(self, name)}: it must be 0 or more")
        self._check_relations()
        if unknown := set(self.standardise) - set(STANDARDISED):
            raise ValueError(
                f"distillation.standardise has {', '.join(sorted(unknown))}: give some of {', '.join(STANDARDISED)}"
            )
        if self.temperature <= 0:
            raise ValueError(f"distillation.temperature is {self.temperature}: it must be above 0")
        for teacher in self.teachers or ():
            if teacher.weight <= 0:
                raise ValueError(
                    f"distillation.teachers: the weight of {teacher.path} is {teacher.weight}: it must be above 0, or "
                    "leave the teacher out"
                )

    def _check_relations(self) -> None:
        known, kinds = (*RELATIONS, *BETWEEN_IMAGES), [of.partition(":")[0] for of in self.relations]
        for given, kind in zip(self.relations, kinds, strict=True):
            _, colon, weight = given.partition(":")
            if kind not in known or (colon and not _is_above_0(weight)):
                raise ValueError(
                    f"distillation.relations has {given!r}: give some of {', '.join(known)}, each with a weight above "
                    "0 behind it or none, as queries:2"
                )
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"distillation.relations is {list(self.relations)}: give each kind once, and one at least")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"distillation.relation_heads is {self.relation_heads}: it must be 1 or more")

    @property
    def relation_weights(self) -> dict[str, float]:
        """Of each kind that is a target."""
        each = {kind: float(weight or 1) for kind, _, weight in (of.partition(":") for of in self.relations)}
        return {kind: weight * self.relations_weight for kind, weight in each.items() if self.relations_weight}

    @property
    def at_depth(self) -> dict[str, float]:
        """Of those that arise in matched blocks, the weights."""
        return {kind: weight for kind, weight in self.relation_weights.items() if kind in RELATIONS}

    @property
    def compares_rows(self) -> bool:
        """Whether features of patches are compared in matched blocks."""
        return bool(self.features_weight) or "gram" in self.at_depth

    @property
    def relates_images(self) -> bool:
        """Whether there are relations of whole images."""
        return self.at_depth != self.relation_weights

    @property
    def asks_teachers(self) -> bool:
        """Whether anything is to be like what a teacher makes of an image: else he has no layers, only weights."""
        return bool(self.weights.keys() - {"labels"})

    @property
    def pools(self) -> bool:
        """Whether pooled features are compared."""
        return bool(self.embeddings_weight) or self.relates_images

    @property
    def all_teachers(self) -> tuple[TeacherConfig, ...]:
        """One or several, as keys give them."""
        if self.teacher is not None:
            given = {name: getattr(self, f"teacher_{name}") for name in SHOWN_BY}
            return (TeacherConfig(path=self.teacher, **given),)
        return self.teachers or ()

    def at(self, paths: Sequence[str]) -> Self:
        """The same with teachers that lie elsewhere: a path for each of `all_teachers`."""
        if self.teacher is not None:
            return replace(self, teacher=paths[0])
        teachers = tuple(replace(of, path=path) for of, path in zip(self.all_teachers, paths, strict=True))
        return replace(self, teachers=teachers or None)

    @property
    def weights(self) -> dict[str, float]:
        """Of each target that has one, by its name in metrics."""
        found = {
            "response": self.response_weight, "embeddings": self.embeddings_weight, "features": self.features_weight,
            **self.relation_weights, "labels": self.label_weight,
        }  # fmt: skip
        return {name: weight for name, weight in found.items() if weight}

    @property
    def shares(self) -> tuple[float, ...]:
        """What of a target each teacher decides; their sum is 1."""
        total = sum(teacher.weight for teacher in self.all_teachers)
        return tuple(teacher.weight / total for teacher in self.all_teachers)

    def check(self) -> None:
        """Raise ConfigError where there is nobody or nothing to learn from, or keys contradict each other."""
        if (self.teacher is None) == (not self.teachers):
            given = "both are" if self.teachers else "neither is"
            raise ConfigError(
                f"objective is distillation: give either distillation.teacher, a checkpoint, or distillation.teachers, "
                f"a list of them: {given} set"
            )
        usual = type(self)
        for name in SHOWN_BY:
            key = f"teacher_{name}"
            if self.teachers and getattr(self, key) != getattr(usual, key):
                raise ConfigError(
                    f"distillation.{key} is {getattr(self, key)}, but there are distillation.teachers: give each its "
                    f"own {name}"
                )
        if isinstance(self.start_from, str) and self.start_from not in ("first", "even"):
            raise ConfigError(
                f"distillation.start_from is {self.start_from}: give first, even, or a list of the teacher's blocks, "
                "one for each of the student's"
            )
        if not self.weights:
            raise ConfigError(f"distillation.{', '.join(_WEIGHTS)} are all 0: nothing is learnt; give one a weight")
        if self.response == "hard" and self.temperature != usual.temperature:
            raise ConfigError(
                f"distillation.temperature is {self.temperature}, but distillation.response hard looks at the "
                "teacher's first class alone: leave it out, or use response kl"
            )
        if not (self.features_weight or self.at_depth) and self.pairs is not None:
            raise ConfigError(
                f"distillation.pairs is {self.pairs}, but distillation.features_weight is 0 and so is relations_weight "
                "of all relations between blocks: leave it out, or give one of them a weight"
            )
        if not self.relates_images and self.passes != usual.passes:
            raise ConfigError(
                f"distillation.passes is {self.passes}, but distillation.relations has neither distances nor angles, "
                "for which alone a step may take two: leave it out, or add one of them with a relations_weight"
            )
        owned = {
            "response": "response", "temperature": "response", "features": "features", "relations": "relations",
            "relation_heads": "relations",
        }  # fmt: skip
        for name, weight in owned.items():
            value = getattr(self, name)
            if not getattr(self, f"{weight}_weight") and value != getattr(usual, name):
                raise ConfigError(
                    f"distillation.{name} is {value}, but distillation.{weight}_weight is 0: leave it out, or give the "
                    f"{weight} a weight"
                )
        for what in self.standardise:
            if not getattr(self, f"{STANDARDISED[what]}_weight"):
                raise ConfigError(
                    f"distillation.standardise has {what}, but distillation.{STANDARDISED[what]}_weight is 0: leave it "
                    "out, or give that a weight"
                )
        if "logits" in self.standardise and self.response != "kl":
            raise ConfigError(
                f"distillation.standardise has logits, but distillation.response is {self.response}, which looks at "
                "each class by itself or at the first alone: leave it out, or use response kl"
            )
        if not self.asks_teachers and (self.start_from is None or len(self.all_teachers) > 1):
            raise ConfigError(
                f"distillation.label_weight is {self.label_weight} and all other weights are 0, so nothing is asked of "
                f"{' and '.join(of.path for of in self.all_teachers)}: give another target a weight, use objective "
                "supervised, or one teacher whose weights the student starts from (start_from)"
            )
        for teacher in () if self.asks_teachers else self.all_teachers:
            for name in (name for name in SHOWN_BY if name != "load_weights"):
                if (value := getattr(teacher, name)) != getattr(TeacherConfig, name):
                    raise ConfigError(
                        f"the teacher {teacher.path} has {name} {value}, but he is shown no image, as nothing but his "
                        "weights is asked of him (distillation.start_from): leave it out, or give another target than "
                        "labels a weight"
                    )
        cut = {"queries", "keys", "values"} & self.relation_weights.keys()
        if self.relation_heads is not None and not cut:
            raise ConfigError(
                f"distillation.relation_heads is {self.relation_heads}, but of what is cut into heads anew, queries, "
                "keys, values, distillation.relations has none: leave it out, or add one of them"
            )


def _is_above_0(text: str) -> bool:
    try:
        return 0 < float(text) < inf
    except ValueError:
        return False
