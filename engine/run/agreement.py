"""Ranks started differently are told so at once, and in the words of what differs, instead of training nonsense."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from hashlib import blake2b
from pathlib import Path

import torch

from data import Dataset, captions_fingerprint
from engine.config import Config
from engine.config.classes import fingerprints
from engine.config.keys import key_types, value_of
from engine.errors import ConfigError
from model.kernels import native
from parallel import comm
from parallel.comm import Axis
from parallel.pipeline.schedule_file import fingerprint

_ROOT = Path(__file__).resolve().parents[2]
# What each host may have in a place of its own: images, texts and weights themselves are compared, and rank 0 writes.
_OWN = (
    "data.path", "data.val_path", "data.templates", "data.prompts", "data.tokenizer", "data.workers", "run_dir",
    "data.index_dir", "distillation.teacher", "contrastive.teacher",
)  # fmt: skip
_PACKAGES = ("parallel", "model", "data", "engine")


def facts_of(config: Config, device: torch.device, train_set: Dataset, eval_set: Dataset) -> dict[str, str]:
    """All that ranks of one run have in common, by name, causes before effects.

    Args:
        config: resolved. train_set, eval_set: as this rank has found them.
    """
    p = config.parallel
    return {
        "version of this code": code_version(),
        "torch": torch.__version__,
        **{key: repr(_value(config, key)) for key in key_types() if key not in _OWN},
        "what parallel.schedule says": fingerprint(p.schedule) if p.pipeline_parallel_size > 1 else "nothing",
        "list of training images": f"{len(train_set)} of {train_set.fingerprint}",
        "list of held-out images": f"{len(eval_set)} of {eval_set.fingerprint}",
        "texts of training images": captions_fingerprint(train_set),
        "texts of held-out images": captions_fingerprint(eval_set),
        "weights of teachers": ", ".join(fingerprints(config, train_set.class_names)) or "none",
        "type of the device": device.type,
        "native kernels": "not wanted" if config.kernels == "reference" else _found(native.module_for(device)),
    }


def _value(config: Config, key: str) -> object:
    """Of a key, without the places of teachers, whose weights are compared."""
    value = value_of(config, key)
    if key == "distillation.teachers" and value is not None:
        return tuple(replace(teacher, path="") for teacher in value)
    return value


def _found(module: object) -> str:
    return "missing" if module is None else "found"


@cache
def code_version() -> str:
    """A hash of the program's Python sources."""
    digest = blake2b(digest_size=8)
    for file in sorted(file for package in _PACKAGES for file in (_ROOT / package).rglob("*.py")):
        source = file.read_bytes()
        digest.update(f"{file.relative_to(_ROOT)} {len(source)} ".encode() + source)
    return digest.hexdigest()


def check_agreement(facts: Mapping[str, str], world: Axis) -> None:
    """Compare the facts of all ranks. Collective, of a few bytes where they agree.

    Raises:
        ConfigError: on every rank, if they do not: the first that differs, what it is, and on which ranks.
    """
    digest = blake2b(json.dumps(list(facts.items())).encode(), digest_size=16).digest()
    if len(set(comm.gather_objects(digest, world))) == 1:
        return
    everywhere: list[Mapping[str, str]] = comm.gather_objects(dict(facts), world)
    names = dict.fromkeys(name for given in everywhere for name in given)
    different = [name for name in names if len({given.get(name) for given in everywhere}) > 1]
    ranks_with: dict[str, list[int]] = {}
    for rank, given in enumerate(everywhere):
        ranks_with.setdefault(given.get(different[0], "unknown"), []).append(rank)
    found = ", ".join(f"{value} on {named_ranks(ranks)}" for value, ranks in ranks_with.items())
    more = f" (so do {', '.join(different[1:4])}{', ...' if len(different) > 4 else ''})" if len(different) > 1 else ""
    raise ConfigError(
        f"{different[0]} differs between ranks: {found}{more}; start all ranks with the same code, files and settings"
    )


def named_ranks(ranks: Sequence[int]) -> str:
    """In words: `rank 3`, `ranks 0, 2`, at most eight one by one."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
