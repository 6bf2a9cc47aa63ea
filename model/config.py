"""What the model is: the `model` group of the configuration, and its resolution against a preset."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from model.presets import PRESETS

_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "in_channels": 3,
    "block": "sequential",
    "qk_norm": False,
    "bias": True,
    "gelu": "erf",
    "position": "learned_2d",
    "pool": "map",
    "registers": 0,
    "num_classes": 1000,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model is. A key left null takes its value from the preset, or else its usual value."""

    preset: str | None = None
    """Published architecture to start from (vit_ti16, vit_s16, vit_b16, vit_l16, vit_h14, vit_g14, vit_gg14, vit_e14,
    vit_22b); keys given beside it override it."""

    image_size: int | None = None
    """Side of the square image, in pixels (usually 224)."""

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

    block: Literal["parallel", "sequential"] | None = None
    """Attention and MLP beside each other (ViT-22B), or one after the other with a norm before each (ViT-B)."""

    qk_norm: bool | None = None
    """LayerNorm of queries and keys per head (ViT-22B)."""

    bias: bool | None = None
    """Biases on q, k, v and the LayerNorms; the MLP, the output projections and the head always have theirs."""

    gelu: Literal["erf", "tanh"] | None = None
    """The exact GELU, or its tanh approximation."""

    position: Literal["learned_2d", "learned_1d", "sincos_2d"] | None = None
    """Position embedding: a learned row table plus a learned column table, one learned table, or fixed sines."""

    pool: Literal["map", "cls", "gap"] | None = None
    """From tokens to one vector: attention pooling with a learned probe, a class token, or the mean."""

    registers: int | None = None
    """Extra learned tokens without an output of their own (Darcet et al. 2023)."""

    drop_path: float = 0.0
    """Largest rate of stochastic depth, that of the last block; rates grow linearly from 0."""

    num_classes: int | None = None
    """Classes of the head (usually 1000)."""

    head_bias: float | None = None
    """Initial bias of the head: null means -10 for the sigmoid loss (ViT-22B), 0 for softmax."""

    def resolve(self) -> ModelConfig:
        """Every key filled in, from the preset and the usual values.

        Raises:
            ValueError: an unknown preset, a needed key that is missing, or values that contradict each other; the
            message
                names the key, the value and what would work.
        """
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"model.preset {self.preset!r} is unknown: choose one of {', '.join(PRESETS)}")
        base = _DEFAULTS | (PRESETS[self.preset] if self.preset else {})
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        merged = given | {k: v for k, v in base.items() if given[k] is None}
        for name in ("width", "depth", "num_heads"):
            if merged[name] is None:
                raise ValueError(f"model.{name} is not set: give it, or a model.preset")
        if merged["mlp_dim"] is None:
            merged["mlp_dim"] = 4 * merged["width"]
        resolved = replace(self, **merged)
        resolved._check()
        return resolved

    def _check(self) -> None:
        for name in (
            "image_size",
            "patch_size",
            "in_channels",
            "width",
            "depth",
            "num_heads",
            "mlp_dim",
            "num_classes",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        sizes = self.sizes
        if sizes.image % sizes.patch:
            near = sizes.image // sizes.patch * sizes.patch
            fits = [size for size in (near, near + sizes.patch) if size]
            divisors = [p for p in range(2, sizes.image + 1) if sizes.image % p == 0][:8]
            raise ValueError(
                f"model.patch_size {sizes.patch} does not divide model.image_size {sizes.image}: use an image_size of "
                f"{' or '.join(map(str, fits))}, or a patch_size among {', '.join(map(str, divisors))}"
            )
        if sizes.width % sizes.heads:
            fits = [h for h in range(1, sizes.width + 1) if sizes.width % h == 0]
            near_heads = sorted(sorted(fits, key=lambda h: abs(h - sizes.heads))[:3])
            raise ValueError(
                f"model.num_heads {sizes.heads} does not divide model.width {sizes.width}: use {near_heads} heads, "
                f"or a width that is a multiple of {sizes.heads}"
            )
        if self.position == "sincos_2d" and sizes.width % 4:
            raise ValueError(f"model.width {sizes.width} must be a multiple of 4 for model.position sincos_2d")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path is {self.drop_path}: it must be at least 0 and below 1")
        if sizes.registers < 0:
            raise ValueError(f"model.registers is {sizes.registers}: it must be 0 or more")

    @property
    def sizes(self) -> Sizes:
        """The numbers of a resolved configuration."""
        return Sizes.of(self)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The numbers of a resolved model, none of them missing."""

    image: int
    patch: int
    channels: int
    width: int
    depth: int
    heads: int
    mlp: int
    registers: int
    classes: int
    has_class_token: bool

    @staticmethod
    def of(config: ModelConfig) -> Sizes:
        """From a resolved configuration."""
        values = {
            "image": config.image_size,
            "patch": config.patch_size,
            "channels": config.in_channels,
            "width": config.width,
            "depth": config.depth,
            "heads": config.num_heads,
            "mlp": config.mlp_dim,
            "registers": config.registers,
            "classes": config.num_classes,
        }
        numbers = {name: value for name, value in values.items() if value is not None}
        assert len(numbers) == len(values), f"not resolved: {set(values) - set(numbers)}"
        return Sizes(**numbers, has_class_token=config.pool == "cls")

    @property
    def head_dim(self) -> int:
        """Features per head."""
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return self.image // self.patch

    @property
    def patch_features(self) -> int:
        """Numbers in a patch."""
        return self.channels * self.patch**2

    @property
    def prefix(self) -> int:
        """Tokens before the patches: class token and registers."""
        return self.has_class_token + self.registers

    @property
    def tokens(self) -> int:
        """Tokens per image."""
        return self.prefix + self.grid**2
