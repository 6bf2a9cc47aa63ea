"""Two towers in the place of one model: what their description says of layers and tensors, of the image tower alone,
and as groups of a configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields, replace
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Pairing, Shape
from model.formats.rules import Rule
from model.layers import LayerSpec, logical_shapes
from model.projection import Projection
from model.text import TextConfig
from model.towers import PAIR, build_towers, projected

SCALE, BIAS = f"{PAIR}.logit_scale", f"{PAIR}.logit_bias"
ALONE = "--towers image, or VisionTransformer.from_pretrained, takes the image tower alone"
TAUGHT_BY = ("teacher_dtype", "teacher_load_weights", "affinity_weight", "embeddings_weight")
"""Keys of objective contrastive of how a teacher is run and weighted."""
OF_THE_RUN = ("passes", "teacher", *TAUGHT_BY)
"""Those that are a run's own: a model has them no longer."""
_KEYS = ("loss", "embedding", "projection", "projection_bias", "temperature", "max_logit_scale", "bias")
_MOST_SCALE = 100.0  # to which CLIP, and a run of loss infonce, hold the scale
_ROUNDING = 1 + 1e-6


def layers_of(description: Description) -> list[LayerSpec] | None:
    """Of two towers; None of one model, whose layers are those of its configuration."""
    if (p := description.pairing) is None:
        return None
    return build_towers(
        description.model, p.text, embedding=p.embedding, projection=p.projection, projection_bias=p.projection_bias,
        temperature=p.temperature, max_logit_scale=p.max_logit_scale or math.inf, bias=p.bias,
    )  # fmt: skip


def shapes_of(description: Description) -> dict[str, Shape]:
    """Of all tensors of a model, or of two towers, by their names."""
    return logical_shapes(description.model, layers_of(description))


def image_of(description: Description) -> Description:
    """The image tower by itself, its linear projection as the classifier; of one model, that."""
    if (p := description.pairing) is None:
        return description
    return tower_alone(description, p.embedding, p.projection, projection_bias=p.projection_bias)


def tower_alone(
    description: Description, embedding: int, projection: Projection, *, projection_bias: bool
) -> Description:
    """The image tower, which is projected so, by itself, a linear projection as its classifier."""
    model = projected(description.model, embedding, projection, projection_bias=projection_bias)
    return replace(description, model=model.resolve(), pairing=None, embeds=bool(model.num_classes))


def paired(image: Description, *, text: TextConfig, embedding: int, scale: Tensor, bias: Tensor | None) -> Description:
    """Two towers, of the image tower by itself.

    Args:
        image: whose classifier, if there is one, is the projection. text: resolved. embedding: features that both are
            compared in. scale, bias: of logits there, the first one's logarithm.

    Raises:
        ConversionError: a tower does not give so many features.
    """
    m = image.model
    gives = {"images": m.num_classes or m.sizes.last.width}
    gives["texts"] = text.width or 0 if text.projection == "none" else embedding
    for what, features in gives.items():
        if features != embedding:
            raise ConversionError(
                f"the towers do not join: {what} have {features} features, and are to be compared in {embedding}; "
                f"{ALONE}"
            )
    factor = float(scale.double().exp())
    if not 0 < factor < math.inf:
        raise ConversionError(f"the logarithm of the scale of logits is {float(scale)}: no run has left it so; {ALONE}")
    pairing = Pairing(
        text=text,
        loss="infonce" if bias is None else "sigmoid",
        embedding=embedding,
        projection="linear" if m.num_classes else "none",
        projection_bias=bool(m.num_classes and m.classifier_bias),
        temperature=1 / factor,
        max_logit_scale=max(_MOST_SCALE, factor * _ROUNDING) if bias is None else 0.0,
        bias=None if bias is None else float(bias),
    )
    model = replace(m, num_classes=0, classifier_bias=None, head_bias=None).resolve()
    return replace(image, model=model, labels=(), pairing=pairing, embeds=False)


def pairing_in(description: Description) -> Pairing:
    """Of a description of two towers."""
    assert description.pairing is not None
    return description.pairing


def text_model(pairing: Pairing) -> tuple[ModelConfig, Projection]:
    """The text tower as a model, and how it is projected."""
    projection = pairing.text.projection or pairing.projection
    return pairing.text.model(pairing.embedding, projection), projection


def within(tower: str, rules: Iterable[Rule]) -> list[Rule]:
    """Rules of a model by itself, as those of the tower that it is one of."""

    def named(name: str) -> str:
        return f"{tower}.{name}" if name else name

    return [replace(r, ours=named(r.ours), more=tuple(map(named, r.more))) for r in rules]


# -- as groups of a configuration --------------------------------------------------------------------------------------


def config_of(description: Description) -> dict[str, Any]:
    """Groups and keys that a run of this model would have."""
    config: dict[str, Any] = {"model": asdict(description.model)}
    if (p := description.pairing) is not None:
        keys = {key: getattr(p, key) for key in _KEYS} | dict(p.others)
        config |= {"text": asdict(p.text), "contrastive": keys, "objective": "contrastive"}
    if (images := description.preprocessing) is not None:
        config["data"] = {"mean": images.mean, "std": images.std}
    return config


def is_contrastive(config: Mapping[str, Any]) -> bool:
    """Whether the configuration of a checkpoint is of a contrastive run, of one tower or two."""
    return config.get("objective") == "contrastive"


def has_texts(config: Mapping[str, Any]) -> bool:
    """Whether it is of two towers."""
    return is_contrastive(config) and config.get("contrastive", {}).get("pairs", "image_text") == "image_text"


def pairing_of(config: Mapping[str, Any], tuples: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Pairing:
    """Of the configuration of a checkpoint of two towers, as JSON has it.

    Args:
        tuples: the same keys with lists as tuples.

    Raises:
        KeyError, TypeError, ValueError: it is of another version.
    """
    found = config["contrastive"]
    if strange := sorted(set(config["text"]) - {f.name for f in fields(TextConfig)}):
        raise ValueError(f"text.{strange[0]} is no key of this version")
    keys = {key: found[key] for key in _KEYS if key in found}
    others = {key: value for key, value in found.items() if key not in (*_KEYS, *OF_THE_RUN)}
    return Pairing(text=TextConfig(**tuples(config["text"])).resolve(), **keys, others=others)
