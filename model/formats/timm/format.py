"""The format of timm: tensors of its Vision Transformers and Swin, and the config.json that its create_model reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Origin
from model.formats.rules import Rule
from model.formats.sources import Source
from model.formats.timm import hiera, images, shapes, swin, vit
from model.formats.timm.architectures import ARCHITECTURES
from model.formats.timm.arguments import DEFAULTS, DISTILLED, HIERA, SWIN, VIT, Constructor, constructor_of

_MODULES: dict[str, ModuleType] = {VIT: vit, DISTILLED: vit, SWIN: swin, HIERA: hiera}
_BASES = {  # architectures that others are made of by other arguments: between them those that JSON cannot say
    VIT: ("vit_base_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_xp_224", "vit_giant_patch14_dinov2"),
    DISTILLED: ("deit_base_distilled_patch16_224",),
    SWIN: ("swin_tiny_patch4_window7_224",),
}
_CLASSES = ("block_fn", "mlp_layer", "attn_layer", "embed_layer")  # arguments that are classes, which JSON has not


class Timm:
    """Names: `blocks.3.attn.qkv.weight`; of Swin `layers.2.blocks.3.attn.qkv.weight`."""

    kind, title, container = "timm", "timm's models", "model"

    def recognises(self, source: Source) -> bool:
        """As Format."""
        names, config = source.tensors, source.files.get("config.json", {})
        ours = "patch_embed.proj.weight" in names and any(n.startswith(("blocks.0.", "layers.0.")) for n in names)
        return ours or isinstance(config.get("architecture"), str)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        config = source.files.get("config.json", {})
        if "architecture" in config:
            made = constructor_of(config)
        else:
            config, made = {}, shapes.made_from({n: e.shape for n, e in source.tensors.items()}, given)
        return Description(
            model=_model_of(made),
            preprocessing=images.preprocessing_of(config, made),
            origin=Origin(kind=self.kind, variant=made.name, config=config),
            labels=images.labels_of(config),
        )

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        made, _ = _target(description, self.kind)
        found: list[Rule] = _MODULES[made.name].rules(description.model, made)
        return found

    def carries(self, name: str) -> bool:
        """As Format: the mask token of DINOv2's own files."""
        return name == "mask_token"

    def files(self, description: Description) -> dict[str, Any]:
        """As Format."""
        made, config = _target(description, self.kind)
        return {"config.json": config or config_of(made, description)}


def _model_of(made: Constructor) -> ModelConfig:
    model: ModelConfig = _MODULES[made.name].model_of(made)
    return model


def _target(description: Description, kind: str) -> tuple[Constructor, Mapping[str, Any]]:
    """What timm is to call, and the config.json that says so, if it is the one that the model came with."""
    origin = description.origin
    if origin is not None and origin.kind == kind and origin.config:
        made = constructor_of(origin.config)
        if _same(_model_of(made), description.model):
            return made, origin.config if "pretrained_cfg" in origin.config else {}  # else by hand, or of old
    family = swin if description.model.stages else vit
    return family.made_of(description.model), {}


def _same(first: ModelConfig, second: ModelConfig) -> bool:
    """Whether two models compute the same, and have the same tensors."""

    def bare(model: ModelConfig) -> ModelConfig:
        return replace(model, preset=None, drop_path=0.0, head_bias=None, layer_scale=float(bool(model.layer_scale)))

    return bare(first) == bare(second)


# -- a config.json of ours ---------------------------------------------------------------------------------------------


def config_of(made: Constructor, description: Description) -> dict[str, Any]:
    """The config.json that makes timm call a class so. Raises ConversionError if none does."""
    origin = description.origin
    before = origin.config if origin is not None and origin.kind == "timm" else {}
    architecture = str(before.get("architecture", "")).partition(".")[0]
    for name in (architecture, *_BASES[made.name]):
        if (arguments := _model_args(name, made)) is not None:
            break
    else:
        raise ConversionError(
            f"model.norm_eps {made['norm_eps']:g} with model.norm {made['norm_layer']}: no architecture of timm's has "
            "it, and its config.json cannot say it"
        )
    config = {
        "architecture": name,
        "num_classes": made["num_classes"],
        "num_features": description.model.sizes.last.width,
        "global_pool": made["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": images.pretrained_cfg(made, description, before.get("pretrained_cfg", {})),
    }
    if description.labels:
        config["label_names"] = list(description.labels)
        config |= {key: before[key] for key in ("label_descriptions",) if key in before}
    return config


def _model_args(architecture: str, made: Constructor) -> dict[str, Any] | None:
    """The arguments that an architecture needs beside its own; None if JSON cannot say them."""
    name, own = ARCHITECTURES.get(architecture, ("", {}))
    if name != made.name:
        return None
    base = DEFAULTS[name] | own
    if any(made[key] != base[key] for key in _CLASSES if key in base):
        return None
    always = ("img_size", "in_chans", "num_classes", "global_pool")
    changed = {k: v for k, v in made.arguments.items() if v != base[k] or k in always}
    if made["norm_eps"] != base["norm_eps"] or made["norm_layer"] != base["norm_layer"]:
        if name == SWIN or made["norm_eps"] != 1e-6:  # that of what a name of a norm stands for
            return None
        changed["norm_layer"] = made["norm_layer"]
    changed.pop("norm_eps", None)
    for key in [key for key, value in changed.items() if value is None]:  # timm leaves None out
        if key == "init_values" and base["block_fn"] == "Block":
            changed[key] = 0
        elif key == "fc_norm" or key == "head_dim":
            del changed[key]
        elif key == "embed_norm_layer":
            changed[key] = ""
        else:
            return None
    return {k: list(v) if isinstance(v, tuple) else v for k, v in changed.items()}
