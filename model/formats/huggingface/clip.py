"""The image tower of CLIP in transformers (Radford et al. 2021).

CLIPVisionModel gives the class token's features; with CLIPVisionModelWithProjection and CLIPModel the projection is our
classifier, without a bias. The text tower of CLIPModel is carried.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Description
from model.formats.expressible import ANY, check_expressible
from model.formats.huggingface import common, keys
from model.formats.huggingface.names import CLIP_ENCODER, rules_of
from model.formats.rules import Rule, rule
from model.formats.sources import Source

_ALLOWED: dict[str, object] = {
    "pool": "cls", "class_tokens": 1, "class_position": {True, False}, "norm_eps": ANY, "gelu": ANY, "pre_norm": True,
    "patch_bias": False, "classifier_bias": {True, False},
}  # fmt: skip
_NAMES = replace(CLIP_ENCODER, cls="embeddings.class_embedding", pre_norm="pre_layrnorm")
_PROJECTION = "visual_projection.weight"
_CARRIED = re.compile(r"text_model\..*|text_projection\.weight|logit_scale|(.*\.)?embeddings\.position_ids")


class HfClipVision:
    """Names: `vision_model.encoder.layers.3.self_attn.q_proj.weight`, with or without the `vision_model.`."""

    kind, title, container = "hf_clip_vision", "transformers' CLIP", "model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return any(n in source.tensors for n in ("pre_layrnorm.weight", "vision_model.pre_layrnorm.weight"))

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config = common.tower_of(source, keys.CLIP, has_dicts=True)
        if "classifier.weight" in source.tensors:
            raise ConversionError(
                f"{source.path} is a CLIPForImageClassification, whose classifier sees the mean of tokens that no norm "
                "has seen: this model has none such (--leave_out 'classifier.*' takes the model without it)"
            )
        projection = source.tensors.get(_PROJECTION)
        model = ModelConfig(
            **common.sizes_of(
                config, patch_size=32, num_channels=3, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                layer_norm_eps=1e-5,
            ),
            image_size=common.image_of(config, 32),
            mlp_dim=config.get("intermediate_size", 3072),
            gelu=common.activation_of(config, "quick_gelu"),  # type: ignore[arg-type]
            pre_norm=True,
            patch_bias=False,
            position="learned_1d",
            pool="cls",
            num_classes=projection.shape[0] if projection else 0,
            classifier_bias=False if projection else None,
        ).resolve()  # fmt: skip
        found = common.described(source, self.kind, model, common.start_in(source, _NAMES.cls))
        return replace(found, embeds=projection is not None)

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m = description.model
        check_expressible(self.title, m, _ALLOWED | ({"classifier_bias": False} if m.num_classes else {}))
        common.square(m, self.title)
        rules = rules_of(_NAMES, m, common.start_of(description, self.kind, "vision_model." if m.num_classes else ""))
        if m.num_classes:
            rules.append(rule("head.fc.weight", _PROJECTION))
        return rules

    def carries(self, name: str) -> bool:
        """As Format: the text tower."""
        return bool(_CARRIED.fullmatch(name))

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        m, origin = description.model, common.origin_of(description, self.kind)
        before = dict(origin.config) if origin else {}
        towers = "vision_config" in before or "vision_config_dict" in before
        before.pop("vision_config_dict", None)  # which would win
        vision = dict(before.get("vision_config", {}) if towers else before) | common.config_keys(m)
        vision["model_type"] = "clip_vision_model"
        if m.num_classes and not towers:
            vision["projection_dim"] = m.num_classes
        config = before | {"vision_config": vision} if towers else vision
        if not towers:
            config["architectures"] = ["CLIPVisionModelWithProjection" if m.num_classes else "CLIPVisionModel"]
        elif m.num_classes:
            config["projection_dim"] = m.num_classes
        images = common.images_file(description, self.kind, "CLIPImageProcessor")
        return {common.CONFIG: config, common.IMAGES: images}
