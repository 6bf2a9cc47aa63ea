"""What a layer needs to be built: made in one place and handed down."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.config import ModelConfig, Sizes
from model.kernels import Kernels
from parallel.tensor import TensorParallel, no_tensor_parallel


@dataclass(frozen=True, kw_only=True)
class Build:
    """Handed to the factory of every layer.

    Attributes:
        config: resolved. tp: how layers are split. seed: that of drop-path. kernels: which forms of the kernels run.
    """

    config: ModelConfig
    tp: TensorParallel = field(default_factory=no_tensor_parallel)
    seed: int = 0
    kernels: Kernels = field(default_factory=Kernels)

    @property
    def sizes(self) -> Sizes:
        """The model's numbers."""
        return self.config.sizes


def check_tensor_parallel(config: ModelConfig, tensor_size: int) -> None:
    """Raise ValueError where the model's matrices cannot be split over `tensor_size` ranks."""
    sizes = config.sizes
    for name, value in (("num_heads", sizes.heads), ("mlp_dim", sizes.mlp)):
        if value % tensor_size:
            fits = [t for t in range(1, value + 1) if sizes.heads % t == 0 and sizes.mlp % t == 0]
            raise ValueError(
                f"model.{name} {value} cannot be split over parallel.tensor_parallel_size {tensor_size}: "
                f"use a size among {', '.join(map(str, fits[:8]))}"
            )
    if sizes.classes < tensor_size:
        raise ValueError(
            f"model.num_classes {sizes.classes} cannot be split over parallel.tensor_parallel_size {tensor_size}: "
            f"use a size of at most {sizes.classes}"
        )
