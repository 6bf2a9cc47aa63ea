"""Of two towers: what of an image its likeness to a text owes to.

Legend: B images, E features of the embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from model.image_text import ImageText
from model.inputs import MicroBatch
from model.seeing.trace import Score
from model.towers import TEXT


def likeness(model: ImageText, tokens: Tensor) -> list[Score]:
    """The cosine of the embeddings of images, as the image tower gives them [B, E], and of each text, in turn.

    Args:
        tokens: of texts, int64 [n, S].
    """
    with torch.no_grad():
        return cosines(model.tower(TEXT, MicroBatch.of(None, tokens)))


def cosines(texts: Tensor) -> list[Score]:
    """The same of embeddings of texts [n, E], of whatever length."""
    texts = F.normalize(texts, dim=1)
    return [lambda outputs, text=text: F.normalize(outputs, dim=1) @ text for text in texts]  # type: ignore[misc]
