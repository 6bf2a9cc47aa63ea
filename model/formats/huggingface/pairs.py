"""Both towers of CLIP, SigLIP and SigLIP 2 in transformers: CLIPModel, SiglipModel, Siglip2Model.

Names: those of the image tower alone; `text_model.encoder.layers.3.self_attn.q_proj.weight`,
`text_model.embeddings.token_embedding.weight`; `text_projection.weight` of CLIP, `text_model.head.weight` of SigLIP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Origin, Pairing
from model.formats.huggingface import common, keys
from model.formats.huggingface.clip import HfClipVision
from model.formats.huggingface.names import CLIP_ENCODER, block_rules
from model.formats.huggingface.siglip import HfSiglip, HfSiglip2
from model.formats.pairs import ALONE, image_of, pairing_in, text_model, within
from model.formats.rules import Rule, rule
from model.formats.sources import Source
from model.formats.texts import Forms, checked_text, joined, meeting
from model.formats.ways import Void
from model.text import TextConfig
from model.towers import IMAGE, TEXT

_NAMES = replace(CLIP_ENCODER, norm="final_layer_norm")  # of its blocks and the norm behind them alone
_TEXT, _IMAGE = "text_model.", "vision_model."
_POSITIONS = re.compile(r"(.*\.)?embeddings\.position_ids")
_LEGACY_END = 2  # which CLIPModel takes for "the largest token of a text"
_SENTENCEPIECE_END = 1  # of the vocabularies of C4 and Gemma; other tokens are told by it, though the last is pooled


class HfClipPair:
    """CLIPModel. As Format, of both towers; SigLIP's differ in what the methods below `files` say."""

    kind, title, container = HfClipVision.kind, "transformers' CLIPModel", "model"
    family, model, projection = "clip", "CLIPModel", "text_projection"
    image: HfClipVision | HfSiglip = HfClipVision()
    forms = Forms(pools=("eos",), attention=("causal",), projections=("linear",), allowed={})
    known, has_bias, has_dicts = keys.CLIP_TEXT, False, True
    defaults: Mapping[str, Any] = {
        "hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048,
        "max_position_embeddings": 77, "vocab_size": 49408, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
        "eos_token_id": 49407,
    }  # fmt: skip

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return all(any(name.startswith(start) for name in source.tensors) for start in (_TEXT, _IMAGE))

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        self._check_family(source)
        image, t = self.image.describe(source, given), self._text_config(source)
        if (projection := source.tensors.get(f"{self.projection}.weight")) is None:
            raise ConversionError(f"{source.path} has a text tower, and no {self.projection}.weight; {ALONE}")
        text = TextConfig(
            width=t["hidden_size"],
            depth=t["num_hidden_layers"],
            num_heads=t["num_attention_heads"],
            mlp_dim=t["intermediate_size"],
            context_length=t["max_position_embeddings"],
            vocabulary_size=t["vocab_size"],
            norm_eps=float(t["layer_norm_eps"]),
            gelu=common.activation_of(t),  # type: ignore[arg-type]
            projection="linear",
            **self._ends(t),
        )
        return joined(source, image, text, projection.shape[0], has_bias=self.has_bias)

    def _check_family(self, source: Source) -> None:
        """Raise ConversionError for another model of the same names, which may pool another token."""
        family = source.files.get(common.CONFIG, {}).get("model_type", self.family)
        if family != self.family:
            raise ConversionError(
                f"model_type of {common.CONFIG} is {family!r}: of {self.title} it is {self.family!r}, and its text "
                f"tower may be another; {ALONE}"
            )

    def _text_config(self, source: Source) -> dict[str, Any]:
        """Theirs of the text tower. Raises ConversionError for keys that are not known."""
        config = source.files.get(common.CONFIG, {})
        found = common.part_of(config, "text_config", self.known, has_dicts=self.has_dicts)
        return {**self.defaults, **{key: value for key, value in found.items() if value is not None}}

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        p = pairing_in(description)
        text = checked_text(self.title, p, self.forms)
        self._check(description, p)
        rules = within(IMAGE, self.image.rules(self._alone(description)))
        rules += within(TEXT, [*_text_rules(text), *self._projection(p)])
        return [*rules, *meeting(p, (1,) if self.has_bias else (), has_bias=self.has_bias)]

    def carries(self, name: str) -> bool:
        """As Format: numbers of positions, of older files."""
        return bool(_POSITIONS.fullmatch(name))

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        p, (m, _) = pairing_in(description), text_model(pairing_in(description))
        files = self.image.files(self._alone(description))
        config = {key: value for key, value in files[common.CONFIG].items() if key != "text_config_dict"}
        text = dict(config.get("text_config") or {}) | {
            "model_type": f"{self.family}_text_model",
            "hidden_size": m.width,
            "num_hidden_layers": m.depth,
            "num_attention_heads": m.num_heads,
            "intermediate_size": m.mlp_dim,
            "max_position_embeddings": p.text.context_length,
            "vocab_size": p.text.vocabulary_size,
            "layer_norm_eps": m.norm_eps,
            "hidden_act": common.activation_name(m.gelu),
        }
        config |= {"model_type": self.family, "architectures": [self.model]}
        return files | {common.CONFIG: config | {"text_config": self._with_ends(text, p)}}

    def _alone(self, description: Description) -> Description:
        """The image tower, as that format names it within a model of two towers."""
        origin = common.origin_of(description, self.kind) or Origin(kind=self.kind)
        whole = replace(origin, variant=_IMAGE, config={"vision_config": {}, **origin.config})
        return replace(image_of(description), origin=whole)

    # -- what SigLIP has otherwise -------------------------------------------------------------------------------------

    def _ends(self, t: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of our text tower's pooling and projection."""
        end, last = t["eos_token_id"], t["vocab_size"] - 1
        if not isinstance(end, int):
            raise ConversionError(f"text_config has eos_token_id {end}: this text tower has one end of a text; {ALONE}")
        return {"attention": "causal", "pool": "eos", "end_token": last if end == _LEGACY_END else end}

    def _with_ends(self, text: dict[str, Any], p: Pairing) -> dict[str, Any]:
        """The inverse: `text_config` with keys of pooling and projection."""
        end = p.text.end_token
        if text.get("eos_token_id") == _LEGACY_END and p.text.vocabulary_size == (end or 0) + 1:
            end = _LEGACY_END  # as it came
        return text | {"eos_token_id": end, "projection_dim": p.embedding}

    def _check(self, description: Description, p: Pairing) -> None:
        """Raise ConversionError, by key, for towers that meet otherwise than there."""
        end, biased = p.text.end_token, bool(p.text.projection_bias)
        is_legacy = end == _LEGACY_END and p.text.vocabulary_size != end + 1
        _refuse(self.title, "contrastive.projection", p.projection, p.projection != "linear", "linear ones")
        _refuse(self.title, "contrastive.projection_bias", True, p.projection_bias, "projections without a bias")
        _refuse(self.title, "text.projection_bias", True, biased, "projections without a bias")
        _refuse(self.title, "contrastive.bias", p.bias, p.bias is not None, "logits without a bias")
        _refuse(self.title, "text.end_token", end, is_legacy, "another, as it takes 2 for the largest of a text")

    def _projection(self, p: Pairing) -> list[Rule]:
        return [rule("head.fc.weight", f"{self.projection}.weight")]


class HfSiglipPair(HfClipPair):
    """SiglipModel, also of SigLIP 2 of fixed size."""

    kind, title = HfSiglip.kind, "transformers' SiglipModel"
    family, model, projection = "siglip", "SiglipModel", "text_model.head"
    image = HfSiglip()
    forms = Forms(pools=("last",), attention=("full",), projections=("linear",), allowed={})
    known, has_bias, has_dicts = keys.SIGLIP_TEXT, True, False
    defaults: Mapping[str, Any] = {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "max_position_embeddings": 64, "vocab_size": 32000, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
    }  # fmt: skip

    def _ends(self, t: Mapping[str, Any]) -> dict[str, Any]:
        end = min(_SENTENCEPIECE_END, t["vocab_size"] - 1)
        return {"attention": "full", "pool": "last", "end_token": end, "projection_bias": True}

    def _with_ends(self, text: dict[str, Any], p: Pairing) -> dict[str, Any]:
        return text | {"projection_size": p.embedding}

    def _check(self, description: Description, p: Pairing) -> None:
        pool = description.model.pool
        _refuse(self.title, "model.pool", pool, pool != "map", "map")
        _refuse(self.title, "contrastive.projection", p.projection, p.projection != "none", "images without one")

    def _projection(self, p: Pairing) -> list[Rule]:
        bias = f"{self.projection}.bias"
        own = rule("head.fc.bias", bias) if p.text.projection_bias else rule("", bias, way=Void((p.embedding,)))
        return [rule("head.fc.weight", f"{self.projection}.weight"), own]


class HfSiglip2Pair(HfSiglipPair):
    """Siglip2Model, in the square grid of its positions."""

    kind, title = HfSiglip2.kind, "transformers' Siglip2Model"
    family, model = "siglip2", "Siglip2Model"
    image = HfSiglip2()


def _text_rules(m: ModelConfig) -> list[Rule]:
    """Of the text tower by itself, all but its projection."""
    tables = {"embed.token.weight": "token_embedding", "embed.pos": "position_embedding"}
    rules = [rule(ours, f"{_TEXT}embeddings.{theirs}.weight") for ours, theirs in tables.items()]
    for i in range(m.sizes.depth):
        rules += block_rules(_NAMES, m, f"blocks.{i}.", _TEXT + _NAMES.block.format(i))
    return rules + [rule(f"head.norm.{k}", f"{_TEXT}{_NAMES.norm}.{k}") for k in ("weight", "bias")]


def _refuse(title: str, key: str, value: object, is_so: bool, wanted: str) -> None:
    if is_so:
        raise ConversionError(f"{key} is {str(value).lower()}: {title} has no such models, only {wanted}")
