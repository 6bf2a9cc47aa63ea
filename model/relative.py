"""Relative positions in windows (Liu et al. 2021, Swin): a learned number per head and offset of a patch from another.

Legend: H heads, h of them on this tensor rank, a x b slots of a window, L = a * b.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter

_STD = 0.02


def relative_table(build: Build) -> nn.Parameter:
    """[h, (2a - 1) * (2b - 1)]; a query that is dr rows and dc columns beyond the key takes (dr + a - 1, dc + b - 1),
    row-major, as in timm."""
    here, tp, (high, wide) = build.here, build.tp, build.here.window_sides
    layout = TensorLayout(
        shape=(here.heads, (2 * high - 1) * (2 * wide - 1)), dim=0, segments=(here.heads,), units=(1,), parts=tp.size,
        index=tp.axis.index,
    )  # fmt: skip
    return make_parameter(ParameterInfo(layout=layout, init=Init(kind="truncated_normal", scales=(_STD,))))


def relative_bias(table: Tensor, sides: tuple[int, int]) -> Tensor:
    """What is added to the logits of a window, in fp32 at least: [h, (2a - 1) * (2b - 1)] -> [h, L, L].

    By views and sums alone, so that the gradient has no order of its own on a GPU, and is summed in fp32.
    """
    high, wide = sides
    wider = table if table.dtype.itemsize > 4 else table.float()
    grid = wider.view(-1, 2 * high - 1, 2 * wide - 1)
    by_col = _by_pairs(grid).permute(0, 2, 3, 1)  # [h, b, b, 2a - 1]
    return _by_pairs(by_col).permute(0, 3, 1, 4, 2).reshape(-1, high * wide, high * wide)


def _by_pairs(x: Tensor) -> Tensor:
    """[..., 2n - 1] -> [..., n, n]: of i and j, entry i - j + n - 1.

    Backwards, that is entry j - i + n - 1. Rows of 2n, each the same, read as rows of 2n - 1 from entry n - 1 on move
    by one place from row to row.
    """
    n = (x.shape[-1] + 1) // 2
    rows = F.pad(x.flip(-1), (0, 1))[..., None, :].expand(*x.shape[:-1], n, 2 * n)
    return rows.flatten(-2)[..., n - 1 : -1].unflatten(-1, (n, 2 * n - 1))[..., :n]
