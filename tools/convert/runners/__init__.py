"""What the other libraries' own classes make of images, to compare with."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """Of a model in fp32, without gradients.

    Attributes:
        features: [B, D], the pooled vector that the classifier sees; of two towers the images' embeddings [B, E].
        logits: [B, C]; None without a classifier; of two towers those of each image with each text [B, n].
        texts: of two towers the texts' embeddings [n, E].
    """

    features: Tensor
    logits: Tensor | None
    texts: Tensor | None = None


Runner = Callable[..., Outputs]
"""From the folder or file of a checkpoint, images [B, C, H, W], prepared, and, to run both towers, tokens of texts
[n, S]. Raises ImportError where the library is not installed."""


def _of(module: str) -> Runner:
    """`run` of a module of this package, which is imported when it is called."""

    def run(path: Path, *inputs: Tensor) -> Outputs:
        found: Outputs = importlib.import_module(f"{__name__}.{module}").run(path, *inputs)
        return found

    return run


_TRANSFORMERS = ("hf_vit", "hf_siglip", "hf_siglip2", "hf_dinov2", "hf_dinov3", "hf_clip_vision")
RUNNERS: dict[str, Runner] = {
    **{name: _of(name) for name in ("timm", "open_clip", "big_vision")},
    **dict.fromkeys(_TRANSFORMERS, _of("huggingface")),
}
