"""The rungs of the numerics ladder: every layout of 1, 2, 4 and 8 ranks, and the small models that climb it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from data import DataConfig
from engine.config import Config, OptimizerConfig, ScheduleConfig, TrainConfig
from model import ModelConfig
from parallel.config import ParallelConfig

STEPS = 10
GLOBAL_BATCH = 16

# 16 patches of 2 x 2 with a register or a class token: 17 tokens, which no tensor-parallel size divides. 8 heads for 8
# tensor-parallel ranks; 10 classes, which 4 and 8 ranks share unevenly; 5 layers, which no number of stages divides.
_SMALL = ModelConfig(
    image_size=8, patch_size=2, in_channels=1, num_classes=10, width=32, depth=3, num_heads=8, mlp_dim=64, drop_path=0.1
)
_DEEP = 6  # blocks for 8 stages: with embedding and head one layer each
MODELS = {
    "parallel": replace(_SMALL, block="parallel", qk_norm=True, bias=False, gelu="tanh", pool="map", registers=1),
    "sequential": replace(_SMALL, block="sequential", bias=True, position="learned_1d", pool="cls"),
    "mixed": replace(_SMALL, block="parallel", bias=True, position="sincos_2d", pool="gap", registers=1),
}
LOSSES = {"parallel": "softmax", "sequential": "softmax", "mixed": "sigmoid"}
KERNELS = {"parallel": "auto", "sequential": "reference", "mixed": "auto"}


@dataclass(frozen=True)
class Case:
    """One layout of one model."""

    model: str
    tensor: int = 1
    sequence_parallel: bool = False
    pipeline: int = 1
    data: int = 1
    schedule: str = "1f1b"
    micro_batches: int = 1
    depth: int = 3

    def __str__(self) -> str:
        sp = "sp" if self.sequence_parallel else ""
        return f"{self.model}-t{self.tensor}{sp}-p{self.pipeline}{self.schedule}-d{self.data}-m{self.micro_batches}"

    @property
    def ranks(self) -> int:
        """World size."""
        return self.tensor * self.pipeline * self.data

    @property
    def one_process(self) -> Case:
        """What its numbers are held against."""
        return Case(self.model, depth=self.depth)

    def config(self, **train: Any) -> Config:
        """The resolved configuration of the case; keyword arguments override the `train` group."""
        config = Config(
            model=replace(MODELS[self.model], depth=self.depth),
            data=DataConfig(rotate=10.0, shift=0.1),
            parallel=ParallelConfig(
                tensor_parallel_size=self.tensor,
                sequence_parallel=self.sequence_parallel,
                pipeline_parallel_size=self.pipeline,
                schedule=self.schedule,  # type: ignore[arg-type]
            ),
            train=TrainConfig(
                global_batch_size=GLOBAL_BATCH,
                micro_batch_size=GLOBAL_BATCH // self.data // self.micro_batches,
                steps=STEPS,
                loss=LOSSES[self.model],  # type: ignore[arg-type]
                **train,
            ),
            # eps: where a gradient is zero but for rounding (the key bias under a softmax), Adam with a tiny eps would
            # blow the rounding up into a full step in a random direction; see docs/numerics.md.
            optimizer=OptimizerConfig(lr=1e-3, eps=1e-5, weight_decay=0.1, head_weight_decay=0.3, clip_grad=1.0),
            schedule=ScheduleConfig(name="cosine", warmup_steps=3),
            kernels=KERNELS[self.model],  # type: ignore[arg-type]
        )
        return config.resolve(self.ranks)


def cases(ranks: int) -> list[Case]:
    """Every layout of this many ranks, for every model (the mixed one on at most two ranks)."""
    return list(_cases(ranks))


def _cases(ranks: int) -> Iterator[Case]:
    powers = [1, 2, 4, 8]
    for tensor, pipeline, data in product(powers, powers, powers):
        if tensor * pipeline * data != ranks:
            continue
        several = min(4, GLOBAL_BATCH // data)
        options = product(
            MODELS if ranks <= 2 else ("parallel", "sequential"),
            (True, False) if tensor > 1 else (False,),
            ("1f1b", "gpipe") if pipeline > 1 else ("1f1b",),
            (1, several),
        )
        for model, sequence_parallel, schedule, micro_batches in options:
            depth = _DEEP if pipeline == 8 else 3
            yield Case(model, tensor, sequence_parallel, pipeline, data, schedule, micro_batches, depth)
