"""What a file of big_vision is: how its names are made up, and the sizes that they tell.

Legend: P patch side, N patches, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from model.formats.base import ConversionError, Preprocessing, Shape
from model.formats.rules import entry
from model.formats.sources import Source

PREFIXES = ("params/img/", "params/", "opt/target/img/", "opt/target/", "img/", "")
POSITIONS = ("pos_embedding", "Transformer/pos_embedding", "Transformer/posembed_input/pos_embedding")
KEPT = "vitruvius.json"  # what the file's comment says that its arrays do not


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a file has its names.

    Attributes:
        prefix: of all names. scan: whether layers are stacked. position: where the positions are; empty: fixed sines.
        old: whether the parts of a block are numbered through, as vision_transformer does.
    """

    prefix: str = "params/"
    scan: bool = False
    position: str = POSITIONS[0]
    old: bool = False

    def block(self, i: int, name: str) -> str:
        """A tensor of a block: `LayerNorm_0/scale`."""
        if self.old:
            name = re.sub(r"^(LayerNorm_1|Multi\w+_0|MlpBlock_0)", lambda found: _OLD[found[0]], name)
        stack = f"{self.prefix}Transformer/encoderblock"
        return entry(f"{stack}/{name}", i) if self.scan else f"{stack}_{i}/{name}"


MHA = "MultiHeadDotProductAttention"
_OLD = {"LayerNorm_1": "LayerNorm_2", f"{MHA}_0": f"{MHA}_1", "MlpBlock_0": "MlpBlock_3"}


class Shapes:
    """Shapes of a file's tensors, which may be missing."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def of(self, name: str, dims: int) -> Shape:
        """Raises ConversionError if it has not as many dims."""
        found = self._source.tensors.get(name)
        if found is None or len(found.shape) != dims:
            shown = "is missing" if found is None else f"is {list(found.shape)}"
            raise ConversionError(f"{self._source.path}: {name} {shown}, it should have {dims} dims")
        return found.shape


def layout_of(source: Source) -> Layout:
    names = source.tensors
    prefix = next((p for p in PREFIXES if f"{p}embedding/kernel" in names), None)
    if prefix is None:
        raise ConversionError(
            f"{source.path} has no embedding/kernel, below none of {', '.join(p for p in PREFIXES if p)}"
        )
    if any(name.startswith(f"{prefix}pre_logits/") for name in names):
        raise ConversionError(
            f"{source.path} has {prefix}pre_logits, a layer before the classifier, which this model has not: without "
            f"it the features are those before it (--leave_out '{prefix}pre_logits/*' --leave_out '{prefix}head/*')"
        )
    if len(names[f"{prefix}embedding/kernel"].shape) == 2:
        raise ConversionError(f"{source.path} is a NaFlex model (images of any ratio), which this model is not")
    scan = f"{prefix}Transformer/encoderblock/LayerNorm_0/scale" in names
    first = f"{prefix}Transformer/encoderblock{'' if scan else '_0'}/"
    position = next((at for at in POSITIONS if prefix + at in names), "")
    return Layout(prefix=prefix, scan=scan, position=position, old=f"{first}{MHA}_1/query/kernel" in names)


def blocks_of(source: Source, layout: Layout) -> tuple[int, str]:
    """(how many, name of a tensor of the first)."""
    start = f"{layout.prefix}Transformer/encoderblock"
    if layout.scan:
        shape = Shapes(source).of(f"{start}/LayerNorm_0/scale", 2)
        return shape[0], f"{start}/{{}}"
    numbers = [int(n) for name in source.tensors for n in re.findall(f"^{re.escape(start)}_(\\d+)/", name)]
    return max(numbers, default=-1) + 1, f"{start}_0/{{}}"


def image_of(source: Source, layout: Layout, patch: int, given: Any) -> tuple[int | tuple[int, int], bool]:
    """(its size, whether the class token has a position of its own)."""
    size = tuple(given) if isinstance(given, list | tuple) else given
    sides = size if isinstance(size, tuple) else (size, size)
    if not layout.position:
        if size is None:
            raise ConversionError(f"{source.path} has no positions (they are sines), so no size: give model.image_size")
        return size, False
    count = Shapes(source).of(layout.prefix + layout.position, 3)[1]
    cls = f"{layout.prefix}cls" in source.tensors
    if size is not None:
        patches = math.prod(-(-int(side) // patch) for side in sides)
        if count - patches not in ((0, 1) if cls else (0,)):
            raise ConversionError(
                f"{source.path} has {count} positions, and model.image_size {given} has {patches} patches of {patch}"
            )
        return size, count != patches
    for extra in (0, 1) if cls else (0,):
        side = math.isqrt(count - extra)
        if side * side == count - extra:
            return side * patch, bool(extra)
    raise ConversionError(f"{source.path} has {count} positions, no square: give model.image_size [rows, columns]")


def preprocessing_of(kept: Mapping[str, Any]) -> Preprocessing:
    """As the file's comment says; big_vision's own are -1 to 1, and the whole image, squashed."""
    values = kept.get("preprocessing")
    if not values:
        return Preprocessing(squash=True)
    try:
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return Preprocessing(**tuples)
    except (TypeError, AttributeError) as error:
        raise ConversionError(f"the file's comment says what is no preprocessing: {error}") from error
