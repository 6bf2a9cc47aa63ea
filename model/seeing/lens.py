"""The logit lens (nostalgebraist 2020), for patches: what the head would say of one patch's row alone.

Legend: n patches of whatever images, D width, C classes, T tensor-parallel size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import ModelConfig
from model.heads import Head


def check_lens(config: ModelConfig) -> None:
    """Raise ValueError where a resolved model pools a class token, whose head knows no patches, or has no classes."""
    if config.pool not in ("gap", "map") or not config.sizes.classes:
        raise ValueError(
            f"the logit lens needs a head over patches with classes, pool gap or map: this model has pool {config.pool}"
            f" and {config.sizes.classes} classes"
        )


@torch.no_grad()
def patch_logits(head: Head, rows: Tensor) -> Tensor:
    """As if the image were that patch: a mean of one, or a probe that sees one token, which it takes whole.

    Collective over tensor ranks, which all have the same rows.

    Args:
        head: of a model that `check_lens` lets pass. rows: [n, D], of the last stage's patches, after any of its
            blocks.

    Returns:
        [n, C/T] of this rank's classes.
    """
    assert head.fc is not None
    x = rows if head.norm_last else head.norm(rows)
    if head.pool is not None:
        pool = head.pool
        value = pool.kv(x, x if pool.kv.split_input else None)[:, pool.heads * pool.head_dim :]  # whole rows are here
        y = pool.proj(value)
        x = y + pool.mlp(pool.norm(y), y.shape[0])
    if head.norm_last:
        x = head.norm(x)
    logits: Tensor = head.fc(x)
    return logits
