"""DINOv2, with and without registers, and DINOv3 in transformers (Oquab et al. 2023; Darcet et al. 2023; Siméoni et al.
2025).

Features are the class token's, after the final norm; a classifier of DINOv2 also sees the mean of the patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Shape
from model.formats.expressible import ANY, check_expressible
from model.formats.huggingface import common, keys
from model.formats.huggingface.names import Names, rules_of
from model.formats.rules import Rule, rule
from model.formats.sources import Source
from model.formats.ways import Void

_ALLOWED: dict[str, object] = {
    "class_tokens": 1, "class_position": {True, False}, "norm_eps": ANY, "gelu": ANY, "mlp": {"gelu", "swiglu"},
    "layer_scale": ANY, "registers": ANY, "bias": {True, False}, "norm_bias": True,
}  # fmt: skip
_V2 = Names(
    patch="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    cls="embeddings.cls_token",
    registers="embeddings.register_tokens",
    block="encoder.layer.{}.",
    norms=("norm1", "norm2"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    up=("mlp.fc1",),
    down="mlp.fc2",
    scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
    norm="layernorm",
)
_V3 = Names(
    patch="embeddings.patch_embeddings",
    cls="embeddings.cls_token",
    registers="embeddings.register_tokens",
    block="layer.{}.",
    norms=("norm1", "norm2"),
    qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    proj="attention.o_proj",
    up=("mlp.up_proj",),
    down="mlp.down_proj",
    scales=_V2.scales,
    norm="norm",
)


def _is_mask(name: str) -> bool:
    """The token in the place of patches that are hidden in training."""
    return name.endswith("embeddings.mask_token")


def _mask(description: Description, kind: str, start: str, shape: Shape) -> list[Rule]:
    """One of zeros, where the class has it and none is carried."""
    origin = common.origin_of(description, kind)
    return [] if origin and origin.variant else [rule("", f"{start}embeddings.mask_token", way=Void(shape))]


class HfDinov2:
    """Names: `dinov2.encoder.layer.3.attention.attention.query.weight`; without the `dinov2.` without a classifier."""

    kind, title, container = "hf_dinov2", "transformers' DINOv2", "model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return any(n.endswith("encoder.layer.0.layer_scale1.lambda1") for n in source.tensors)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config = common.config_of(source, keys.DINOV2)
        sizes = common.sizes_of(
            config, patch_size=14, num_channels=3, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            layer_norm_eps=1e-6,
        )  # fmt: skip
        gated, classifier = config.get("use_swiglu_ffn", False), source.tensors.get("classifier.weight")
        registers = next((e.shape[1] for n, e in source.tensors.items() if n.endswith(_V2.registers)), 0)
        model = ModelConfig(
            **sizes,
            image_size=common.image_of(config, 14),
            mlp_dim=_hidden(sizes["width"], config.get("mlp_ratio", 4), gated),
            mlp="swiglu" if gated else "gelu",
            gelu=None if gated else common.activation_of(config),  # type: ignore[arg-type]
            qkv_bias="all" if config.get("qkv_bias", True) else "none",
            layer_scale=config.get("layerscale_value", 1.0) or 1.0,
            registers=registers,
            position="learned_1d",
            pool="cls_gap" if classifier else "cls",
            num_classes=classifier.shape[0] if classifier else 0,
        ).resolve()
        return common.described(source, self.kind, model, common.start_in(source, _V2.cls))

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m = description.model
        pool = "cls_gap" if m.num_classes else "cls"
        check_expressible(self.title, m, _ALLOWED | {"pool": pool, "qkv_bias": {"all", "none"}})
        common.square(m, self.title)
        usual = ("dinov2_with_registers." if m.registers else "dinov2.") if m.num_classes else ""
        gated = m.mlp == "swiglu"
        names = replace(_V2, up=("mlp.weights_in",), down="mlp.weights_out") if gated else _V2
        start, width = common.start_of(description, self.kind, usual), m.sizes.last.width
        rules = rules_of(names, m, start)
        if m.num_classes:
            rules += [rule(f"head.fc.{k}", f"classifier.{k}") for k in ("weight", "bias")]
        return rules + (_mask(description, self.kind, start, (1, width)) if m.registers else [])

    def carries(self, name: str) -> bool:
        """As Format: the mask token."""
        return _is_mask(name)

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        m, origin = description.model, common.origin_of(description, self.kind)
        found = common.config_keys(m)
        gated = m.mlp == "swiglu"
        del found["intermediate_size"]
        if gated:
            del found["hidden_act"]
        family = "dinov2_with_registers" if m.registers else "dinov2"
        before = dict(origin.config) if origin and origin.variant else {"use_mask_token": False}
        config = before | found | common.label_keys(description)
        config |= {
            "model_type": family,
            "mlp_ratio": _ratio(m, gated),
            "use_swiglu_ffn": gated,
            "qkv_bias": m.qkv_bias == "all",
            "layerscale_value": m.layer_scale or 1.0,
        }
        if m.registers:
            config["num_register_tokens"] = m.registers
        title = "Dinov2WithRegisters" if m.registers else "Dinov2"
        config["architectures"] = [f"{title}{'ForImageClassification' if m.num_classes else 'Model'}"]
        return {common.CONFIG: config, common.IMAGES: common.images_file(description, self.kind, "BitImageProcessor")}


def _hidden(width: int, ratio: float, gated: bool) -> int:
    """Hidden features of an MLP; a gated one has two thirds of them, rounded up to a multiple of 8."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def _ratio(m: ModelConfig, gated: bool) -> int:
    """Of its hidden features to its width. Raises ConversionError where that is no whole number."""
    width, hidden = m.sizes.last.width, m.sizes.last.mlp
    for ratio in range(1, 65):
        if _hidden(width, ratio, gated) == hidden:
            return ratio
    near = sorted({_hidden(width, r, gated) for r in range(1, 9)}, key=lambda n: abs(n - hidden))[:2]
    wanted = " or ".join(map(str, sorted(near)))
    raise ConversionError(f"model.mlp_dim is {hidden}: transformers' DINOv2 has {wanted} at model.width {width}")


class HfDinov3:
    """Names: `layer.3.attention.q_proj.weight`."""

    kind, title, container = "hf_dinov3", "transformers' DINOv3", "model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return any(n.endswith("layer.0.layer_scale1.lambda1") for n in source.tensors) and not any(
            "encoder.layer.0." in n for n in source.tensors
        )

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config = common.config_of(source, keys.DINOV3)
        gated = config.get("use_gated_mlp", False)
        if gated:
            common.check_neutral({"hidden_act": config.get("hidden_act", "gelu")}, hidden_act="silu")
        model = ModelConfig(
            **common.sizes_of(
                config, patch_size=16, num_channels=3, hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
                layer_norm_eps=1e-5,
            ),
            image_size=common.image_of(config, 16),
            mlp_dim=config.get("intermediate_size", 1536),
            mlp="swiglu" if gated else "gelu",
            gelu=None if gated else common.activation_of(config),  # type: ignore[arg-type]
            qkv_bias=_biases(config),  # type: ignore[arg-type]
            layer_scale=config.get("layerscale_value", 1.0) or 1.0,
            registers=config.get("num_register_tokens", 0),
            position="rope_2d",
            rope_base=float(_theta(config)),
            pool="cls",
            num_classes=0,
        ).resolve()  # fmt: skip
        return common.described(source, self.kind, model, common.start_in(source, _V3.cls))

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m = description.model
        allowed = {"pool": "cls", "qkv_bias": ANY, "position": "rope_2d", "rope_base": ANY}
        check_expressible(self.title, m, _ALLOWED | allowed)
        if m.num_classes:
            raise ConversionError(
                f"model.num_classes is {m.num_classes}: {self.title} has no classifier: convert model.num_classes 0"
            )
        origin = common.origin_of(description, self.kind)
        config = origin.config if origin else {}
        without = {"attn.proj": "proj_bias", "mlp.fc1": "mlp_bias", "mlp.fc2": "mlp_bias"}
        unbiased = frozenset(ours for ours, key in without.items() if not config.get(key, True))
        up = ("mlp.gate_proj", "mlp.up_proj") if m.mlp == "swiglu" else _V3.up
        start = common.start_of(description, self.kind, "")
        rules = rules_of(replace(_V3, up=up, unbiased=unbiased), m, start)
        width = m.sizes.last.width
        if not m.registers:  # they are there, none of them
            rules.append(rule("", start + _V3.registers, way=Void((1, 0, width))))
        return rules + _mask(description, self.kind, start, (1, 1, width))

    def carries(self, name: str) -> bool:
        """As Format: the mask token."""
        return _is_mask(name)

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        m, origin = description.model, common.origin_of(description, self.kind)
        config = dict(origin.config if origin else {}) | common.config_keys(m)
        config.pop("rope_parameters", None)
        config |= {
            "model_type": "dinov3_vit",
            "architectures": ["DINOv3ViTModel"],
            "use_gated_mlp": m.mlp == "swiglu",
            "query_bias": m.qkv_bias != "none",
            "key_bias": m.qkv_bias == "all",
            "value_bias": m.qkv_bias != "none",
            "layerscale_value": m.layer_scale or 1.0,
            "num_register_tokens": m.registers,
            "rope_theta": m.rope_base,
        }
        if m.mlp == "swiglu":
            config["hidden_act"] = "silu"
        images = common.images_file(description, self.kind, "DINOv3ViTImageProcessorFast")
        return {common.CONFIG: config, common.IMAGES: images}


def _theta(config: Mapping[str, Any]) -> float:
    nested = config.get("rope_parameters") or {}
    common.check_neutral(nested, rope_type="default")
    value: float = config.get("rope_theta") or nested.get("rope_theta") or 100.0
    return value


def _biases(config: Mapping[str, Any]) -> str:
    """Our `model.qkv_bias`. Raises ConversionError for a combination that it has not."""
    given = tuple(bool(config.get(f"{x}_bias", x != "key")) for x in ("query", "key", "value"))
    forms = {(True, True, True): "all", (True, False, True): "qv", (False, False, False): "none"}
    if given not in forms:
        shown = ", ".join(f"{x}_bias {g}" for x, g in zip(("query", "key", "value"), given, strict=True))
        raise ConversionError(
            f"{shown} of {common.CONFIG}: this model has all three, those of query and value, or none"
        )
    return forms[given]
