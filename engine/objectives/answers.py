"""What a teacher says of the classes of a micro-batch's images, computed beside the student or read from the disk.

Legend: B images, C classes, T tensor ranks, k classes kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.config.distillation import DistillationConfig
from engine.teacher_outputs.meta import Meta
from parallel.comm import Axis
from parallel.distillation import Likeliest, sparse_divergence, standard_logits
from parallel.layout import split_range
from parallel.tensor import sigmoid_divergence, softened_divergence, softmax_cross_entropy, top_class

Answer = Tensor | Likeliest
"""Logits of this rank's classes, [B, C/T]; or the likeliest classes, at the temperature of the loss."""


def stored_answer(rows: Mapping[str, Tensor], meta: Meta, axis: Axis) -> Answer:
    """Out of rows of stored outputs.

    Args:
        axis: the tensor axis.
    """
    logits = rows["logits"]
    if meta.keeps_all:
        return logits[:, slice(*split_range(meta.classes, axis.size, axis.index))]
    assert meta.temperature is not None
    softened, rest = logits / meta.temperature, rows["rest"]
    total = torch.logaddexp(softened.logsumexp(1), rest)
    return Likeliest(softened - total[:, None], rows["ids"], rest - total)


def response(own: Tensor, answer: Answer, keys: DistillationConfig, classes: int, axis: Axis) -> Tensor:
    """What an answer asks of the student's logits, [B, C/T] -> [B]."""
    if keys.response == "hard":
        return softmax_cross_entropy(own, top(answer, classes, axis), classes, axis)
    if isinstance(answer, Likeliest):
        assert keys.response == "kl"
        return sparse_divergence(own, answer, classes, axis, keys.temperature)
    if "logits" in keys.standardise:
        own, answer = (standard_logits(x, classes, axis) for x in (own, answer))
    divergence = softened_divergence if keys.response == "kl" else sigmoid_divergence
    return divergence(own, answer, axis, keys.temperature)


def top(answer: Answer, classes: int, axis: Axis) -> Tensor:
    """The likeliest class of each image, int64 [B]."""
    return answer.ids[:, 0] if isinstance(answer, Likeliest) else top_class(answer, classes, axis)
