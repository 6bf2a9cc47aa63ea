"""The table of a vocabulary's vectors, its rows split over the tensor axis (Shoeybi et al. 2019, Megatron-LM).

Each rank looks up the tokens whose rows it holds; the sum over ranks, of which all but one give zeros, is the result:
one all-reduce, or under sequence parallelism a reduce-scatter. Backward needs the gradient of all rows, which sequence
parallelism gathers, and the tokens, nothing else. The table's gradient is summed in fp32 whatever the format, in an
order that is always the same (torch sorts the tokens), and goes to the table's sink, so that a schedule may put it off.

Legend: B texts, S tokens of each, R = B * S rows, V vocabulary, D width, T tensor-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parallel import comm
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter
from parallel.tensor.rows import TensorParallel, sum_start
from parallel.tensor.weight_grad import computed_gradient

_ABSENT = -1  # in the place of a token whose row another rank holds; torch's own mark of rows without a gradient


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor, tp: TensorParallel) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.weight, ctx.tp = weight, tp
        if tp.size == 1:
            return F.embedding(tokens, weight)
        y = F.embedding(tokens.clamp(min=0), weight)
        y.masked_fill_((tokens == _ABSENT)[:, None], 0)
        return sum_start(y, tp, tp.splits_rows).wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (tokens,), weight, tp = ctx.saved_tensors, ctx.weight, ctx.tp
        grad, count = grads[0], len(weight)
        if tp.splits_rows:
            grad = comm.all_gather_rows(grad, tp.axis)[: len(tokens)]

        def product() -> Tensor:
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            y: Tensor = torch.ops.aten.embedding_dense_backward(wide, tokens, count, _ABSENT, False)
            return y

        return computed_gradient(weight, product), None, None


class VocabularyEmbedding(nn.Module):
    """Vectors of tokens.

    Args:
        count: V. width: D. tp: the tensor axis, over which rows are split as even as can be. init: initial vectors.

    Raises:
        ValueError: there are fewer rows than ranks.
    """

    def __init__(self, count: int, width: int, *, tp: TensorParallel, init: Init) -> None:
        super().__init__()
        if count < tp.size:
            raise ValueError(f"a vocabulary of {count} cannot be split over {tp.size} tensor-parallel ranks")
        self.tp = tp
        layout = TensorLayout(shape=(count, width), dim=0, segments=(count,), parts=tp.size, index=tp.axis.index)
        (piece,) = layout.pieces
        self.first, self.count = piece.global_start, piece.length
        self.weight = make_parameter(ParameterInfo(layout=layout, init=init))

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [B, S] in [0, V) -> [R, D], or this rank's rows of it."""
        rows = tokens.flatten().int()  # a copy, kept for backward: the texts themselves may go
        if self.tp.size > 1:
            own = rows - self.first
            rows = own.masked_fill((own < 0) | (own >= self.count), _ABSENT)
        y: Tensor = _Lookup.apply(self.weight, rows, self.tp)
        return y
