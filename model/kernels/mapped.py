"""Native attention that gives the mean of its maps over heads, too. Nothing trains through it: no torch operator."""

import torch
from torch import Tensor

from . import native
from .attention import channels_contiguous, place


def mapped_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """As Kernels.mapped_attention."""
    q, k, v = (channels_contiguous(native.plain(t)) for t in (q, k, v))
    batch, heads, tokens, dim = q.shape
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)  # as what comes next reads it
    maps = torch.empty(batch, tokens, tokens, dtype=torch.float32, device=q.device)
    if not q.is_meta:
        module, where = native.target(q)
        module.mapped_attention(
            *place(q), *place(k), *place(v), *place(out), native.address(maps), tuple(q.shape), causal,
            native.DTYPE_CODE[q.dtype], where,
        )  # fmt: skip
    return out, maps
