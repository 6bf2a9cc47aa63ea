"""A model that is spread over ranks, as methods see it that ask for its outputs and their gradients.

All ranks ask alike, and have the same answers; of patches the first alone has them.

Legend: N images, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.seeing.explain import outputs_of, owed, pixel_gradients
from engine.seeing.patches import features_of, lens_of
from model import ModelConfig
from model.seeing.rollout import Method
from model.sizes import Sizes


@dataclass(frozen=True)
class Ranks:
    """The model on all ranks, of which this one holds a part. Collective, whatever it is asked.

    Attributes:
        config: resolved, of this model of images. embeds: whether its outputs are features of an embedding.
    """

    assembly: Assembly
    config: ModelConfig
    embeds: bool

    @property
    def sizes(self) -> Sizes:
        """Of the model."""
        return self.config.sizes

    def logits(self, images: Tensor) -> Tensor:
        """[N, channels, H, W] -> fp32 [N, C], differentiable, once, by the images."""
        found: Tensor = _Logits.apply(images, self.assembly)
        return found

    def owed(self, images: Tensor, method: Method, score: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """As engine.seeing.explain.owed, of a score of outputs alone."""
        return owed(self.assembly, images, method, None if score is None else lambda outputs, _: score(outputs))

    def patches(self, images: Tensor) -> Tensor | None:
        """As engine.seeing.patches.features_of."""
        return features_of(self.assembly, images)

    def lens(self, images: Tensor) -> Tensor | None:
        """As engine.seeing.patches.lens_of."""
        return lens_of(self.assembly, images)


class _Logits(torch.autograd.Function):
    """Outputs of all ranks; the gradient is that of a second pass through the pipeline, forward and backward."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, assembly: Assembly) -> Tensor:
        ctx.assembly = assembly
        ctx.save_for_backward(images)
        return outputs_of(assembly, images)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (images,), grad = ctx.saved_tensors, grads[0]
        return pixel_gradients(ctx.assembly, images.detach(), lambda y, numbers: (y * grad[numbers]).sum(1)), None
