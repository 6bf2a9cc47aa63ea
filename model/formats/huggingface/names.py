"""How transformers' vision models call their tensors, and the rules that follow from it.

Legend: D width, N patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from model.config import ModelConfig
from model.formats.expressible import check_whole_patches
from model.formats.rules import Rule, rule
from model.formats.ways import Constant, Joined, Kept, Permuted, Same, Void, Way

_BOTH = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class Names:
    """Of a kind, from the beginning of a name on; `block` has a place for the number of a layer.

    Attributes:
        patch: the patch embedding. position: the table of positions. cls, registers: of those tokens.
        block: what the names of a block begin with; norms, qkv, proj, up, down, scales: what follows, of our norm1 and
            norm2, attn.qkv, attn.proj, mlp.fc1 (two where the gate is apart), mlp.fc2, scale1 and scale2.
        norm, pre_norm: after the last block and before the first.
        linear_patch: whether the embedding is a matrix over rows, columns and channels of a patch, in this order.
    """

    patch: str
    position: str = ""
    cls: str = ""
    registers: str = ""
    block: str
    norms: tuple[str, str]
    qkv: tuple[str, str, str]
    proj: str
    up: tuple[str, ...]
    down: str
    scales: tuple[str, str] | None = None
    norm: str
    pre_norm: str = ""
    linear_patch: bool = False
    unbiased: frozenset[str] = field(default_factory=frozenset)
    """What of attn.proj, mlp.fc1, mlp.fc2 has no bias there."""


CLIP_ENCODER = Names(
    patch="embeddings.patch_embedding",
    position="embeddings.position_embedding.weight",
    block="encoder.layers.{}.",
    norms=("layer_norm1", "layer_norm2"),
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    proj="self_attn.out_proj",
    up=("mlp.fc1",),
    down="mlp.fc2",
    norm="post_layernorm",
)
"""Of the towers of CLIP, and of what was written after it: SigLIP."""


class LinearPatch(Permuted):
    """A patch embedding [D, C P P] that is a matrix [D, P P C] there."""

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        return [x.flatten(1) for x in super().to_theirs(ours)]


def rules_of(names: Names, m: ModelConfig, start: str) -> list[Rule]:
    """All of a model but its pooling and its classifier.

    Args:
        m: resolved. start: what all names begin with.

    Raises:
        ConversionError: images do not fill their patches.
    """
    check_whole_patches("transformers", m)
    rules = [*_embedding(names, m, start)]
    for i in range(m.sizes.depth):
        rules += block_rules(names, m, f"blocks.{i}.", start + names.block.format(i))
    return [*rules, *_pair("head.norm", start + names.norm)]


def _pair(ours: str, theirs: str, way: Way | None = None) -> list[Rule]:
    return [rule(f"{ours}.{k}", f"{theirs}.{k}", way=way) for k in _BOTH]


def _embedding(names: Names, m: ModelConfig, start: str) -> list[Rule]:
    sizes, width = m.sizes, m.sizes.last.width
    kernel: Way = Same((width, sizes.patch_features), (width, sizes.channels, sizes.patch, sizes.patch))
    if names.linear_patch:
        whole = (width, sizes.patch, sizes.patch, sizes.channels)
        kernel = LinearPatch(whole, (0, 3, 1, 2), (width, sizes.patch_features))
    rules = [rule("embed.weight", f"{start}{names.patch}.weight", way=kernel)]
    if m.patch_bias:
        rules.append(rule("embed.bias", f"{start}{names.patch}.bias"))
    if sizes.class_tokens:
        shape = (width,) if names.cls.endswith("class_embedding") else (1, 1, width)  # CLIP's
        rules.append(rule("embed.cls", start + names.cls, way=Same((1, width), shape)))
    if sizes.registers:
        way = Same((sizes.registers, width), (1, sizes.registers, width))
        rules.append(rule("embed.registers", start + names.registers, way=way))
    if m.pre_norm:
        rules += _pair("embed.norm", start + names.pre_norm)
    if names.position:
        rules.append(rule("embed.pos", start + names.position, way=_table(names, m)))
    return rules


def _table(names: Names, m: ModelConfig) -> Way:
    sizes, width = m.sizes, m.sizes.last.width
    patches = sizes.last.rows * sizes.last.cols
    flat = names.position.endswith(".weight")  # of an nn.Embedding
    shape = (sizes.class_tokens + patches, width)
    there = shape if flat else (1, *shape)
    if m.class_position or not sizes.class_tokens:
        return Same(shape, there)
    first, count = sizes.class_tokens, shape[0]  # rows of zeros there, and none here
    return Kept(((first, count),), count, len(there) - 2, (patches, width), there)


def block_rules(names: Names, m: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    width, gated = m.sizes.last.width, m.mlp == "swiglu"
    rules = []
    for i, name in enumerate(names.norms):
        rules += _pair(f"{ours}norm{i + 1}", theirs + name)
    qkv = [theirs + name for name in names.qkv]
    rules.append(rule(f"{ours}attn.qkv.weight", *(f"{n}.weight" for n in qkv), way=Joined((width,) * 3)))
    rules += _qkv_biases(f"{ours}attn.qkv.bias", [f"{n}.bias" for n in qkv], m, width)
    rules += _linear(f"{ours}attn.proj", theirs + names.proj, (width,), biased="attn.proj" not in names.unbiased)
    hidden = m.sizes.last.mlp
    up = [theirs + name for name in names.up]
    parts = Joined((hidden,) * len(up)) if len(up) > 1 else None
    rules.append(rule(f"{ours}mlp.fc1.weight", *(f"{n}.weight" for n in up), way=parts))
    if "mlp.fc1" in names.unbiased:
        rules.append(rule(f"{ours}mlp.fc1.bias", way=Constant((hidden * (1 + gated),))))
    else:
        rules.append(rule(f"{ours}mlp.fc1.bias", *(f"{n}.bias" for n in up), way=parts))
    rules += _linear(f"{ours}mlp.fc2", theirs + names.down, (width,), biased="mlp.fc2" not in names.unbiased)
    for i, name in enumerate(names.scales or ()):
        there = theirs + name
        rules.append(rule(f"{ours}scale{i + 1}", there) if m.layer_scale else rule("", there, way=Void((width,), 1.0)))
    return rules


def _linear(ours: str, theirs: str, shape: tuple[int, ...], *, biased: bool) -> list[Rule]:
    if biased:
        return _pair(ours, theirs)
    return [rule(f"{ours}.weight", f"{theirs}.weight"), rule(f"{ours}.bias", way=Constant(shape))]


def _qkv_biases(ours: str, theirs: Sequence[str], m: ModelConfig, width: int) -> list[Rule]:
    """Of q, k and v, by the form that the model has."""
    chosen = {"all": theirs, "qv": [theirs[0], theirs[2]], "none": []}[m.qkv_bias or "all"]
    return [rule(ours, *chosen, way=Joined((width,) * len(chosen)))] if chosen else []
