"""What a checkpoint says of the configuration that its model is evaluated with: flags win over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from data.config import DataConfig, is_of
from engine.config import plain
from model.formats.base import Description, Preprocessing
from model.formats.pairs import OF_THE_RUN
from model.formats.shown import keys_of

# Of a run, what says nothing of its model and images, or of the ranks that run it here.
_DROPPED = ("parallel", "recompute", "optimizer", "schedule", "checkpoint", "log", "run_dir", "device")
_KEPT_OF_TRAIN = ("seed", "loss", "micro_batch_size")
_KEPT_OF_DATA = (
    "mean", "std", "eval_transform", "crop_pct", "workers", "views", "tokenizer", "text_cleaning", "text_padding",
)  # fmt: skip


def stored_keys(
    saved: Mapping[str, Any], description: Description | None, shown: Preprocessing | None, flags: Mapping[str, str]
) -> dict[str, Any]:
    """Keys of the configuration that flags win over."""
    kept = {name: value for name, value in saved.items() if name not in _DROPPED}
    if "contrastive" in kept:
        kept["contrastive"] = {name: value for name, value in kept["contrastive"].items() if name not in OF_THE_RUN}
    if kept.pop("distillation", None) is not None and kept.get("objective") == "distillation":
        del kept["objective"]  # a student is a model like others
    if description is not None and "model" not in kept:
        kept["model"] = plain(asdict(description.model))
    train = kept.get("train") or {}
    kept["train"] = {name: train[name] for name in _KEPT_OF_TRAIN if name in train} | {"steps": 1}
    data = dict(kept.get("data") or {})
    if shown is not None:  # which a run's own keys say as well, if it had them
        data = {"mean": list(shown.mean), "std": list(shown.std)} | _keys_of(shown, data, flags) | data
    if data and data.get("labels_per_class") is not None:  # labels that the run was not told stay untold
        data = data | {"images_per_class": data["labels_per_class"], "labels_per_class": None}
    if data and (kind := flags.get("data.kind", data.get("kind"))) != data.get("kind"):  # other images, seen alike
        data = {name: data[name] for name in _KEPT_OF_DATA if name in data and is_of(str(kind), name)}
    if "data.eval_transform" in flags:  # whose part of a side it was
        data.pop("crop_pct", None)
    return kept | {"data": data} if data else kept


def _keys_of(shown: Preprocessing, data: Mapping[str, Any], flags: Mapping[str, str]) -> dict[str, Any]:
    """Of what another library's file says, where the images here are shown in one of several ways."""
    kind = flags.get("data.kind", data.get("kind", DataConfig.kind))
    said = "eval_transform" in data or "data.variable_resolution" in flags  # which has a way of its own
    return keys_of(shown) if not said and is_of(kind, "eval_transform") else {}


def values_of(flags: Sequence[str]) -> dict[str, str]:
    """By key, of flags such as `--data.kind digits` and `--data.kind=digits`."""
    found = {}
    for i, flag in enumerate(flags):
        key, given, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--"):
            found[key] = value if given else next(iter(flags[i + 1 :]), "")
    return found
