"""What a layer needs to be built: made in one place and handed down."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch

from model.config import ModelConfig
from model.kernels import Kernels
from model.precision import Precision
from model.regions import Keep, Policy
from model.sizes import Sizes, StageSizes, Tokens
from parallel.comm import Axis, single_axis
from parallel.layout import split_range
from parallel.tensor import TensorParallel, no_tensor_parallel


@dataclass(frozen=True, kw_only=True)
class Tower:
    """One of several models whose layers are in one list.

    Attributes:
        name: the prefix of its layers' names. config: resolved. shares_tokens: whether context ranks share the tokens
            of a sample; else each of them computes all of it. frozen: whether none of it is trained, as of a teacher.
            rests: whether nothing of it is asked in evaluation: its layers are not run then, and give zeros. dtype:
            that all of it is kept and computed in; None: by the run's precision. fp8: whether the matrix products of
            its blocks are in 8 bits, if it is frozen.
    """

    name: str
    config: ModelConfig
    shares_tokens: bool = True
    frozen: bool = False
    rests: bool = False
    dtype: torch.dtype | None = None
    fp8: bool = False


class Placed(Protocol):
    """A layer of the list, by where it stands: a stage of the pyramid, and a tower, where there are several."""

    @property
    def stage(self) -> int: ...

    @property
    def tower(self) -> Tower | None: ...


@dataclass(frozen=True, kw_only=True)
class Build:
    """Handed to the factory of every layer.

    Attributes:
        config: resolved. tp: how layers are split. context: ranks that share the tokens of an image. seed: that of
            drop-path. kernels: which forms of the kernels run. precision: number formats. policy: who runs the regions
            of blocks. norm_from_output: whether norms of blocks are differentiated from what they give, which is kept
            in the place of what they are given. stage: of the pyramid, whose tokens the layer gives out.
    """

    config: ModelConfig
    tp: TensorParallel = field(default_factory=no_tensor_parallel)
    context: Axis = field(default_factory=lambda: single_axis("context"))
    seed: int = 0
    kernels: Kernels = field(default_factory=Kernels)
    precision: Precision = field(default_factory=Precision)
    policy: Policy = field(default_factory=Keep)
    norm_from_output: bool = False
    stage: int = 0

    def at(self, stage: int) -> Build:
        """The same for a layer of another stage."""
        return self if stage == self.stage else replace(self, stage=stage)

    def of(self, layer: Placed) -> Build:
        """The same for a layer: of its stage and, where there are several, of its tower."""
        if layer.tower is None:
            return self.at(layer.stage)
        context = self.context if layer.tower.shares_tokens else single_axis("context")
        return replace(self, config=layer.tower.config, context=context, stage=layer.stage)

    @cached_property
    def sizes(self) -> Sizes:
        """The model's numbers."""
        return self.config.sizes

    @property
    def here(self) -> StageSizes:
        """The numbers of this stage."""
        return self.sizes.stages[self.stage]

    @cached_property
    def tokens(self) -> Tokens:
        """Which tokens of an image this rank holds in this stage."""
        return Tokens.of(self.sizes, self.stage, self.context)

    @property
    def eps(self) -> float:
        """Of every norm."""
        assert self.config.norm_eps is not None, "not resolved"
        return self.config.norm_eps

    def part(self, length: int) -> int:
        """This tensor rank's share of `length` heads or features."""
        start, stop = split_range(length, self.tp.size, self.tp.axis.index)
        return stop - start


def check_parallel(config: ModelConfig, tensor_size: int, context_size: int = 1) -> None:
    """Raise ValueError where the model cannot be split over this many tensor- and context-parallel ranks."""
    sizes = config.sizes
    heads, mlp = min((s.heads, s.index) for s in sizes.stages), min((s.mlp, s.index) for s in sizes.stages)
    bounds = [
        (f"model.stages[{heads[1]}].num_heads" if config.stages else "model.num_heads", heads[0]),
        (f"model.stages[{mlp[1]}].mlp_dim" if config.stages else "model.mlp_dim", mlp[0]),
        *[("model.num_classes", sizes.classes)] * (sizes.classes > 0),
    ]
    for name, value in bounds:
        if value < tensor_size:
            raise ValueError(
                f"{name} {value} cannot be split over parallel.tensor_parallel_size {tensor_size}: "
                f"use a size of at most {min(value for _, value in bounds)}"
            )
    rows = sizes.last.rows
    if context_size > rows:
        raise ValueError(
            f"parallel.context_parallel_size {context_size} is more than the {rows} row{'s' * (rows > 1)} of patches "
            f"of the last stage, which it deals out: use at most {rows}, or larger images"
        )
    for stage in sizes.stages:
        whole = [kind for kind in ("full", "causal") if kind in stage.kinds]
        if context_size > 1 and whole and stage.heads // tensor_size < context_size:
            raise ValueError(
                f"parallel.context_parallel_size {context_size} cannot deal out the {stage.heads} heads, over "
                f"tensor_parallel_size {tensor_size}, of layers with {' and '.join(whole)} attention: use at most "
                f"{stage.heads // tensor_size}, or another kind of attention"
            )
