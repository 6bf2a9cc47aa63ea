"""Number formats by layer: what it computes in, and what its weights are kept in for the forward and backward pass.

Losses, the statistics of norms and softmax, and sums over ranks and micro-batches are fp32 whatever is chosen here; so
are the weights that an optimizer updates (parallel.sharding).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The formats of a model.

    Attributes:
        dtype: of activations and weights. high: names of the layers that compute in `high_dtype` instead.
        norms_in_fp32: whether the scales and biases of norms are kept in fp32, wherever they are.
        fp8: names of the layers whose matrix products are in fp8, everything else of them in `dtype`.
        apart: towers (`teacher`) that are in a format of their own, all of them. fp8_rows: names of their layers whose
            matrix products are in fp8 with a scale for each row (parallel.fp8.rows).
    """

    dtype: torch.dtype = torch.float32
    high: frozenset[str] = frozenset()
    norms_in_fp32: bool = False
    fp8: frozenset[str] = frozenset()
    apart: tuple[tuple[str, torch.dtype], ...] = ()
    fp8_rows: frozenset[str] = frozenset()

    def of_layer(self, layer: str) -> torch.dtype:
        """What a layer, e.g. `blocks.3`, computes in, and gives out."""
        return torch.float32 if layer in self.high else self._apart(layer) or self.dtype

    def _apart(self, name: str) -> torch.dtype | None:
        return next((dtype for tower, dtype in self.apart if name.startswith(f"{tower}.")), None)

    def of_weight(self, name: str) -> torch.dtype:
        """In what a weight, e.g. `blocks.3.norm1.weight`, is given to its layer."""
        if (apart := self._apart(name)) is not None:
            return apart
        *path, _ = name.split(".")
        if self.norms_in_fp32 and any("norm" in part for part in path):
            return torch.float32
        return next((torch.float32 for layer in self.high if name.startswith(f"{layer}.")), self.dtype)
