"""Both towers of open_clip's CLIP and CustomTextCLIP (Radford et al. 2021; Cherti et al. 2023; Zhai et al. 2023).

Names: `visual.*` as of the image tower alone; `transformer.resblocks.3.attn.in_proj_weight`, `token_embedding.weight`,
`text_projection` of CLIP's text tower, and below `text.` those of CustomTextCLIP's.

Legend: V vocabulary, S tokens, D width of the text tower, E embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ModelConfig
from model.formats import open_clip_timm as timm_towers
from model.formats.base import ConversionError, Description, Origin, Pairing
from model.formats.expressible import ANY
from model.formats.open_clip import OpenClip, block_rules
from model.formats.open_clip_config import FILE, found_config
from model.formats.open_clip_text import text_cfg_for, text_of
from model.formats.pairs import ALONE, image_of, pairing_in, text_model, within
from model.formats.rules import Rule, rule
from model.formats.sources import Source
from model.formats.texts import Forms, checked_text, joined, meeting
from model.formats.ways import Permuted
from model.towers import IMAGE, TEXT

_CUSTOM = "text."
_BESIDE = re.compile(r"(text\.)?attn_mask|input_resolution|context_length|vocab_size")  # of older files
_KEYS = {
    "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias",
    "nonscalar_logit_scale", "output_dict", "cast_dtype",
}  # fmt: skip
_FORMS = Forms(
    pools=("eos", "last"), attention=("causal", "full"), projections=("linear", "none"), allowed={"layer_scale": ANY}
)


class OpenClipPair:
    """As Format, of both towers."""

    kind, title, container = OpenClip.kind, "open_clip's image and text towers", OpenClip.container
    _image = OpenClip()

    def recognises(self, source: Source) -> bool:
        """As Format."""
        names = source.tensors
        has_text = any(n.startswith(("text.", "token_embedding.", "text_decoder.")) for n in names)
        return has_text and any(n.startswith("visual.") for n in names)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        found = found_config(source)
        cfg = found.get("model_cfg", found)
        if "text_cfg" not in cfg:
            raise ConversionError(
                f"{source.path} has a text tower, and no {FILE} beside it that describes one: give it (--source_config "
                f"FILE, also one of open_clip's own model_configs); {ALONE}"
            )
        if strange := sorted(key for key in set(cfg) - _KEYS if cfg[key]):
            raise ConversionError(f"{source.path}: {strange[0]} of its configuration is not known here; {ALONE}")
        text, start = text_of(source.path, cfg), _text_start(source)
        has_bias = cfg.get("init_logit_bias") is not None or "logit_bias" in source.tensors
        image = self._image.describe(source, given)
        both = joined(source, image, text, cfg["embed_dim"], has_bias=has_bias)
        is_vector = bool(source.tensors["logit_scale"].shape)  # either way, whatever the configuration has
        if is_vector != bool(cfg.get("nonscalar_logit_scale")):
            cfg = {**cfg, "nonscalar_logit_scale": is_vector}
            found = {**found, "model_cfg": cfg} if "model_cfg" in found else cfg
        return replace(both, origin=Origin(kind=self.kind, variant=start, config=found))

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        p, cfg = pairing_in(description), self._cfg(description)
        text = checked_text(self.title, p, _FORMS)
        is_timm = timm_towers.is_timm(cfg)
        if p.projection == "mlp" or (not is_timm and (p.projection != "linear" or p.projection_bias)):
            key = "projection_bias" if p.projection_bias else "projection"
            raise ConversionError(
                f"contrastive.{key} is {str(getattr(p, key)).lower()}: in {self.title} one matrix without a bias "
                "projects images, but for image towers of timm that came from there"
            )
        if not is_timm and (text.gelu == "quick") != (description.model.gelu == "quick"):
            raise ConversionError(
                f"model.gelu is {description.model.gelu} and text.gelu {text.gelu}: open_clip has quick ones in both "
                "towers or in none"
            )
        start = self._start(description)
        rules = within(IMAGE, self._image.rules(self._alone(description)))
        rules += within(TEXT, _text_rules(p, text, start))
        shape = (1,) if cfg.get("nonscalar_logit_scale") else ()
        return [*rules, *meeting(p, shape, has_bias=p.bias is not None)]

    def carries(self, name: str) -> bool:
        """As Format: what older files say of sizes."""
        return bool(_BESIDE.fullmatch(name))

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        p, (text, projection) = pairing_in(description), text_model(pairing_in(description))
        files = self._image.files(self._alone(description))
        cfg = files[FILE]["model_cfg"]
        cfg["embed_dim"] = p.embedding
        cfg["text_cfg"] = text_cfg_for(p, text, projection, cfg.get("text_cfg", {}))
        if bool(cfg.get("quick_gelu")) != (text.gelu == "quick"):  # towers of timm have their own
            cfg["quick_gelu"] = text.gelu == "quick"
        if self._start(description) == _CUSTOM:
            cfg["custom_text"] = True
        if p.bias is not None:
            cfg.setdefault("init_logit_bias", p.bias)
        return files

    def _alone(self, description: Description) -> Description:
        """The image tower, as that format names it."""
        origin = description.origin
        if origin is None or origin.kind != self.kind:
            origin = Origin(kind=self.kind)
        return replace(image_of(description), origin=replace(origin, variant="visual."))

    def _cfg(self, description: Description) -> Mapping[str, Any]:
        origin = description.origin
        found = origin.config if origin is not None and origin.kind == self.kind else {}
        cfg: Mapping[str, Any] = found.get("model_cfg", found)
        return cfg

    def _start(self, description: Description) -> str:
        origin = description.origin
        return origin.variant if origin is not None and origin.kind == self.kind else ""


def _text_start(source: Source) -> str:
    return _CUSTOM if any(name.startswith(_CUSTOM) for name in source.tensors) else ""


def _text_rules(p: Pairing, m: ModelConfig, start: str) -> list[Rule]:
    """Of the text tower by itself."""
    width, classes = m.sizes.last.width, m.sizes.classes
    rules = [
        rule("embed.token.weight", f"{start}token_embedding.weight"),
        rule("embed.pos", f"{start}positional_embedding"),
    ]
    for i in range(m.sizes.depth):
        rules += block_rules(f"blocks.{i}.", f"{start}transformer.resblocks.{i}.", m)
    rules += [rule(f"head.norm.{k}", f"{start}ln_final.{k}") for k in ("weight", "bias")]
    if not classes:
        return rules
    if p.text.projection_bias:
        return rules + [rule(f"head.fc.{k}", f"{start}text_projection.{k}") for k in ("weight", "bias")]
    way = Permuted((width, classes), (1, 0), (classes, width))
    return [*rules, rule("head.fc.weight", f"{start}text_projection", way=way)]
