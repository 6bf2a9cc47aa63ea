"""Two checkpoints of one model, each run by the class that it is for, on the same photographs, in fp32."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.formats.api import save_weights
from model.formats.base import Description
from model.formats.registry import VITRUVIUS
from model.formats.weights import Weights
from tools.convert.images import photographs
from tools.convert.runners import RUNNERS, Outputs, vitruvius

MOST_APART, LEAST_COSINE = 1e-4, 1 - 1e-6
_LIBRARIES = {"timm": "timm", "big_vision": "timm", "open_clip": "open_clip"}


@dataclass(frozen=True)
class Difference:
    """Between what two models give for the same images.

    Attributes:
        what: features or logits. largest: absolute difference of two numbers. cosine: of an image's numbers, the least.
    """

    what: str
    largest: float
    cosine: float

    @property
    def small(self) -> bool:
        """Whether it is rounding alone."""
        return self.largest <= MOST_APART and self.cosine >= LEAST_COSINE


def missing_library(kind: str) -> str | None:
    """The library that a kind's own class is in, if it is not installed."""
    if kind == VITRUVIUS:
        return None
    name = _LIBRARIES.get(kind, "transformers")
    return None if importlib.util.find_spec(name) is not None else name


def outputs(path: Path, kind: str, images: Tensor) -> Outputs:
    """Of the checkpoint at a path, by the class that it is for."""
    with torch.inference_mode():
        return (vitruvius.run if kind == VITRUVIUS else RUNNERS[kind])(path, images)


def source_outputs(weights: Weights, images: Tensor, *, told: bool) -> Outputs:
    """Of weights that are open, by the class of their kind.

    Args:
        told: whether their files lack what is known of them (`--model.num_heads`): then they are run as a whole
            checkpoint of their kind, with the same tensors, in a temporary folder.
    """
    if not told:
        return outputs(weights.path, weights.kind, images)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.npz"  # a file, or a folder of that name
        save_weights(weights, whole, weights.kind)
        return outputs(whole, weights.kind, images)


def images_for(description: Description) -> Tensor:
    """The photographs, as a model wants them."""
    sizes = description.model.sizes
    return photographs(sizes.channels, sizes.image, description.preprocessing)


def differences(first: Outputs, second: Outputs) -> Iterator[Difference]:
    """Of features, and of logits where both have them."""
    pairs = {"features": (first.features, second.features), "logits": (first.logits, second.logits)}
    for what, (a, b) in pairs.items():
        if a is not None and b is not None:
            a, b = a.double(), b.double()
            yield Difference(what, float((a - b).abs().max()), float(torch.cosine_similarity(a, b).min()))
