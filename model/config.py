"""What the model is: the `model` group of the configuration, and its resolution against a preset."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from model.checks import check_fit, check_numbers, check_used
from model.kinds import KINDS, parse_kinds
from model.presets import PRESETS
from model.sizes import Sizes, StageSizes, class_rows, class_tokens_of

_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "in_channels": 3,
    "block": "sequential",
    "norm": "layernorm",
    "norm_eps": 1e-6,
    "mlp": "gelu",
    "layer_scale": 0.0,
    "qk_norm": False,
    "qk_norm_over": "head",
    "qk_norm_bias": False,
    "bias": True,
    "gelu": "erf",
    "patch_bias": True,
    "pre_norm": False,
    "position": "learned_2d",
    "class_position": True,
    "rope_base": 100.0,
    "relative_position": False,
    "pool": "map",
    "norm_after_pool": False,
    "classifier_bias": True,
    "registers": 0,
    "global_tokens": 0,
    "attention": "full",
    "window_size": 7,
    "feature_map": "elu",
    "linear_conv": 0,
    "num_classes": 1000,
}


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a pyramid."""

    depth: int
    """Number of blocks; 0, of a last stage with merge false: its tokens are projected to its width for the head."""

    width: int
    """Features of a token."""

    num_heads: int
    """Attention heads."""

    mlp_dim: int | None = None
    """Hidden features of the MLP (usually 4 x width)."""

    attention: str | tuple[str, ...] | None = None
    """As model.attention, for the blocks of this stage; null takes model.attention."""

    window_size: int | None = None
    """Side of a window in patches; null takes model.window_size."""

    grid_size: int | None = None
    """Side of the spread-out grid in patches; null takes model.grid_size, or this stage's window_size where that is
    null."""

    merge: bool = True
    """Whether 2 x 2 patches of the stage before become one; false: the map stays, and tokens are projected to this
    width."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model is. A key left null takes its value from the preset, or else its usual value."""

    preset: str | None = None
    """Published architecture to start from (vit_ti16, vit_s16, vit_b16, vit_l16, vit_h14, vit_g14, vit_gg14, vit_e14,
    vit_22b, siglip2_gopt16, internvit_6b, dinov3_7b, swin_t, hiera_b); keys given beside it override it."""

    image_size: int | tuple[int, int] | None = None
    """Side of a square image, or [rows, columns], in pixels (usually 224). What does not fill a patch is padded with
    zeros at the bottom and the right."""

    patch_size: int | None = None
    """Side of a patch, in pixels (usually 16)."""

    in_channels: int | None = None
    """Channels of the image (usually 3)."""

    width: int | None = None
    """Features of a token. Needed without a preset."""

    depth: int | None = None
    """Number of blocks. Needed without a preset."""

    num_heads: int | None = None
    """Attention heads. Needed without a preset."""

    mlp_dim: int | None = None
    """Hidden features of the MLP (usually 4 x width)."""

    stages: tuple[StageConfig, ...] | None = None
    """A pyramid, in the place of width, depth, num_heads and mlp_dim: between two stages four neighbouring patches are
    merged into one."""

    block: Literal["parallel", "sequential"] | None = None
    """Attention and MLP beside each other (ViT-22B), or one after the other with a norm before each (ViT-B)."""

    norm: Literal["layernorm", "rmsnorm"] | None = None
    """LayerNorm, or RMSNorm, which has no mean and no bias."""

    norm_eps: float | None = None
    """Added to the variance in every norm of the model (usually 1e-6)."""

    mlp: Literal["gelu", "swiglu"] | None = None
    """fc1, GELU, fc2; or gated: silu(gate) * value between them (Shazeer 2020)."""

    layer_scale: float | None = None
    """Initial factor of each branch, learned per feature (Touvron et al. 2021, CaiT); 0: none."""

    qk_norm: bool | None = None
    """Norm of queries and keys (ViT-22B)."""

    qk_norm_over: Literal["head", "width"] | None = None
    """What that norm is taken over: each head's features, with a scale that the heads share, or those of all heads
    together (InternViT)."""

    qk_norm_bias: bool | None = None
    """Biases on that norm."""

    bias: bool | None = None
    """Biases on q, k, v and the LayerNorms; the MLP, the output projections, attention pooling, patch merges and the
    head always have theirs."""

    norm_bias: bool | None = None
    """Biases on the LayerNorms; null as bias."""

    qkv_bias: Literal["all", "none", "qv"] | None = None
    """Biases on queries, keys and values: on all, on none, or on queries and values (BEiT, DINOv3), as one on the keys
    changes nothing under a softmax; null all or none, as bias."""

    gelu: Literal["erf", "tanh", "quick"] | None = None
    """The exact GELU, its tanh approximation, or x * sigmoid(1.702 x) (OpenAI's CLIP)."""

    patch_bias: bool | None = None
    """Bias of the patch embedding (usually true; CLIP has none)."""

    pre_norm: bool | None = None
    """Norm of the tokens after the embedding (CLIP's ln_pre, Swin's patch norm)."""

    position: Literal["learned_2d", "learned_1d", "sincos_2d", "rope_2d", "none"] | None = None
    """Position: a learned row table plus a learned column table, one learned table, fixed sines, queries and keys
    rotated by row and column, or none."""

    class_position: bool | None = None
    """Whether class tokens have rows of their own in the table of position learned_1d (usually true)."""

    rope_base: float | None = None
    """Longest period of rope_2d, in units of half the image (usually 100)."""

    relative_position: bool | None = None
    """A learned table per layer, head and offset of two patches in a window, added to attention's logits (Liu et al.
    2021, Swin); all layers of model.attention must be window or shifted_window."""

    attention: str | tuple[str, ...] | None = None
    """Kind of attention of all layers, or of each: a list, or a pattern such as '[window, window, full] * 4'. Kinds:
    full, window, shifted_window, grid, global_tokens, linear, causal."""

    window_size: int | None = None
    """Side of a window in patches (usually 7)."""

    grid_size: int | None = None
    """Side of the spread-out grid of attention kind grid, in patches; null takes window_size."""

    feature_map: Literal["elu", "relu", "focused"] | None = None
    """Of linear attention: elu + 1, relu, or relu cubed at its length (Han et al. 2023)."""

    linear_conv: int | None = None
    """Side of the depth-wise convolution of v that linear attention adds, odd; 0: none."""

    pool: Literal["map", "cls", "gap", "cls_gap"] | None = None
    """From tokens to one vector: attention pooling with a learned probe, a class token, the mean of the patches, or
    class token and mean side by side (DINOv2)."""

    norm_after_pool: bool | None = None
    """Whether the final norm is of the pooled vector (timm's fc_norm) rather than of the tokens."""

    class_tokens: int | None = None
    """Learned tokens that may be pooled: 0, 1, or 2, of which the second is DeiT's distillation token, with a
    classifier of its own, and logits are the mean of both; null: 1 where pool is cls or cls_gap, else 0."""

    registers: int | None = None
    """Extra learned tokens without an output of their own (Darcet et al. 2023)."""

    global_tokens: int | None = None
    """Extra learned tokens that the layers of kind global_tokens attend to."""

    drop_path: float = 0.0
    """Largest rate of stochastic depth, that of the last block; rates grow linearly from 0."""

    num_classes: int | None = None
    """Classes of the head (usually 1000); 0: no classifier, the model gives the pooled features."""

    classifier_bias: bool | None = None
    """Bias of the classifier (usually true; CLIP's projection has none)."""

    head_bias: float | None = None
    """Initial bias of the head: null means -10 for the sigmoid loss (ViT-22B), 0 for softmax."""

    def resolve(self) -> ModelConfig:
        """Every key filled in, from the preset and the usual values.

        Raises:
            ValueError: an unknown preset, a needed key that is missing, or values that contradict each other; the
                message names the key, the value and what would work.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"model.preset {self.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        base = _DEFAULTS | (PRESETS[self.preset] if self.preset else {})
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.stages is not None or (base.get("stages") and not any(given[k] for k in _ISOTROPIC)):
            base = {k: v for k, v in base.items() if k not in _ISOTROPIC}
            if self.stages is None and self.attention is not None:  # the user's, not the preset's
                base["stages"] = tuple({**stage, "attention": None} for stage in base["stages"])
        elif base.get("stages"):
            raise ValueError(f"model.preset {self.preset} is a pyramid: change model.stages, not {_named(given)}")
        merged = given | {k: v for k, v in base.items() if given[k] is None}
        if merged["stages"] is None:
            for name in _ISOTROPIC[:3]:
                if merged[name] is None:
                    raise ValueError(f"model.{name} is not set: give it, or a model.preset, or model.stages")
            if merged["mlp_dim"] is None:
                merged["mlp_dim"] = 4 * merged["width"]
        elif _named(given):
            raise ValueError(f"model.stages stands in the place of {_named(given)}: give them per stage")
        else:
            stages = [s if isinstance(s, StageConfig) else StageConfig(**s) for s in merged["stages"]]
            if not stages:
                raise ValueError("model.stages is empty: give at least one stage, or null")
            merged["stages"] = tuple(
                replace(
                    s,
                    mlp_dim=_first(s.mlp_dim, 4 * s.width),
                    window_size=_first(s.window_size, merged["window_size"]),
                    grid_size=_first(s.grid_size, merged["grid_size"], s.window_size, merged["window_size"]),
                )
                for s in stages
            )
        usual = {"norm_bias": merged["bias"], "qkv_bias": "all" if merged["bias"] else "none"} | base
        merged |= {key: usual[key] for key in ("norm_bias", "qkv_bias") if merged[key] is None}
        if merged["grid_size"] is None:
            merged["grid_size"] = merged["window_size"]
        if merged["class_tokens"] is None:
            merged["class_tokens"] = class_tokens_of(merged["pool"])
        resolved = replace(self, **merged)
        check_numbers(resolved)
        sizes = resolved.sizes
        check_fit(resolved, sizes)
        check_used(resolved, sizes, given=self, usual=usual)
        return resolved

    @property
    def image(self) -> tuple[int, int]:
        """Rows and columns of pixels, of a resolved configuration."""
        assert self.image_size is not None, "not resolved"
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @property
    def sizes(self) -> Sizes:
        """The numbers of a resolved configuration. Raises ValueError where model.attention does not fit its depth."""
        assert self.patch_size and self.in_channels and self.num_classes is not None, "not resolved"
        assert self.attention is not None and self.class_tokens is not None
        assert self.registers is not None and self.global_tokens is not None
        return Sizes(
            image=self.image,
            patch=self.patch_size,
            channels=self.in_channels,
            classes=self.num_classes,
            class_tokens=self.class_tokens,
            class_rows=class_rows(self.position, self.class_tokens, self.class_position),
            registers=self.registers,
            global_tokens=self.global_tokens,
            stages=tuple(self._stages()),
        )

    def _stages(self) -> list[StageSizes]:
        assert self.patch_size and self.window_size is not None and self.grid_size is not None
        assert self.attention is not None
        rows, cols = (-(-side // self.patch_size) for side in self.image)
        stages, key = self.stages, "model.stages[{}].attention"
        if stages is None:
            assert self.width is not None and self.depth is not None and self.num_heads is not None
            stages = (StageConfig(depth=self.depth, width=self.width, num_heads=self.num_heads, mlp_dim=self.mlp_dim),)
        whole = None  # model.attention written for all blocks of a pyramid that do not name their own
        shared = [s.depth for s in stages if s.attention is None]
        if shared and (not isinstance(self.attention, str) or self.attention.strip() not in KINDS):
            whole = list(parse_kinds(self.attention, sum(shared)))
        out, stride = list[StageSizes](), self.patch_size
        for i, s in enumerate(stages):
            if merges := bool(i) and s.merge:
                rows, cols, stride = -(-rows // 2), -(-cols // 2), 2 * stride
            if s.attention is not None:
                kinds = parse_kinds(s.attention, s.depth, key.format(i))
            elif whole is not None:
                kinds, whole = tuple(whole[: s.depth]), whole[s.depth :]
            else:
                kinds = parse_kinds(self.attention, s.depth)
            window, grid = _first(s.window_size, self.window_size), _first(s.grid_size, self.grid_size)
            assert s.mlp_dim is not None
            out.append(
                StageSizes(
                    index=i, depth=s.depth, width=s.width, heads=s.num_heads, mlp=s.mlp_dim, kinds=kinds, window=window,
                    grid=grid, merges=merges, rows=rows, cols=cols, stride=stride,
                )
            )  # fmt: skip
        return out


def _first(*values: int | None) -> int:
    """The first that is given."""
    return next(value for value in values if value is not None)


_ISOTROPIC = ("width", "depth", "num_heads", "mlp_dim")


def _named(given: dict[str, Any]) -> str:
    return ", ".join(f"model.{k}" for k in _ISOTROPIC if given[k] is not None)
