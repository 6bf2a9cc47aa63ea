"""A teacher's classes as the likeliest few of them and the mass of all the rest: what is stored of its logits.

The divergence is that of k + 1 outcomes, so it is well defined whatever the few are, and with all classes but one it is
the whole one. Legend: B images, C classes, T tensor ranks, k classes kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import comm
from parallel.comm import Axis
from parallel.layout import split_range
from parallel.tensor.loss import own_classes


class Likeliest(NamedTuple):
    """Natural logarithms of probabilities. Attributes: values: [B, k], falling. ids: int64 [B, k], of all C classes.
    rest: [B], of all other classes together; -inf where there is none.
    """

    values: Tensor
    ids: Tensor
    rest: Tensor


@torch.no_grad()
def likeliest(logits: Tensor, count: int, classes: int, axis: Axis, temperature: float = 1.0) -> Likeliest:
    """The k likeliest classes of softmax(logits / temperature), on every rank. 2 k numbers of an image travel.

    Args:
        logits: [B, C/T], this rank's classes. count: k, at most C. classes: C. axis: the tensor axis.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    first, stop = split_range(classes, axis.size, axis.index)
    most = min(count, split_range(classes, axis.size, 0)[1])  # ranks send equally much
    values, ids = logits.topk(min(most, stop - first), 1)
    missing = most - values.shape[1]
    values, ids = (F.pad(x, (0, missing), value=fill) for x, fill in ((values, -torch.inf), (ids, -1)))
    all_values, all_ids = (
        comm.all_gather_rows(x[None], axis).transpose(0, 1).flatten(1)
        for x in (values, torch.where(ids < 0, -1, ids + first))
    )
    top, places = all_values.topk(count, 1)
    chosen = all_ids.gather(1, places)
    total, rest = _log_masses(logits, *own_classes(chosen, classes, axis), axis)
    return Likeliest(top - total[:, None], chosen, rest - total)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, values: Tensor, ids: Tensor, rest: Tensor, classes: int, axis: Axis,
        temperature: float,
    ) -> Tensor:  # fmt: skip
        ctx.dtype = logits.dtype
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, values, rest = logits.to(wide) / temperature, values.to(wide), rest.to(wide)
        places, mine = own_classes(ids, classes, axis)
        total, left = _log_masses(logits, places, mine, axis)
        own = (logits.gather(1, places) - total[:, None]) * mine
        likely = values.exp()
        kept = comm.all_reduce((likely * mine * (values - own)).sum(1), axis)
        mass = rest.exp()
        other = torch.where(mass > 0, mass * (rest - (left - total)), 0)
        # p - q of what is kept; the rest's classes share q of it as p is shared among them
        odds = torch.where(mass > 0, (rest - (left - total)).exp(), 0)
        p = (logits - total[:, None]).exp()
        slope = p * (1 - odds[:, None])
        slope.scatter_add_(1, places, (p.gather(1, places) * odds[:, None] - likely) * mine)
        ctx.save_for_backward(slope * temperature)
        return (kept + other) * temperature**2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return (slope * grads[0][:, None]).to(ctx.dtype), None, None, None, None, None, None


def sparse_divergence(logits: Tensor, of: Likeliest, classes: int, axis: Axis, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's softened classes from a teacher's likeliest and their rest, in nats, times the
    square of the temperature (Hinton et al. 2015). Three numbers of an image travel.

    Args:
        logits: [B, C/T], this rank's classes. of: at the same temperature. classes: C. axis: the tensor axis.

    Returns:
        [B], the same on every rank, of fp32 at least.
    """
    loss: Tensor = _Divergence.apply(logits, *(x.detach() for x in of), classes, axis, temperature)
    return loss


def _log_masses(logits: Tensor, places: Tensor, mine: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """Log-sum-exp over all classes, and over those that are not kept, [B] each: -inf of none.

    Args:
        places, mine: [B, k], of the kept ones, as of `own_classes`.
    """
    places = torch.where(mine, places, logits.shape[1])  # a last column takes what is of other ranks
    others = F.pad(logits, (0, 1), value=-torch.inf).scatter(1, places, -torch.inf)
    both = torch.stack([logits.amax(1), others.amax(1)])
    largest = comm.all_reduce(both.clone(), axis, "max")
    shift = largest.clamp(min=torch.finfo(logits.dtype).min)
    sums = torch.stack([(x - s[:, None]).exp().sum(1) for x, s in zip((logits, others), shift, strict=True)])
    total, left = comm.all_reduce(sums, axis).log() + shift
    return total, torch.where(largest[1] == -torch.inf, -torch.inf, left)
