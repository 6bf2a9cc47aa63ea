"""What a text tower is: the `text` group of the configuration, and its resolution against a preset."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from model.config import ModelConfig
from model.projection import Projection
from model.text_layers import Pool

_DEFAULTS: dict[str, Any] = {
    "context_length": 77,
    "vocabulary_size": 259,  # of bytes, start, end and padding
    "end_token": 257,
    "attention": "causal",
    "pool": "eos",
    "norm_eps": 1e-5,
    "projection_bias": False,
}
_LIMITS = {"context_length": (1, 2**16), "vocabulary_size": (1, 2**31 - 1)}


def _clip(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    """As in Radford et al. 2021, CLIP, with its BPE vocabulary."""
    own = {"context_length": 77, "vocabulary_size": 49408, "end_token": 49407, "attention": "causal", "pool": "eos"}
    return {"width": width, "depth": depth, "num_heads": heads, "norm_eps": 1e-5, **own, **more}


def _siglip(width: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    """As in Zhai et al. 2023, SigLIP, with the vocabulary of C4; of SigLIP 2 (Tschannen et al. 2025) with Gemma's."""
    own = {"context_length": 64, "vocabulary_size": 32000, "end_token": 1, "attention": "full", "pool": "last"}
    form = {"gelu": "tanh", "norm_eps": 1e-6, "projection": "linear", "projection_bias": True}
    return {"width": width, "depth": depth, "num_heads": heads, **own, **form, **more}


_GEMMA = {"vocabulary_size": 256_000}
TEXT_PRESETS: dict[str, dict[str, Any]] = {
    "clip_b": _clip(512, 12, 8, gelu="quick"),
    "clip_l": _clip(768, 12, 12, gelu="quick"),
    "clip_h": _clip(1024, 24, 16),
    "clip_bigg": _clip(1280, 32, 20),
    "siglip_b": _siglip(768, 12, 12),
    "siglip_l": _siglip(1024, 24, 16),
    "siglip_so400m": _siglip(1152, 27, 16, mlp_dim=4304),
    "siglip2_b": _siglip(768, 12, 12, **_GEMMA),
    "siglip2_l": _siglip(1024, 24, 16, **_GEMMA),
    "siglip2_so400m": _siglip(1152, 27, 16, mlp_dim=4304, **_GEMMA),
}
"""Published text towers, as values of TextConfig's keys. clip_h and clip_bigg are OpenCLIP's (Cherti et al. 2023)."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower of contrastive training. A key left null takes its value from the preset, or its usual value."""

    preset: str | None = None
    """Published text tower to start from (clip_b, clip_l, clip_h, clip_bigg, siglip_b, siglip_l, siglip_so400m,
    siglip2_b, siglip2_l, siglip2_so400m); keys given beside it override it."""

    width: int | None = None
    """Features of a token. Needed without a preset."""

    depth: int | None = None
    """Number of blocks. Needed without a preset."""

    num_heads: int | None = None
    """Attention heads. Needed without a preset."""

    mlp_dim: int | None = None
    """Hidden features of the MLP (usually 4 x width)."""

    context_length: int | None = None
    """Tokens of every text, which is cut or filled up to that (usually 77)."""

    vocabulary_size: int | None = None
    """How many tokens there are (usually 259: bytes, start, end, padding)."""

    end_token: int | None = None
    """The token that ends a text (usually 257)."""

    attention: str | tuple[str, ...] | None = None
    """causal: tokens see those before them; full: all; or a list or pattern, one for each block (usually causal)."""

    pool: Pool | None = None
    """From tokens to one vector: that of the first end token (eos), of the last of all (last), the mean up to the first
    end token (mean), or a learned probe's attention to these (map) (usually eos)."""

    block: Literal["parallel", "sequential"] | None = None
    """As model.block."""

    norm: Literal["layernorm", "rmsnorm"] | None = None
    """As model.norm."""

    norm_eps: float | None = None
    """As model.norm_eps (usually 1e-5)."""

    mlp: Literal["gelu", "swiglu"] | None = None
    """As model.mlp."""

    layer_scale: float | None = None
    """As model.layer_scale."""

    qk_norm: bool | None = None
    """As model.qk_norm."""

    bias: bool | None = None
    """As model.bias."""

    norm_bias: bool | None = None
    """As model.norm_bias."""

    qkv_bias: Literal["all", "none", "qv"] | None = None
    """As model.qkv_bias."""

    gelu: Literal["erf", "tanh", "quick"] | None = None
    """As model.gelu."""

    drop_path: float = 0.0
    """As model.drop_path."""

    projection: Projection | None = None
    """To the embedding, as contrastive.projection; null takes that."""

    projection_bias: bool | None = None
    """Bias of a linear projection (usually false; SigLIP has one)."""

    def resolve(self) -> TextConfig:
        """Every key of its own filled in; those that `model` has, too, stay null where that has its usual value.

        Raises:
            ValueError: an unknown preset, a needed key that is missing, or values that contradict each other.
        """
        if self.preset is not None and self.preset not in TEXT_PRESETS:
            raise ValueError(f"text.preset {self.preset!r} is unknown: choose one of {', '.join(TEXT_PRESETS)}")
        base = _DEFAULTS | (TEXT_PRESETS[self.preset] if self.preset else {})
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        if given["vocabulary_size"] not in (None, base["vocabulary_size"]) and given["end_token"] is None:
            raise ValueError(
                f"text.vocabulary_size is {self.vocabulary_size}, but text.end_token is not set: give the token that "
                f"ends a text ({base['end_token']} is that of the usual {base['vocabulary_size']})"
            )
        resolved = replace(self, **(given | {k: v for k, v in base.items() if given[k] is None}))
        for name, (least, most) in _LIMITS.items():
            if not least <= getattr(resolved, name) <= most:
                raise ValueError(f"text.{name} is {getattr(resolved, name)}: it must be {least} to {most}")
        assert resolved.end_token is not None and resolved.vocabulary_size is not None
        if not 0 <= resolved.end_token < resolved.vocabulary_size:
            raise ValueError(
                f"text.end_token is {resolved.end_token}, but text.vocabulary_size {resolved.vocabulary_size} has "
                f"tokens 0 to {resolved.vocabulary_size - 1}: give one of them, or a larger vocabulary"
            )
        if resolved.projection_bias and resolved.projection in ("mlp", "none"):
            raise ValueError(
                f"text.projection_bias is true, but text.projection is {resolved.projection}: leave it out, or use "
                "linear"
            )
        resolved.model(1, "linear")
        return resolved

    def model(self, embedding: int, projection: Projection) -> ModelConfig:
        """The tower, resolved, as a model whose patches are one row of tokens; of a resolved configuration.

        Args:
            embedding: features of what it gives. projection: to them.

        Raises:
            ValueError: values that contradict each other.
        """
        assert self.context_length is not None and self.attention is not None, "not resolved"
        shared = {name: getattr(self, name) for name in _SHARED}
        ends = {"num_classes": 0}
        if projection == "linear":
            ends = {"num_classes": embedding, "classifier_bias": bool(self.projection_bias)}
        try:
            config = ModelConfig(
                image_size=(1, self.context_length),
                patch_size=1,
                in_channels=1,
                position="learned_1d",
                pool="map" if self.pool == "map" else "gap",
                **ends,  # type: ignore[arg-type]
                **shared,
            ).resolve()
        except ValueError as error:
            raise ValueError(str(error).replace("model.", "text.")) from error
        if strange := sorted({kind for stage in config.sizes.stages for kind in stage.kinds} - {"causal", "full"}):
            raise ValueError(
                f"text.attention names {', '.join(strange)}: texts have no map of patches; use causal or full"
            )
        return config


_SHARED = (
    "width", "depth", "num_heads", "mlp_dim", "attention", "block", "norm", "norm_eps", "mlp", "layer_scale", "qk_norm",
    "bias", "norm_bias", "qkv_bias", "gelu", "drop_path",
)  # fmt: skip
