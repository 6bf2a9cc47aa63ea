"""The logit lens (nostalgebraist 2020), for patches: what the head would say of one patch's row alone.

Legend: B images, S tokens, N patches, D width, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.heads import Head
from model.vit import VisionTransformer


@torch.no_grad()
def patch_logits(model: VisionTransformer, rows: Tensor) -> Tensor:
    """As if the image were that patch: a mean of one, or a probe that sees one token, which it takes whole.

    Args:
        rows: [B, N, D], of the last stage's patches, after any of its blocks.

    Returns:
        [B, N, C].

    Raises:
        ValueError: the model pools a class token, whose head knows no patches, or has no classes.
    """
    head = model.get_submodule("head")
    assert isinstance(head, Head)
    if head.kind not in ("gap", "map") or head.fc is None:
        raise ValueError(
            f"the logit lens needs a head over patches with classes, pool gap or map: this model has pool {head.kind}"
            f" and {model.sizes.classes} classes"
        )
    x = rows.flatten(0, 1)
    if not head.norm_last:
        x = head.norm(x)
    if head.pool is not None:
        pool = head.pool
        value = pool.kv(x, pool.kv.gather(x, len(x)))[:, pool.heads * pool.head_dim :]
        y = pool.proj(value)
        x = y + pool.mlp(pool.norm(y), len(y))
    if head.norm_last:
        x = head.norm(x)
    logits: Tensor = head.fc(x)
    return logits.unflatten(0, rows.shape[:2])
