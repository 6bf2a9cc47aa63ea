"""What all optimizers share: groups, the rates of a step, state that exists from the start.

Every rank updates the elements that it trains, all of a tensor or any flat piece of it, and every way of dealing them
out must give an element the same bits. So element-wise arithmetic is written in operations that round once (multiply,
add, divide, root), which give the same whatever vector or remainder of one an element is computed in. What is summed
over a tensor is summed over `Fragment.own`, which is the same at every ZeRO stage, from a copy, whose alignment is too.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from model.kernels import Kernels
from parallel.sharding.fragments import Fragment, Fragments, Group, Span
from parallel.sharding.pieces import StatePiece, pieces_of, whole_piece


@dataclass(frozen=True)
class GroupOptions:
    """How one group differs.

    Attributes:
        lr_scale: factor on the learning rate. weight_decay: as in torch, before it is multiplied by any rate.
    """

    lr_scale: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Numbers that hold for all groups and steps; each optimizer takes those it needs.

    Attributes:
        betas: decay of Adam's moments. eps: added to the root of the second one.
        momentum: decay of the first moment of Adafactor and Muon.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9


class Rates(NamedTuple):
    """A group's rates in one step, as torch means them: the weight is multiplied by 1 - lr * weight_decay."""

    lr: float
    weight_decay: float

    @property
    def keep(self) -> float:
        """What decay leaves of the weight."""
        return 1 - self.lr * self.weight_decay


class Optimizer(ABC):
    """Updates all that this rank trains, in place.

    Args:
        fragments: what to train. options: for each group that there is. constants: the rest of the numbers.
        kernels: the choice between native and plain forms.

    Attributes:
        arrays: the spans or the fragments that the state's tensors belong to, one by one.
        state: by name, a tensor for each of `arrays`; allocated at construction, on the weights' device, `meta` too.
        steps: updates done so far. whole: names of states of which every rank has all, whatever it trains.
    """

    whole: ClassVar[frozenset[str]] = frozenset()

    arrays: Sequence[Span | Fragment]
    state: dict[str, list[Tensor]]

    def __init__(
        self, fragments: Fragments, options: Mapping[Group, GroupOptions], constants: Constants, kernels: Kernels
    ) -> None:
        self.fragments, self.options, self.constants, self.kernels = fragments, options, constants, kernels
        self.device = next((f.weight.device for f in fragments.fragments), torch.device("cpu"))  # if all is frozen
        self.steps = 0

    @torch.no_grad()
    def update(self, *, lr: float, grad_factor: float, decay_factor: float | None = None) -> None:
        """One step. Collective over `fragments.axis`. Where lr is 0, nothing moves but the moments.

        Args:
            lr: learning rate, multiplied by each group's lr_scale.
            grad_factor: what gradients are multiplied by: clipping, 1 / loss scale. Gradients may be overwritten.
            decay_factor: what decay is multiplied by (and by lr_scale) in place of lr: the schedule's factor, so that
                it does not depend on the peak rate (Loshchilov and Hutter 2019; big_vision). None: lr, as torch.
        """
        self.steps += 1
        relative = 1.0 if decay_factor is None or not lr else decay_factor / lr
        rates = {
            group: Rates(lr * options.lr_scale, options.weight_decay * relative)
            for group, options in self.options.items()
        }
        with torch.profiler.record_function(f"vitruvius::{type(self).__name__.lower()}"):
            self._step(rates, grad_factor)

    def state_tensors(self) -> dict[str, list[Tensor]]:
        """By name, the state's tensors, one for each of `arrays`: flat and as long as its weight, empty where it has
        none of this kind, or a factored moment (see `Adafactor`).
        """
        return self.state

    def pieces(self) -> Iterator[StatePiece]:
        """The state's tensors as pieces of logical tensors."""
        axis, trained = self.fragments.axis, self.fragments.trained
        for name, tensors in self.state_tensors().items():
            for array, values in zip(self.arrays, tensors, strict=True):
                if name in self.whole:
                    if values.numel():
                        yield whole_piece(f"optimizer.{name}/{array.parts[0].name}", values, axis)
                elif values.numel() == array.weight.numel():  # else it has none of this kind
                    yield from pieces_of(f"optimizer.{name}", values, array.parts, trained, axis)

    @abstractmethod
    def _step(self, rates: Mapping[Group, Rates], grad_factor: float) -> None: ...


def write_model_weight(array: Span | Fragment, elements: slice = slice(None)) -> None:
    """Give the model the rounded weight of `elements`."""
    if array.model_weight is not None:
        array.model_weight[elements].copy_(array.weight[elements])
