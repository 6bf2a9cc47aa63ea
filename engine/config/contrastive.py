"""Keys of objective contrastive: what is made alike, how alikeness is measured, and how a step goes about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from engine.errors import ConfigError
from model.formats.pairs import TAUGHT_BY
from model.projection import Projection

_TEMPERATURES = {"infonce": 0.07, "sigmoid": 0.1, "supcon": 0.07}
_VIEWS_TEMPERATURE = 0.1
_MOST_SCALE = 100.0
_BIAS = -10.0


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """What is made alike: images and their texts, or two views of one image. A key left null takes its usual value."""

    loss: Literal["infonce", "sigmoid", "supcon"] = "infonce"
    """Cross entropy over all of the global batch in both directions (CLIP), one binary cross entropy per pair (SigLIP),
    or cross entropy with several true partners (supervised contrastive; Khosla et al. 2020)."""

    pairs: Literal["image_text", "views"] = "image_text"
    """Image and caption, or two augmented views of each image (SimCLR; Chen et al. 2020)."""

    positives: Literal["pair", "label", "image"] | None = None
    """Who belongs together: the two of a pair alone (infonce, sigmoid), all of one class, or all rows of one image,
    which comes data.repeats times (both supcon); null: pair, and for supcon label."""

    embedding: int = 512
    """Features that both sides are projected to, and compared in."""

    projection: Projection = "linear"
    """From pooled features to the embedding: one matrix, two with a GELU between them (SimCLR: mlp), or none, where the
    features are the embedding (SigLIP's images)."""

    projection_bias: bool = False
    """Bias of the image's linear projection; the text tower has text.projection_bias."""

    temperature: float | None = None
    """Similarities are divided by it; learned, it is where it starts. Null: 0.07, sigmoid and views 0.1."""

    learn_temperature: bool | None = None
    """Whether the temperature is trained; null: for images and texts it is, for views not."""

    max_logit_scale: float | None = None
    """Largest 1 / temperature: a learned one counts as no more in the forward pass, and no gradient leads it further;
    null: 100 (CLIP), sigmoid none; 0: none."""

    bias: float | None = None
    """Added to the logits, where it starts; null: -10 for sigmoid, the only loss that has one."""

    passes: Literal["auto", 1, 2] = "auto"
    """2: embeddings of all micro-batches first, then forward and backward with their gradients; 1: all forwards, whose
    activations stay, then all backwards. auto: 1 where one micro-batch, the schedule or the memory allow it."""

    momentum: float | None = None
    """Of a moving average of the weights, from the initial ones on, that makes the keys which views are compared with
    (MoCo v3); null: none, both views are made and trained alike (SimCLR)."""

    queue: int = 0
    """Keys of earlier steps, over all ranks, that queries are compared with in the place of the batch's (MoCo v1, v2);
    needs momentum. 0: those of the batch (v3)."""

    predictor: int = 0
    """Hidden features of an MLP that turns queries into guesses of keys (MoCo v3); needs momentum. 0: none."""

    teacher: str | None = None
    """Two towers whose alikeness of images and texts the student's is to be like, beside the loss (affinity mimicking;
    Wu et al. 2023, TinyCLIP): a checkpoint of this objective, or what tools.convert reads as both towers."""

    teacher_dtype: Literal["fp32", "bf16", "fp16", "fp8"] | None = None
    """As distillation.teacher_dtype."""

    teacher_load_weights: Literal["weights", "average"] = "weights"
    """As distillation.teacher_load_weights."""

    affinity_weight: float = 1.0
    """Of what the student's and the teacher's distributions over the batch differ by (KL divergence, each at its own
    temperature), the mean of both directions; the loss itself has weight 1. Needs a teacher. 0: it is no target."""

    embeddings_weight: float = 0.0
    """Of 1 less the cosine of a tower's embedding and the teacher's, the mean of both towers, the student's projected
    to the teacher's width where that differs (Yang et al. 2024, CLIP-KD). Needs a teacher. 0: it is no target."""

    def __post_init__(self) -> None:
        for name, least in (("embedding", 1), ("predictor", 0), ("queue", 0), ("max_logit_scale", 0.0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"contrastive.{name} is {value}: it must be {least:g} or more")
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"contrastive.temperature is {self.temperature}: it must be above 0")
        if self.projection_bias and self.projection != "linear":
            raise ValueError(
                f"contrastive.projection_bias is true, but contrastive.projection is {self.projection}: leave it out, "
                "or use linear"
            )
        for name in ("affinity_weight", "embeddings_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"contrastive.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.momentum is not None and not 0 <= self.momentum < 1:
            raise ValueError(f"contrastive.momentum is {self.momentum}: it must be from 0 to below 1")

    @property
    def has_texts(self) -> bool:
        """Whether there is a text tower."""
        return self.pairs == "image_text"

    @property
    def logit_scale(self) -> float:
        """Where the factor of similarities starts, of a resolved configuration."""
        assert self.temperature is not None
        return 1 / self.temperature

    def resolve(self) -> ContrastiveConfig:
        """Every key filled in.

        Raises:
            ConfigError: keys that contradict each other.
        """
        views, sigmoid = not self.has_texts, self.loss == "sigmoid"
        if self.bias is not None and not sigmoid:
            raise ConfigError(
                f"contrastive.bias is {self.bias}, but contrastive.loss {self.loss} has none, as one number added to "
                "all logits changes nothing under a softmax: leave it out, or use loss sigmoid"
            )
        positives = self.positives or ("label" if self.loss == "supcon" else "pair")
        if (positives == "pair") == (self.loss == "supcon"):
            knows = "several true partners" if self.loss == "supcon" else "one true partner"
            raise ConfigError(
                f"contrastive.positives is {positives}, but contrastive.loss {self.loss} is for {knows}: leave it out, "
                f"or use loss {'infonce or sigmoid' if self.loss == 'supcon' else 'supcon'}"
            )
        for name in ("momentum", "queue", "predictor"):
            value, usual = getattr(self, name), getattr(type(self), name)
            if value != usual and (not views or self.loss != "infonce"):
                raise ConfigError(
                    f"contrastive.{name} is {value}, but it is for contrastive.pairs views and loss infonce, not for "
                    f"{self.pairs} and {self.loss}: leave it out"
                )
        for name in ("queue", "predictor"):
            if (value := getattr(self, name)) and self.momentum is None:
                raise ConfigError(
                    f"contrastive.{name} is {value}, but no moving average makes keys: set contrastive.momentum, such "
                    "as 0.99"
                )
        for name in ("teacher", *TAUGHT_BY):
            value, usual_value = getattr(self, name), getattr(type(self), name)
            if value != usual_value and (views or (name != "teacher" and self.teacher is None)):
                needs = "pairs image_text, and there are views" if views else "a contrastive.teacher, and there is none"
                raise ConfigError(f"contrastive.{name} is {value}, but it is for {needs}: leave it out")
        if self.teacher is not None and not (self.affinity_weight or self.embeddings_weight):
            raise ConfigError(
                "contrastive.affinity_weight and embeddings_weight are 0, so nothing is to be as contrastive.teacher "
                f"{self.teacher} has it: give one of them a weight, or leave the teacher out"
            )
        scale = self.max_logit_scale
        usual = _VIEWS_TEMPERATURE if views else _TEMPERATURES[self.loss]
        resolved = replace(
            self,
            positives=positives,
            temperature=usual if self.temperature is None else self.temperature,
            learn_temperature=not views if self.learn_temperature is None else self.learn_temperature,
            max_logit_scale=(0.0 if sigmoid else _MOST_SCALE) if scale is None else scale,
            bias=_BIAS if self.bias is None and sigmoid else self.bias,
        )
        most = resolved.max_logit_scale
        if most and resolved.logit_scale > most * (1 + 1e-6):
            raise ConfigError(
                f"contrastive.temperature {resolved.temperature} is a logit scale of {resolved.logit_scale:g}, above "
                f"contrastive.max_logit_scale {most:g}: use a temperature of {1 / most:g} or more, or a larger limit"
            )
        return resolved
