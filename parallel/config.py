"""How the ranks are arranged: the `parallel` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are arranged; the data-parallel size is what remains of the world."""

    tensor_parallel_size: int = 1
    """Ranks that each layer's matrices are split over."""

    sequence_parallel: bool = True
    """Split activations between the linears over the tensor-parallel ranks (no effect on one)."""

    pipeline_parallel_size: int = 1
    """Stages that the list of layers is cut into."""

    context_parallel_size: int = 1
    """Ranks that the tokens of one image are split over, for high resolution."""

    zero_stage: Literal[0, 1] = 0
    """What data-parallel (and context-parallel) ranks share out instead of copying: 0: nothing; 1: optimizer state
    (ZeRO, Rajbhandari et al. 2020)."""

    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of forwards and backwards in the pipeline."""

    timeout: float = 600.0
    """Seconds after which a collective that a rank never joins is an error."""

    def __post_init__(self) -> None:
        if self.timeout <= 0:
            raise ValueError(f"parallel.timeout is {self.timeout}: it must be a positive number of seconds")
