"""Vision towers of open_clip that are models of timm (SigLIP): `visual.trunk.*`, by the rules of that format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError
from model.formats.rules import Rule
from model.formats.timm import vit
from model.formats.timm.arguments import VIT, Constructor, constructor_of

_TRUNK, _LINEAR = "visual.trunk.", "visual.head.proj."
_POOLS = ("token", "avg", "map", "")


def is_timm(cfg: Mapping[str, Any]) -> bool:
    """Whether a configuration (`model_cfg`) has a tower of timm."""
    return bool(cfg.get("vision_cfg", {}).get("timm_model_name"))


def constructor(path: Path, cfg: Mapping[str, Any]) -> Constructor:
    """What open_clip's TimmModel calls, of the classes of timm that are one tower of tokens.

    Raises:
        ConversionError: by name, for a tower that this program does not know.
    """
    vision = cfg["vision_cfg"]
    name, size = vision["timm_model_name"], vision.get("image_size", 224)
    if strange := sorted(set(vision) - _KNOWN):
        raise ConversionError(f"{path}: vision_cfg.{strange[0]} has no meaning beside timm_model_name")
    pool, projection = vision.get("timm_pool", "avg"), _projection(cfg)
    if pool not in _POOLS or projection not in ("linear", "none", ""):
        key, value = ("timm_proj", projection) if pool in _POOLS else ("timm_pool", pool)
        raise ConversionError(f"{path}: vision_cfg.{key} is {value!r}, which this model has not")
    images = {"input_size": [3, *(size if isinstance(size, list | tuple) else (size, size))], "fixed_input_size": True}
    try:
        made = constructor_of({"architecture": name, "pretrained_cfg": images})
    except ConversionError as error:
        raise ConversionError(f"{path}: vision_cfg.timm_model_name {name}: {error}") from error
    if made.name != VIT:
        raise ConversionError(f"{path}: vision_cfg.timm_model_name {name} is of timm's {made.name}, no {VIT}")
    arguments = {**made.arguments, "num_classes": 0 if projection == "none" else cfg["embed_dim"]}
    if projection == "linear" and arguments["fc_norm"] is None:  # the pool is changed when the model is made
        arguments["fc_norm"] = arguments["global_pool"] == "avg"
    if pool or projection != "linear":
        arguments["global_pool"] = pool
    return replace(made, arguments=arguments)


def model_of(path: Path, cfg: Mapping[str, Any]) -> ModelConfig:
    """Our model. Raises ConversionError, as `constructor`."""
    model = vit.model_of(constructor(path, cfg))
    if _projection(cfg) == "linear" and not cfg["vision_cfg"].get("timm_proj_bias", False):
        return replace(model, classifier_bias=False).resolve()
    return model


def rules_of(path: Path, cfg: Mapping[str, Any], model: ModelConfig) -> list[Rule]:
    """Between the tensors of our model and those of the tower that it came as.

    Raises:
        ConversionError: it is no longer as that tower is.
    """
    if not _same(model, model_of(path, cfg)):
        raise ConversionError(
            f"the model is no longer as vision_cfg.timm_model_name {cfg['vision_cfg']['timm_model_name']} says, with "
            "which it came: convert it as timm"
        )
    linear = _projection(cfg) == "linear"
    found = []
    for rule in vit.rules(model, constructor(path, cfg)):
        names = [n.replace("head.", _LINEAR) if linear and n.startswith("head.") else _TRUNK + n for n in rule.theirs]
        if rule.ours or not names[0].startswith(_LINEAR):  # of a projection without bias theirs has none either
            found.append(replace(rule, theirs=tuple(names), reads=tuple(_TRUNK + n for n in rule.reads)))
    return found


def _projection(cfg: Mapping[str, Any]) -> str:
    return cfg["vision_cfg"].get("timm_proj", "linear") or ""


def _same(first: ModelConfig, second: ModelConfig) -> bool:
    def bare(model: ModelConfig) -> ModelConfig:
        return replace(model, preset=None, drop_path=0.0, head_bias=None)

    return bare(first) == bare(second)


_KNOWN = {
    "timm_model_name", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop",
    "timm_drop_path", "image_size", "patch_dropout",
}  # fmt: skip
