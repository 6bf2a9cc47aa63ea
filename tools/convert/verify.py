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
from tools.convert.images import photographs, tokens
from tools.convert.runners import RUNNERS, Outputs, vitruvius

MOST_APART, LEAST_COSINE = 1e-4, 1 - 1e-6
Inputs = tuple[Tensor] | tuple[Tensor, Tensor]
"""Images [B, C, H, W], and tokens of texts [n, S]."""
_LIBRARIES = {"timm": "timm", "big_vision": "timm", "open_clip": "open_clip"}


@dataclass(frozen=True)
class Difference:
    """Between what two models give for the same images, and texts.

    Attributes:
        what: features or logits; of two towers embeddings, and the logits of all pairs. largest: absolute difference of
            two numbers. cosine: of one image's or text's numbers, the least.
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


def outputs(path: Path, kind: str, images: Tensor, texts: Tensor | None = None) -> Outputs:
    """Of the checkpoint at a path, by the class that it is for; of both towers if there are texts."""
    run = vitruvius.run if kind == VITRUVIUS else RUNNERS[kind]
    with torch.inference_mode():
        return run(path, images) if texts is None else run(path, images, texts)


def source_outputs(weights: Weights, inputs: Inputs, *, told: bool) -> Outputs:
    """Of weights that are open, by the class of their kind.

    Args:
        told: whether their files lack what is known of them (`--model.num_heads`): then they are run as a whole
            checkpoint of their kind, with the same tensors, in a temporary folder.
    """
    if not told:
        return outputs(weights.path, weights.kind, *inputs)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.npz"  # a file, or a folder of that name
        save_weights(weights, whole, weights.kind)
        return outputs(whole, weights.kind, *inputs)


def images_for(description: Description) -> Tensor:
    """The photographs, as a model wants them."""
    sizes = description.model.sizes
    return photographs(sizes.channels, sizes.image, description.preprocessing)


def inputs_for(description: Description) -> Inputs:
    """The same; for two towers texts, too."""
    images, pairing = images_for(description), description.pairing
    return (images,) if pairing is None else (images, tokens(pairing.text))


def differences(first: Outputs, second: Outputs) -> Iterator[Difference]:
    """Of features, or embeddings of both towers, and of logits where both have them."""
    images = "features" if first.texts is None else "images"
    pairs = {
        images: (first.features, second.features),
        "texts": (first.texts, second.texts),
        "logits": (first.logits, second.logits),
    }
    for what, (a, b) in pairs.items():
        if a is not None and b is not None:
            a, b = a.double(), b.double()
            yield Difference(what, float((a - b).abs().max()), float(torch.cosine_similarity(a, b).min()))
