"""Vision towers of open_clip, OpenAI's CLIP among them (Radford et al. 2021; Cherti et al. 2023), and the models of two
towers that they are part of.

Names: `visual.transformer.resblocks.3.attn.in_proj_weight`; without `visual.` for a tower alone, which is how a model
that never had a text tower is written.

Legend: D width, E classes (the width that both towers are projected to), P patch side, N patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.formats import open_clip_timm as timm_towers
from model.formats.base import ConversionError, Description, Origin
from model.formats.expressible import ANY, check_expressible, check_whole_patches
from model.formats.open_clip_config import (
    FILE,
    found_config,
    gelu_of,
    made_config,
    preprocess_cfg,
    preprocessing_of,
    vision_cfg,
    vision_cfg_for,
)
from model.formats.rules import Rule, rule
from model.formats.sources import Source
from model.formats.ways import Permuted, Same

_FIRST = "transformer.resblocks.0.ln_1.weight"
_TEXT = re.compile(
    r"(token_embedding|transformer|ln_final|text|text_decoder)\..*"
    r"|positional_embedding|text_projection|cls_emb|logit_scale|logit_bias|attn_mask"
    r"|input_resolution|context_length|vocab_size"  # numbers of OpenAI's own files
)
_LAYERS = {
    "ln_1": "norm1",
    "attn.out_proj": "attn.proj",
    "ln_2": "norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class OpenClip:
    """`VisionTransformer` of open_clip, alone or as `visual` of CLIP, CustomTextCLIP or CoCa."""

    kind, title, container = "open_clip", "open_clip's vision tower", "open_clip_model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        alone = "class_embedding" in source.tensors and _FIRST in source.tensors
        return alone or any(name.startswith("visual.") for name in source.tensors)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        start = "visual." if any(name.startswith("visual.") for name in source.tensors) else ""
        found = found_config(source)
        cfg = found.get("model_cfg", found) or made_config(source, start, given)
        images = preprocessing_of(found.get("preprocess_cfg", {}))
        origin = Origin(kind=self.kind, variant=start, config=found)
        if timm_towers.is_timm(cfg):
            model = model_of_config(source.path, cfg)
            return Description(model=model, preprocessing=images, origin=origin, embeds=bool(model.num_classes))
        vision = vision_cfg(source.path, cfg)
        blocks = {int(n) for x in source.tensors for n in re.findall(rf"^{start}transformer\.resblocks\.(\d+)\.", x)}
        if len(blocks) != vision["layers"]:
            raise ConversionError(
                f"{source.path} has {len(blocks)} layers, its vision_cfg.layers is {vision['layers']}"
            )
        model = model_of_config(source.path, cfg)
        check_whole_patches(self.title, model)
        return Description(model=model, preprocessing=images, origin=origin, embeds=True)

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m, origin = description.model, description.origin
        before = self._before(description)
        if timm_towers.is_timm(cfg := before.get("model_cfg", before)):
            return timm_towers.rules_of(Path(FILE), cfg, m)
        check_expressible(self.title, m, _ALLOWED | {"qk_norm_bias": bool(m.qk_norm)})
        check_whole_patches(self.title, m)
        if m.in_channels != 3 or not m.num_classes:
            key = "num_classes" if m.in_channels == 3 else "in_channels"
            raise ConversionError(
                f"model.{key} is {getattr(m, key)}: {self.title} has colour images, and always a projection"
            )
        start = origin.variant if origin is not None and origin.kind == self.kind else ""
        sizes = m.sizes
        width, tokens = sizes.last.width, 1 + sizes.last.rows * sizes.last.cols
        kernel = (width, 3, sizes.patch, sizes.patch)
        rules = [
            rule("embed.weight", f"{start}conv1.weight", way=Same((width, sizes.patch_features), kernel)),
            rule("embed.cls", f"{start}class_embedding", way=Same((1, width), (width,))),
            rule("embed.pos", f"{start}positional_embedding", way=Same((tokens, width), (tokens, width))),
        ]
        for i in range(sizes.depth):
            rules += block_rules(f"blocks.{i}.", f"{start}transformer.resblocks.{i}.", m)
        norms = {"embed.norm": "ln_pre"} if m.pre_norm else {}
        for ours, theirs in {**norms, "head.norm": "ln_post"}.items():
            rules += [rule(f"{ours}.{k}", f"{start}{theirs}.{k}") for k in ("weight", "bias")]
        classes = m.num_classes
        projection = Permuted((width, classes), (1, 0), (classes, width))
        return [*rules, rule("head.fc.weight", f"{start}proj", way=projection)]

    def carries(self, name: str) -> bool:
        """As Format: the text tower, the logits' scale and bias."""
        return bool(_TEXT.fullmatch(name))

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        before = self._before(description)
        m, cfg = description.model, dict(before.get("model_cfg", before))
        if not timm_towers.is_timm(cfg):
            cfg |= {"embed_dim": m.num_classes, "vision_cfg": vision_cfg_for(m, cfg.get("vision_cfg", {}))}
            if bool(cfg.get("quick_gelu")) != (m.gelu == "quick"):
                cfg["quick_gelu"] = m.gelu == "quick"
        images = preprocess_cfg(
            description.preprocessing, m.image, before.get("preprocess_cfg", {} if before else None)
        )
        return {FILE: {"model_cfg": cfg} | ({"preprocess_cfg": images} if images else {})}

    def _before(self, description: Description) -> Mapping[str, Any]:
        """The configuration that a model of this kind came with; empty for others."""
        origin = description.origin
        return origin.config if origin is not None and origin.kind == self.kind else {}


_ALLOWED: dict[str, object] = {
    "norm_eps": ANY, "gelu": ANY, "layer_scale": ANY, "patch_bias": False, "pre_norm": ANY, "pool": {"cls", "gap"},
    "class_tokens": 1, "norm_after_pool": ANY, "classifier_bias": False, "qk_norm": ANY,
}  # fmt: skip


def block_rules(ours: str, theirs: str, m: ModelConfig) -> list[Rule]:
    both = ("weight", "bias")
    layers = _LAYERS | ({"attn.ln_q": "attn.core.q_norm", "attn.ln_k": "attn.core.k_norm"} if m.qk_norm else {})
    rules = [rule(f"{ours}{b}.{k}", f"{theirs}{a}.{k}") for a, b in layers.items() for k in both]
    rules += [rule(f"{ours}attn.qkv.{k}", f"{theirs}attn.in_proj_{k}") for k in both]
    return rules + [rule(f"{ours}scale{i}", f"{theirs}ls_{i}.gamma") for i in (1, 2) if m.layer_scale]


def model_of_config(path: Path, cfg: Mapping[str, Any]) -> ModelConfig:
    """The model of a configuration (`model_cfg`). Raises ConversionError, by key, for what this program has not.

    Args:
        path: of it, for messages.
    """
    if timm_towers.is_timm(cfg):
        return timm_towers.model_of(path, cfg)
    vision = vision_cfg(path, cfg)
    return ModelConfig(
        image_size=tuple(x) if isinstance(x := vision["image_size"], list | tuple) else x,
        patch_size=vision["patch_size"],
        in_channels=3,
        width=vision["width"],
        depth=vision["layers"],
        num_heads=vision["width"] // vision["head_width"],
        mlp_dim=int(vision["width"] * vision["mlp_ratio"]),
        block="sequential",
        norm_eps=(vision["norm_kwargs"] or {}).get("eps", 1e-5),
        gelu=gelu_of(cfg, vision),
        layer_scale=0.0 if vision["ls_init_value"] is None else vision["ls_init_value"] or 1e-5,  # 0 is none here
        patch_bias=False,
        pre_norm=not vision["no_ln_pre"],
        position="learned_1d",
        class_tokens=1,
        pool="cls" if vision["pool_type"] == "tok" else "gap",
        qk_norm=vision["qk_norm"],
        qk_norm_bias=True if vision["qk_norm"] else None,
        norm_after_pool=bool(vision["final_ln_after_pool"]),
        classifier_bias=False,
        num_classes=cfg["embed_dim"],
    ).resolve()
