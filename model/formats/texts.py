"""What formats of two towers share on the text's side, and where the two meet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Pairing, Shape
from model.formats.expressible import ANY, check_expressible
from model.formats.pairs import ALONE, BIAS, SCALE, paired, text_model
from model.formats.rules import Rule, rule
from model.formats.sources import Source
from model.formats.ways import AtMost, Same, Void
from model.text import TextConfig


@dataclass(frozen=True, kw_only=True)
class Forms:
    """Which text towers a format has.

    Attributes:
        pools, attention, projections: values of the keys of `text`, the last with contrastive.projection in its place.
            allowed: of other keys, as of `check_expressible`.
    """

    pools: Collection[str]
    attention: Collection[str]
    projections: Collection[str]
    allowed: Mapping[str, object]


def checked_text(title: str, pairing: Pairing, forms: Forms) -> ModelConfig:
    """The text tower as a model. Raises ConversionError, by key, for what a format has not.

    Args:
        title: of the format.
    """
    model, projection = text_model(pairing)
    kinds = ", ".join(dict.fromkeys(kind for stage in model.sizes.stages for kind in stage.kinds))
    found = {"pool": (pairing.text.pool, forms.pools), "attention": (kinds, forms.attention)}
    for key, (value, choices) in {**found, "projection": (projection, forms.projections)}.items():
        if value not in choices:
            raise ConversionError(f"text.{key} is {value}: {title} has no such models, only {', '.join(choices)}")
    try:
        alike = replace(model, pool="gap", attention="full", classifier_bias=True)
        check_expressible(title, alike, {"norm_eps": ANY, "gelu": ANY, **forms.allowed})
    except ConversionError as error:
        raise ConversionError(str(error).replace("model.", "text.")) from error
    return model


def joined(source: Source, image: Description, text: TextConfig, embedding: int, *, has_bias: bool) -> Description:
    """Two towers, whose scale and bias are called `logit_scale` and `logit_bias`. Raises ConversionError, as `paired`.

    Args:
        image: by itself. text: not resolved. embedding: features that both are compared in.
    """
    names = ["logit_scale", *(["logit_bias"] if has_bias else [])]
    if missing := [name for name in names if name not in source.tensors]:
        raise ConversionError(f"{source.path} has two towers, and no {missing[0]}; {ALONE}")
    scale, bias = (source.read(name).reshape(-1) if name in names else None for name in ("logit_scale", "logit_bias"))
    assert scale is not None
    if len(scale) != 1 or (bias is not None and len(bias) != 1):
        raise ConversionError(f"{source.path}: logit_scale has {len(scale)} numbers: this model has one; {ALONE}")
    try:
        resolved = text.resolve()
    except ValueError as error:
        raise ConversionError(f"{source.path}: its text tower is none of this program: {error}; {ALONE}") from error
    return paired(image, text=resolved, embedding=embedding, scale=scale, bias=bias)


def meeting(pairing: Pairing, shape: Shape, *, has_bias: bool) -> list[Rule]:
    """Rules of the scale, which is written as it counts, and of the bias of logits.

    Args:
        shape: that one number has there. has_bias: whether there is a bias there.
    """
    rules = [rule(SCALE, "logit_scale", way=AtMost(pairing.max_logit_scale or float("inf"), shape))]
    if has_bias:
        own = pairing.bias is not None
        way = Same((1,), shape) if own else Void(shape, 0.0)
        rules.append(rule(BIAS if own else "", "logit_bias", way=way))
    return rules
