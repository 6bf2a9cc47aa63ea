"""How the ranks are arranged: the `parallel` group of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from parallel.pipeline.schedule_file import is_schedule_file
from parallel.pipeline.schedules import virtual_stages_of

_MAX_MIB = 2**20  # a TiB
_MIN_TIMEOUT, _MAX_TIMEOUT = 0.01, 1_000_000  # 11 days; sockets count milliseconds in 32 bits, which hold 24


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are arranged; the data-parallel size is what remains of the world."""

    tensor_parallel_size: int = 1
    """Ranks that each layer's matrices are split over."""

    sequence_parallel: bool = True
    """Split activations between the linears over the tensor-parallel ranks (no effect on one)."""

    pipeline_parallel_size: int = 1
    """Ranks that the list of layers is cut up for, into stages."""

    context_parallel_size: int = 1
    """Ranks that the tokens of one image are split over, for high resolution."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    """What data-parallel (and context-parallel) ranks share out instead of copying: 0: nothing; 1: optimizer state;
    2: gradients too; 3: weights too (ZeRO, Rajbhandari et al. 2020)."""

    reduce_gradients: Literal["auto", "step", "micro_batch"] = "auto"
    """When gradients are summed over ranks: once per step, each rank keeping all of them until then, or after each
    micro-batch; auto: once per step at zero_stage 0 and 1, where they are kept anyway, else after each micro-batch."""

    gradient_dtype: Literal["fp32", "weights"] = "fp32"
    """Type in which a rank keeps its gradients and sends them to others: fp32, or that of the weights (half the memory
    and traffic under bf16 and fp16). Sums over ranks are kept in fp32."""

    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """zero_stage 3: whether gathered weights are given up until backward or the next micro-batch needs them again;
    auto: those that do not fit gather_memory."""

    gather_memory: float | None = None
    """zero_stage 3, reshard_after_forward auto: MiB that gathered weights may take on a rank; null: a tenth of a
    GPU's memory, none on a CPU, where gathering again is but a copy."""

    bucket_mib: float = 4.0
    """Small layers are gathered and reduced together until their weights take so many MiB of fp32."""

    layers_per_stage: tuple[int, ...] | None = None
    """How many layers each stage of the pipeline has, first to last, embedding, patch merges and head counted, such as
    [4, 5, 5]; null: as even as they can be, or, with recompute.policy auto, as its memory_budget allows (no effect on
    one pipeline rank)."""

    schedule: str = "1f1b"
    """Order of forwards and backwards in the pipeline: 1f1b, gpipe, interleaved, zb_h1, zb_h2, zb_v, v_half, or a CSV
    file with a row of actions per rank; see docs/pipelines.md (no effect on one pipeline rank)."""

    virtual_stages: int | None = None
    """Stages per pipeline rank, for schedule interleaved; null: the schedule's own number (no effect on one
    pipeline rank)."""

    schedule_policy: Literal["static", "ready"] = "static"
    """How ranks follow the schedule: action by action, or whatever is ready first, earlier actions before later ones,
    with no more activations alive at once than the schedule itself keeps (no effect on one pipeline rank)."""

    shared_memory: bool = True
    """CPU ranks of one host pass collectives through shared memory instead of TCP."""

    elastic: bool = False
    """Under a launcher that goes on with fewer hosts or more (torchrun --nnodes MIN:MAX): keep the global batch, make
    micro-batches smaller where they must be, and let ranks wait that it cannot be dealt to."""

    timeout: float = 600.0
    """Seconds after which a collective that a rank never joins is an error."""

    def __post_init__(self) -> None:
        stage = self.zero_stage
        if not is_schedule_file(self.schedule):
            virtual_stages_of(self.schedule, self.virtual_stages)
        if self.reduce_gradients == "step" and stage >= 2:
            raise ValueError(
                f"parallel.reduce_gradients is step, but zero_stage {stage} keeps no whole gradient until the end of a "
                "step: use micro_batch or auto, or zero_stage 1"
            )
        if self.reduce_gradients == "micro_batch" and stage == 1:
            raise ValueError(
                "parallel.reduce_gradients is micro_batch at zero_stage 1, which would keep no whole gradient, as "
                "zero_stage 2 does: use zero_stage 2, or reduce_gradients step or auto"
            )
        for name in ("reshard_after_forward", "gather_memory"):
            if getattr(self, name) not in ("auto", None) and stage != 3:
                raise ValueError(
                    f"parallel.{name} is {getattr(self, name)}, but at zero_stage {stage} weights are not gathered: "
                    "use zero_stage 3, or leave it out"
                )
        if self.gather_memory is not None and self.reshard_after_forward != "auto":
            raise ValueError(
                f"parallel.gather_memory {self.gather_memory} has no effect with reshard_after_forward "
                f"{self.reshard_after_forward}: use auto, or leave it out"
            )
        if self.gather_memory is not None and self.gather_memory < 0:
            raise ValueError(f"parallel.gather_memory is {self.gather_memory}: it must be 0 MiB or more")
        if self.layers_per_stage is not None and min(self.layers_per_stage, default=0) < 1:
            raise ValueError(
                f"parallel.layers_per_stage is {list(self.layers_per_stage)}: each stage needs 1 layer at least"
            )
        if not 0 < self.bucket_mib <= _MAX_MIB:
            raise ValueError(f"parallel.bucket_mib is {self.bucket_mib}: it must be positive, and at most {_MAX_MIB}")
        if not _MIN_TIMEOUT <= self.timeout <= _MAX_TIMEOUT:
            raise ValueError(
                f"parallel.timeout is {self.timeout}: it must be a positive number of seconds, from {_MIN_TIMEOUT} to "
                f"{_MAX_TIMEOUT}"
            )
