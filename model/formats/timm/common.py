"""What timm's Vision Transformers and Swin share: sizes in their arguments, norms, and rows of positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from model.config import ModelConfig
from model.formats.base import ConversionError
from model.formats.expressible import whole_patches
from model.formats.rules import Rule, rule
from model.formats.timm.arguments import Constructor
from model.formats.ways import Kept, Void


def refuse_unless(made: Constructor, allowed: Mapping[str, set[Any]]) -> None:
    """Raise ConversionError for the first argument that is none of the allowed values."""
    for key, values in allowed.items():
        if (value := made[key]) not in values:
            can = " or ".join(sorted(str(v) for v in values if v not in (None, "")))
            raise ConversionError(f"timm's {made.name} has {key} {value!r}: this model has only {can or 'none'}")


def patch_of(made: Constructor) -> int:
    """Side of a patch. Raises ConversionError if it has two."""
    size = made["patch_size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ConversionError(f"timm's {made.name} has patch_size {size}: this model's patches are square")
    return int(sides.pop())


def image_of(made: Constructor, *, whole: bool = True) -> int | tuple[int, int]:
    """Our `model.image_size`: the pixels that a model sees. What is left beside the last whole patch, timm drops.

    Args:
        whole: patches alone.
    """
    return whole_patches(made["img_size"], patch_of(made) if whole else 1)


def mlp_of(width: int, ratio: float) -> int:
    """Hidden features of timm's MLPs."""
    return int(width * ratio)


def ratio_of(width: int, mlp: int) -> float:
    """The inverse: timm's `mlp_ratio`."""
    return next(r for r in (mlp / width, (mlp + 0.5) / width) if mlp_of(width, r) == mlp)


def norm_rules(ours: str, theirs: str, model: ModelConfig, width: int, *, bias: bool | None = None) -> list[Rule]:
    """Of a norm; all LayerNorms there have a bias, of zeros where ours has none."""
    found = [rule(f"{ours}.weight", f"{theirs}.weight")]
    if model.norm == "rmsnorm":
        return found
    has = bool(model.norm_bias) if bias is None else bias
    return [*found, bias_rule(f"{ours}.bias", f"{theirs}.bias", width, has)]


def bias_rule(ours: str, theirs: str, width: int, has: bool) -> Rule:
    """Of a bias that is always there, and zeros where ours has none."""
    return rule(ours, theirs) if has else rule("", theirs, way=Void((width,)))


def qkv_rules(model: ModelConfig, width: int, ours: str, theirs: str) -> list[Rule]:
    """Of the projection to queries, keys and values; where only ours has no bias on the keys, theirs is zero."""
    found = [rule(f"{ours}.weight", f"{theirs}.weight")]
    if model.qkv_bias == "none":
        return found
    kept = ((0, 3 * width),) if model.qkv_bias == "all" else ((0, width), (2 * width, 3 * width))
    return [*found, rule(f"{ours}.bias", f"{theirs}.bias", way=Kept(kept, 3 * width))]


@dataclass(frozen=True)
class AddedRows:
    """Tokens that have a position there, and none here: ours are their sums, theirs get rows of zeros (which are
    written with the other positions).

    Attributes:
        first: row of the first of them in the table of positions. count: of tokens. width: of each.
    """

    first: int
    count: int
    width: int

    def to_ours(self, theirs: Sequence[Tensor]) -> Tensor:
        """[1, R, D] and positions [1, S, D] -> [R, D]."""
        tokens, positions = theirs
        return (tokens + positions[:, self.first : self.first + self.count]).reshape(self.count, self.width)

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """[R, D] -> [1, R, D]."""
        return [ours.reshape(1, self.count, self.width)]
