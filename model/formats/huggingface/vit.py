"""ViT of transformers: ViTModel and ViTForImageClassification (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Joined, Origin, Rule, Same, rule
from model.formats.huggingface import common
from model.formats.sources import Source


class HfVit:
    """Names: `vit.encoder.layer.3.attention.attention.query.weight`; without the `vit.` for ViTModel alone."""

    kind, title, container = "hf_vit", "transformers' ViT", "model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return any(n.endswith("encoder.layer.0.layernorm_before.weight") for n in source.tensors)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config, images = source.files.get("config.json", {}), source.files.get("preprocessor_config.json", {})
        if not config:
            raise ConversionError(f"{source.path} has no config.json beside it: give it with --config FILE")
        classifier = "classifier.weight" in source.tensors
        model = ModelConfig(
            image_size=common.side_of(config.get("image_size", 224)),
            patch_size=config.get("patch_size", 16),
            in_channels=config.get("num_channels", 3),
            width=config.get("hidden_size", 768),
            depth=config.get("num_hidden_layers", 12),
            num_heads=config.get("num_attention_heads", 12),
            mlp_dim=config.get("intermediate_size", 3072),
            block="sequential",
            gelu=common.activation_of(config),  # type: ignore[arg-type]
            position="learned_1d",
            pool="cls",
            num_classes=source.tensors["classifier.weight"].shape[0] if classifier else 0,
        ).resolve()
        variant = "vit." if any(n.startswith("vit.") for n in source.tensors) else ""
        origin = Origin(kind=self.kind, variant=variant, config=config, preprocessor=images)
        return Description(
            model=model,
            preprocessing=common.preprocessing_of(images),
            origin=origin,
            labels=common.labels_of(config) if classifier else (),
        )

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m, sizes = description.model, description.model.sizes
        width, origin = sizes.last.width, description.origin
        start = "vit." if m.num_classes or (origin and origin.kind == self.kind and origin.variant) else ""
        e, kernel = f"{start}embeddings.", (width, sizes.channels, sizes.patch, sizes.patch)
        tokens = 1 + sizes.last.rows * sizes.last.cols
        rules = [
            rule(
                "embed.weight",
                f"{e}patch_embeddings.projection.weight",
                way=Same((width, sizes.patch_features), kernel),
            ),
            rule("embed.bias", f"{e}patch_embeddings.projection.bias"),
            rule("embed.cls", f"{e}cls_token", way=Same((1, width), (1, 1, width))),
            rule("embed.pos", f"{e}position_embeddings", way=Same((tokens, width), (1, tokens, width))),
        ]
        for i in range(sizes.depth):
            rules += self._block(f"blocks.{i}.", f"{start}encoder.layer.{i}.", width, bool(m.bias))
        rules += [rule(f"head.norm.{k}", f"{start}layernorm.{k}") for k in ("weight", "bias")]
        if m.num_classes:
            rules += [rule(f"head.fc.{k}", f"classifier.{k}") for k in ("weight", "bias")]
        return rules

    def _block(self, ours: str, theirs: str, width: int, bias: bool) -> list[Rule]:
        pairs = {
            "norm1": "layernorm_before", "attn.proj": "attention.output.dense", "norm2": "layernorm_after",
            "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
        }  # fmt: skip
        rules = [rule(f"{ours}{a}.{k}", f"{theirs}{b}.{k}") for a, b in pairs.items() for k in ("weight", "bias")]
        for k in ("weight", "bias") if bias else ("weight",):
            names = [f"{theirs}attention.attention.{x}.{k}" for x in ("query", "key", "value")]
            rules.append(rule(f"{ours}attn.qkv.{k}", *names, way=Joined((width,) * 3)))
        return rules

    def carries(self, name: str) -> bool:
        """As Format: the mask token of ViTForMaskedImageModeling."""
        return name.endswith("embeddings.mask_token")

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        m, origin = description.model, description.origin
        before = dict(origin.config) if origin and origin.kind == self.kind else {}
        config = before | {
            "model_type": "vit",
            "architectures": ["ViTForImageClassification" if m.num_classes else "ViTModel"],
            "image_size": m.image_size,
            "patch_size": m.patch_size,
            "num_channels": m.in_channels,
            "hidden_size": m.width,
            "num_hidden_layers": m.depth,
            "num_attention_heads": m.num_heads,
            "intermediate_size": m.mlp_dim,
            "hidden_act": common.activation_name(m.gelu),
            "qkv_bias": bool(m.bias),
        }
        if m.num_classes:
            labels = description.labels or tuple(f"LABEL_{i}" for i in range(m.num_classes))
            config |= {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        images = common.preprocessor_config("ViTImageProcessor", m.image, description.preprocessing)
        return {"config.json": config, "preprocessor_config.json": images}
