"""ViT of transformers: ViTModel and ViTForImageClassification (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.formats.base import Description
from model.formats.expressible import ANY, check_expressible
from model.formats.huggingface import common, keys
from model.formats.huggingface.names import Names, rules_of
from model.formats.rules import Rule, rule
from model.formats.sources import Source

_ALLOWED: dict[str, object] = {
    "pool": "cls", "class_tokens": 1, "class_position": {True, False}, "norm_eps": ANY, "gelu": ANY, "bias": ANY,
    "norm_bias": True, "qkv_bias": {"all", "none"},
}  # fmt: skip
_NAMES = Names(
    patch="embeddings.patch_embeddings.projection",
    position="embeddings.position_embeddings",
    cls="embeddings.cls_token",
    block="encoder.layer.{}.",
    norms=("layernorm_before", "layernorm_after"),
    qkv=("attention.attention.query", "attention.attention.key", "attention.attention.value"),
    proj="attention.output.dense",
    up=("intermediate.dense",),
    down="output.dense",
    norm="layernorm",
)


class HfVit:
    """Names: `vit.encoder.layer.3.attention.attention.query.weight`; without the `vit.` for ViTModel alone."""

    kind, title, container = "hf_vit", "transformers' ViT", "model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return any(n.endswith("encoder.layer.0.layernorm_before.weight") for n in source.tensors)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config = common.config_of(source, keys.VIT)
        sizes = common.sizes_of(
            config, patch_size=16, num_channels=3, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
            layer_norm_eps=1e-12,
        )  # fmt: skip
        classifier = source.tensors.get("classifier.weight")
        model = ModelConfig(
            **sizes,
            image_size=common.image_of(config, 16),
            mlp_dim=config.get("intermediate_size", 3072),
            gelu=common.activation_of(config),  # type: ignore[arg-type]
            qkv_bias="all" if config.get("qkv_bias", True) else "none",
            position="learned_1d",
            pool="cls",
            num_classes=classifier.shape[0] if classifier else 0,
        ).resolve()
        return common.described(source, self.kind, model, common.start_in(source, _NAMES.cls))

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m = description.model
        check_expressible(self.title, m, _ALLOWED)
        usual = "vit." if m.num_classes else ""
        rules = rules_of(_NAMES, m, common.start_of(description, self.kind, usual))
        if m.num_classes:
            rules += [rule(f"head.fc.{k}", f"classifier.{k}") for k in ("weight", "bias")]
        return rules

    def carries(self, name: str) -> bool:
        """As Format: the mask token of ViTForMaskedImageModeling."""
        return name.endswith("embeddings.mask_token")

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        m, origin = description.model, common.origin_of(description, self.kind)
        config = dict(origin.config if origin else {}) | common.config_keys(m) | common.label_keys(description)
        config |= {"model_type": "vit", "qkv_bias": m.qkv_bias == "all"}
        config["architectures"] = ["ViTForImageClassification" if m.num_classes else "ViTModel"]
        return {common.CONFIG: config, common.IMAGES: common.images_file(description, self.kind, "ViTImageProcessor")}
