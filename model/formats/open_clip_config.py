"""open_clip's configuration files: which of their keys have a meaning here, and which are refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from model.config import ModelConfig
from model.formats.base import ConversionError, Preprocessing
from model.formats.sources import Source

FILE = "open_clip_config.json"
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # where it says nothing
BLOCKS = (None, "default", "custom")  # which, without what is refused, are the same
_READ: dict[str, Any] = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "ls_init_value": None, "no_ln_pre": False, "final_ln_after_pool": False, "pool_type": "tok", "act_kwargs": None,
    "norm_kwargs": None, "pos_embed_type": "learnable", "block_type": None, "qk_norm": False,
}  # fmt: skip
_REFUSED: dict[str, Any] = {  # unless they are this
    "attentional_pool": False, "scaled_cosine_attn": False, "scale_heads": False,
    "scale_attn_inner": False, "scale_attn": False, "scale_fc": False, "timm_model_name": None,
}  # fmt: skip
_KNOWN = {  # without a part in what a tower makes of an image, or only beside what is refused
    "patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "timm_model_pretrained", "timm_pool",
    "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
}  # fmt: skip


def found_config(source: Source) -> Mapping[str, Any]:
    """Its configuration; empty if there is none. It is whole (`model_cfg`, `preprocess_cfg`), or of the model alone, as
    open_clip's own are."""
    for name in (FILE, "config.json"):
        found: Mapping[str, Any] = source.files.get(name, {})
        if "vision_cfg" in found.get("model_cfg", found):
            return found
    return {}


def made_config(source: Source, start: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration from shapes, and what they do not say.

    Raises:
        ConversionError: it is neither there nor given.
    """
    shapes = {name: entry.shape for name, entry in source.tensors.items()}
    try:
        kernel, first = shapes[f"{start}conv1.weight"], f"{start}transformer.resblocks.0."
        hidden, positions = shapes[f"{first}mlp.c_fc.weight"][0], shapes[f"{start}positional_embedding"][0] - 1
        classes = shapes[f"{start}proj"][1]
    except (KeyError, IndexError) as error:
        if any(name.startswith("visual.trunk.") for name in shapes):
            raise ConversionError(
                f"{source.path} has a tower of timm, and no {FILE} beside it: give it (--source_config)"
            ) from error
        raise ConversionError(f"{source.path} has no tower of open_clip: {error} is missing") from error
    if "num_heads" not in given or "gelu" not in given:
        raise ConversionError(
            f"{source.path} has no {FILE} beside it: give it (--source_config FILE), or model.num_heads and model.gelu "
            "(quick: OpenAI's own weights), and model.norm_eps, pool, norm_after_pool if they are not 1e-5, cls, false"
        )
    width, side = kernel[0], math.isqrt(positions) * kernel[2]
    vision = {
        "layers": len({name for name in shapes if name.startswith(start) and name.endswith(".ln_1.weight")}),
        "width": width,
        "head_width": width // given["num_heads"],
        "mlp_ratio": ratio_of(hidden, width),
        "patch_size": kernel[2],
        "image_size": given.get("image_size", side),
        "ls_init_value": 1e-5 if f"{first}ls_1.gamma" in shapes else None,
        "qk_norm": f"{first}attn.ln_q.weight" in shapes,
        "no_ln_pre": f"{start}ln_pre.weight" not in shapes,
        "final_ln_after_pool": given.get("norm_after_pool", False),
        "pool_type": "avg" if given.get("pool") == "gap" else "tok",
        "act_kwargs": {"approximate": "tanh"} if given["gelu"] == "tanh" else None,
        "norm_kwargs": {"eps": given["norm_eps"]} if "norm_eps" in given else None,
    }
    return {"embed_dim": classes, "quick_gelu": given["gelu"] == "quick", "vision_cfg": vision}


def vision_cfg(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's configuration, with what is left out filled in.

    Raises:
        ConversionError: by key and value, for what this model has not.
    """
    out = keys_of(path, "vision_cfg", cfg, read=_READ, refused=_REFUSED, known=_KNOWN, choices=_CHOICES)
    if not isinstance(out["layers"], int) or not isinstance(out["patch_size"], int):
        key = "patch_size" if isinstance(out["layers"], int) else "layers"
        raise ConversionError(f"{path}: vision_cfg.{key} is {out[key]}: it is no Vision Transformer of square patches")
    return out


def keys_of(
    path: Path,
    group: str,
    cfg: Mapping[str, Any],
    *,
    read: Mapping[str, Any],
    refused: Mapping[str, Any],
    known: Collection[str],
    choices: Mapping[str, Sequence[Any]],
    what: str = "this model",
    cure: str = "",
) -> dict[str, Any]:
    """A group of a model's configuration, as far as it has a meaning here, with what is left out filled in.

    Args:
        read: keys with a meaning, and their usual values. refused: keys that must be so, or nothing. known: without a
            meaning here. choices: of some that are read. what, cure: for messages: what it describes, and their end.

    Raises:
        ConversionError: by key and value, for what is not there, or not known.
    """
    there: Mapping[str, Any] = cfg[group]
    for key, value in there.items():
        if key not in read and key not in refused and key not in known:
            raise ConversionError(f"{path}: {group}.{key} {value!r} is not known to this program{cure}")
        if key in refused and value != refused[key] and value:
            raise ConversionError(f"{path}: {group}.{key} is {value!r}, which {what} has not{cure}")
    out = dict(read) | {key: value for key, value in there.items() if key in read}
    for key, of in choices.items():
        if out[key] not in of:
            raise ConversionError(f"{path}: {group}.{key} is {out[key]!r}: {what} has {of} alone{cure}")
    for key, names in {"act_kwargs": {"approximate"}, "norm_kwargs": {"eps"}}.items():
        if strange := sorted(set(out[key] or {}) - names):
            raise ConversionError(f"{path}: {group}.{key} has {strange[0]}, which {what} has not{cure}")
    return out


_CHOICES: dict[str, tuple[Any, ...]] = {
    "pool_type": ("tok", "avg"),
    "pos_embed_type": ("learnable", "sin_cos_2d"),  # a tensor of its own either way
    "block_type": BLOCKS,
    "qk_norm": (False, True),
}


def gelu_of(cfg: Mapping[str, Any], keys: Mapping[str, Any]) -> Literal["erf", "tanh", "quick"]:
    """Of a model's configuration and what `keys_of` found for one of its towers."""
    if cfg.get("quick_gelu"):
        return "quick"
    return "tanh" if (keys["act_kwargs"] or {}).get("approximate") == "tanh" else "erf"


def ratio_of(hidden: int, width: int) -> float:
    """Of which open_clip makes the hidden width: int(width * ratio)."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def blocks_cfg_for(m: ModelConfig, old: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that either tower's configuration has of its blocks, as they were in `old` where that says the same."""
    last = m.sizes.last
    ratio = old["mlp_ratio"] if int(last.width * old["mlp_ratio"]) == last.mlp else ratio_of(last.mlp, last.width)
    acts, norms = dict(old["act_kwargs"] or {}), dict(old["norm_kwargs"] or {})
    acts.pop("approximate", None)
    if norms.get("eps", 1e-5) != m.norm_eps:
        norms["eps"] = m.norm_eps
    if m.gelu == "tanh":
        acts["approximate"] = "tanh"
    scale = m.layer_scale or None
    return {
        "layers": m.depth,
        "width": m.width,
        "mlp_ratio": ratio,
        "ls_init_value": old["ls_init_value"] if scale and old["ls_init_value"] == 0 else scale,
        "act_kwargs": acts or None,
        "norm_kwargs": norms or None,
    }


def vision_cfg_for(m: ModelConfig, before: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model of ours: what was there before, where it says the same."""
    last, rows_cols = m.sizes.last, m.image
    old = _READ | dict(before)
    new = blocks_cfg_for(m, old) | {
        "head_width": last.head_dim,
        "patch_size": m.patch_size,
        "image_size": rows_cols[0] if rows_cols[0] == rows_cols[1] else list(rows_cols),
        "no_ln_pre": not m.pre_norm,
        "final_ln_after_pool": bool(m.norm_after_pool),
        "pool_type": "tok" if m.pool == "cls" else "avg",
        "qk_norm": bool(m.qk_norm),
    }
    return dict(before) | {key: value for key, value in new.items() if not _same(old[key], value)}


def _same(old: Any, new: Any) -> bool:
    return bool((old or None) == (new or None)) if isinstance(old, dict | None) else bool(old == new)


# -- images ------------------------------------------------------------------------------------------------------------


def preprocessing_of(cfg: Mapping[str, Any]) -> Preprocessing:
    """Of a `preprocess_cfg`. Raises ConversionError for images that are filled up to a square."""
    mode = cfg.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise ConversionError(f"preprocess_cfg.resize_mode is {mode!r}: this program knows shortest and squash")
    return Preprocessing(
        mean=tuple(cfg.get("mean") or _MEAN),
        std=tuple(cfg.get("std") or _STD),
        interpolation="bilinear" if cfg.get("interpolation") == "bilinear" else "bicubic",  # as open_clip decides
        squash=mode == "squash",
    )


def preprocess_cfg(
    found: Preprocessing | None, image: tuple[int, int], before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Theirs. Raises ConversionError, by name, for what they have not.

    Args:
        image: rows and columns. before: what it was, if it came from there.
    """
    p = found or Preprocessing()
    if p.interpolation not in ("bilinear", "bicubic"):
        raise ConversionError(f"images are resized {p.interpolation}: open_clip has bilinear and bicubic alone")
    if p.crop_fraction != 1 and not p.squash:
        raise ConversionError(
            f"the central {p.crop_fraction:g} of an image is used: open_clip takes all of its shorter side"
        )
    if before is not None and preprocessing_of(before) == p:
        return dict(before)
    size = {"size": image[0] if image[0] == image[1] else list(image)}
    mode = {"interpolation": p.interpolation, "resize_mode": "squash" if p.squash else "shortest"}
    return {**size, "mean": list(p.mean), "std": list(p.std), **mode}
