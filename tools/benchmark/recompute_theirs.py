"""What torch itself offers for activations: torch.utils.checkpoint of whole blocks, and its selective form.

Each is given at its best: without the state of random generators, which nothing here draws from, and without checks of
what is computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tools.benchmark.eager_vit import EagerViT

Run = Callable[[nn.Module, Tensor], Tensor]
_aten = torch.ops.aten
PRODUCTS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default})
ATTENTION = frozenset({
    _aten._scaled_dot_product_flash_attention_for_cpu.default, _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
})  # fmt: skip


class Policy:
    """Of one pass through a block: attention stays, and of its products every `every`-th (0: none), the first first.

    With 2 it is what torchtitan does.
    """

    def __init__(self, every: int) -> None:
        self._every, self._seen = every, {True: 0, False: 0}

    def __call__(self, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        """As create_selective_checkpoint_contexts wants it."""
        stays = op in ATTENTION
        if op in PRODUCTS and self._every:
            stays = self._seen[context.is_recompute] % self._every == 0
            self._seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if stays else CheckpointPolicy.PREFER_RECOMPUTE


def _kept(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


def _whole(block: nn.Module, x: Tensor, **how: Any) -> Tensor:
    y: Tensor = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, determinism_check="none", **how)
    return y


def _selective(every: int) -> Run:
    def contexts() -> Any:
        return create_selective_checkpoint_contexts(Policy(every))

    return partial(_whole, context_fn=contexts)


def _every(n: int) -> Callable[[int], Run]:
    return lambda number: _whole if number % n == 0 else _kept


WAYS: dict[str, Callable[[int], Run]] = {
    "none": lambda _: _kept,
    "every_4th": _every(4),
    "every_3rd": _every(3),
    "every_2nd": _every(2),
    "full": _every(1),
    "selective": lambda _: _selective(1),
    "selective_every_2nd": lambda _: _selective(2),
    "selective_attention": lambda _: _selective(0),
}
"""By name, how the block of a number is run: whole, or again in backward (each n-th block of `every_...`); `selective`
keeps products and attention, or attention with every second product, or attention alone.
"""


class Checkpointed(nn.Module):
    """EagerViT, its blocks run in one of WAYS.

    Attributes:
        way: its name.
    """

    def __init__(self, model: EagerViT, way: str = "none") -> None:
        super().__init__()
        self.model, self.way = model, way

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        x, blocks = self.model.embed(images), list[Any](self.model.blocks)
        for block, run in zip(blocks, self._runs(len(blocks)), strict=True):
            x = run(block, x)
        return self.model.classify(x)

    def _runs(self, depth: int) -> Sequence[Run]:
        return [WAYS[self.way](number) for number in range(depth)]
