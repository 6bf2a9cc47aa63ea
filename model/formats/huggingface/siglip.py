"""The image towers of SigLIP and SigLIP 2 in transformers (Zhai et al. 2023; Tschannen et al. 2025).

SiglipVisionModel pools with a probe (`vision_use_head`) and has no classifier; SiglipForImageClassification takes the
mean of the tokens, beside which the probe, if there is one, has no part. The text tower of SiglipModel is carried.
"""

from __future__ import annotations

import math
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
from model.formats.ways import Same

_ALLOWED: dict[str, object] = {"pool": {"map", "gap"}, "norm_eps": ANY, "gelu": {"erf", "tanh", "quick"}}
_CARRIED = re.compile(
    r"(text_model\.|logit_(scale|bias)$).*|(vision_model\.)?(head\..*|embeddings\.position_ids)"
)  # the probe where it has no part


class HfSiglip:
    """Names: `vision_model.encoder.layers.3.self_attn.q_proj.weight`, with or without the `vision_model.`."""

    kind, title, container = "hf_siglip", "transformers' SigLIP", "model"
    names, prefix, processor = CLIP_ENCODER, "Siglip", "SiglipImageProcessor"
    known: frozenset[str] = keys.SIGLIP

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return _patch_dims(source) == 4

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config = common.tower_of(source, self.known)
        start = common.start_in(source, f"{CLIP_ENCODER.patch}.weight")
        classifier = source.tensors.get("classifier.weight")
        probe = config.get("vision_use_head", True)
        model = ModelConfig(
            **common.sizes_of(
                config, patch_size=16, num_channels=3, hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                layer_norm_eps=1e-6,
            ),
            image_size=self._image(config),
            mlp_dim=config.get("intermediate_size", 3072),
            gelu=common.activation_of(config, "gelu_pytorch_tanh"),  # type: ignore[arg-type]
            position="learned_1d",
            pool="map" if probe and classifier is None else "gap",
            num_classes=classifier.shape[0] if classifier else 0,
        ).resolve()  # fmt: skip
        return common.described(source, self.kind, model, start)

    def _image(self, config: Mapping[str, Any]) -> int | tuple[int, int]:
        return common.image_of(config, 16)

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m = description.model
        check_expressible(self.title, m, _ALLOWED)
        common.square(m, self.title)
        if m.num_classes and m.pool == "map":
            raise ConversionError(
                f"model.num_classes is {m.num_classes} and model.pool map: a classifier of {self.title} sees the mean "
                "of the tokens. Convert a model with pool gap, or one without a classifier (model.num_classes 0)"
            )
        start = common.start_of(description, self.kind, "vision_model." if m.num_classes else "")
        rules = rules_of(self.names, m, start)
        if m.pool == "map":
            rules += _probe(m, f"{start}head.")
        if m.num_classes:
            rules += [rule(f"head.fc.{k}", f"classifier.{k}") for k in ("weight", "bias")]
        return rules

    def carries(self, name: str) -> bool:
        """As Format: the text tower, and a probe beside a classifier that does not use it."""
        return bool(_CARRIED.fullmatch(name))

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        m, origin = description.model, common.origin_of(description, self.kind)
        before = dict(origin.config) if origin else {}
        towers = "vision_config" in before or bool(m.num_classes)
        family = self.prefix.lower()
        vision = dict(before.get("vision_config", {}) if towers else before) | self._keys(m)
        vision["model_type"] = f"{family}_vision_model"
        if not (m.num_classes and before):  # beside a classifier it may be carried
            vision["vision_use_head"] = m.pool == "map"
        config = vision
        if towers:
            config = before | {"vision_config": vision, "model_type": family} | common.label_keys(description)
        if m.num_classes:
            config["architectures"] = [f"{self.prefix}ForImageClassification"]
        elif not towers:
            config["architectures"] = [f"{self.prefix}VisionModel"]
        return {common.CONFIG: config, common.IMAGES: self._images(description)}

    def _keys(self, m: ModelConfig) -> dict[str, Any]:
        return common.config_keys(m)

    def _images(self, description: Description) -> dict[str, Any]:
        return common.images_file(description, self.kind, self.processor)


class HfSiglip2(HfSiglip):
    """As SigLIP, for images of any ratio there (NaFlex): a patch is a row of numbers, and positions are a square grid,
    which is interpolated for each image. Here the model has that grid's size of images."""

    kind, title = "hf_siglip2", "transformers' SigLIP 2"
    names, prefix, processor = replace(CLIP_ENCODER, linear_patch=True), "Siglip2", "Siglip2ImageProcessor"
    known = keys.SIGLIP2

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return _patch_dims(source) == 2

    def _image(self, config: Mapping[str, Any]) -> int:
        patches = config.get("num_patches", 256)
        return math.isqrt(patches) * common.patch_of(config.get("patch_size", 16))

    def _keys(self, m: ModelConfig) -> dict[str, Any]:
        found = common.config_keys(m)
        del found["image_size"]
        return found | {"num_patches": m.sizes.last.rows * m.sizes.last.cols}

    def _images(self, description: Description) -> dict[str, Any]:
        m, origin = description.model, common.origin_of(description, self.kind)
        if origin and origin.preprocessor and common.preprocessing_of(origin.preprocessor) == description.preprocessing:
            return dict(origin.preprocessor)
        if description.preprocessing and description.preprocessing.crop_fraction != 1:
            raise ConversionError(
                f"the images of this model are cropped ({description.preprocessing.crop_fraction:.4g} of a side): "
                f"{self.title} takes whole ones"
            )
        images = common.images_file(description, self.kind, self.processor)
        kept = ("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
        patches = m.sizes.last.rows * m.sizes.last.cols
        own = {"image_processor_type": self.processor, "patch_size": m.patch_size, "max_num_patches": patches}
        return own | {key: images[key] for key in kept}


def _patch_dims(source: Source) -> int | None:
    """Dims of the patch embedding of a SigLIP tower, if it is one."""
    for name in source.tensors:
        if name in (f"{CLIP_ENCODER.patch}.weight", f"vision_model.{CLIP_ENCODER.patch}.weight"):
            start = name.removesuffix(f"{CLIP_ENCODER.patch}.weight")
            siglip = f"{start}embeddings.class_embedding" not in source.tensors
            return len(source.tensors[name].shape) if siglip else None
    return None


def _probe(m: ModelConfig, start: str) -> list[Rule]:
    """Pooling by attention; q, k and v are one tensor there."""
    width = m.sizes.last.width
    pairs = {"proj": "attention.out_proj", "norm": "layernorm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    rules = [rule("head.pool.probe", f"{start}probe", way=Same((1, width), (1, 1, width)))]
    rules += [rule(f"head.pool.{a}.{k}", f"{start}{b}.{k}") for a, b in pairs.items() for k in ("weight", "bias")]
    for k in ("weight", "bias"):
        rules.append(rule(f"head.pool.q.{k}", f"{start}attention.in_proj_{k}", more=[f"head.pool.kv.{k}"]))
    return rules
