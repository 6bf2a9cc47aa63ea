"""Where a NaN or an infinity came from: a bad step's micro-batches once more, with every layer under watch.

A layer is named when what it was given is finite and what it gives is not: in forward its activation, in backward the
gradient of its input, which the layer before meets as the gradient of its output. A parameter is named when its
gradient alone is not finite. The caller runs the step's executor inside `watch`, with the weights of the bad step, that
is after it was skipped, and throws the gradients away. Random numbers are functions here (parallel.random), so the run
meets what the step met.

    with watch(stages, layers) as watching:
        executor.run(watching.batches(micro_batches), watching.loss(loss))
    culprit = first_culprit(watching.found, grid.world)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model import LayerSpec, MicroBatch, Stage
from parallel import comm
from parallel.comm import Axis
from parallel.tensor import GradientSink, attach_sink

IMAGES, LOSS, WHOLE_LOSS = "input images", "loss", "loss of the whole batch"
Phase = Literal["activation", "gradient"]
LossFunction = Callable[[tuple[Tensor, ...], MicroBatch], Tensor]


@dataclass(frozen=True, order=True)
class Culprit:
    """Something that is not finite. Ordered: what comes first in a step is the least.

    Attributes:
        micro_batch: counted from 0 on each data rank.
        phase: activations come before gradients (and in the alphabet).
        order: place in the phase: from the images to the loss, or in backward from the loss to the images.
        layer: its name in the model, or that of one of its parameters, or `input images` or `loss`, or `loss of the
            whole batch`, which has the number that a micro-batch after the last would have.
        data_rank: whose micro-batch it is.
    """

    micro_batch: int
    phase: Phase
    order: int
    layer: str
    data_rank: int = 0

    def describe(self) -> str:
        """E.g. `blocks.17: activation not finite (micro-batch 3 of data rank 1)`."""
        if self.layer == WHOLE_LOSS:
            return f"{self.layer} not finite (share of data rank {self.data_rank})"
        itself = self.phase == "activation" and self.layer in (IMAGES, LOSS)
        what = self.layer if itself else f"{self.layer}: {self.phase}"
        return f"{what} not finite (micro-batch {self.micro_batch} of data rank {self.data_rank})"


class Watch:
    """What one rank finds. Made by `watch`.

    Attributes:
        found: all that is not finite, and so everything that the first of them spoilt.
    """

    def __init__(self, layers: Sequence[LayerSpec], data_rank: int) -> None:
        self.found: list[Culprit] = []
        self._places = [IMAGES, *(spec.name for spec in layers), LOSS]
        # by identity, not by counting calls: schedules may change the order, and recomputation calls a layer twice
        self._numbers: dict[int, int] = {}
        self._data_rank = data_rank
        self._in_backward: dict[int, MicroBatch] = {}  # what each layer is at

    def batches(self, micro_batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
        """The same, numbered, and their images looked at where this rank has them, as each is fetched."""
        return _Met(micro_batches, self._meet)

    def _meet(self, m: int, batch: MicroBatch) -> None:
        self._numbers[id(batch)] = m  # over what it was of a batch that is gone by now, if of any
        if batch.images is not None:
            self._look(batch.images, batch, "activation", 0)

    def loss(self, function: LossFunction) -> LossFunction:
        """The loss function, its result looked at."""

        def watched(outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
            result = function(outputs, batch)
            self._look(result, batch, "activation", len(self._places) - 1)
            return result

        return watched

    def whole_loss(self, loss: Tensor, batches: int) -> None:
        """Look at this data rank's share of the loss of all micro-batches, of which there are so many."""
        if not bool(loss.isfinite().all()):
            order = len(self._places) - 1
            self.found.append(Culprit(batches, "activation", order, WHOLE_LOSS, self._data_rank))

    def layer(self, module: nn.Module, name: str, until: ExitStack) -> None:
        """Look at the layer, and at its parameters, until the stack is closed."""
        place = self._places.index(name)

        def arrived(grad: Tensor, batch: MicroBatch) -> None:
            self._in_backward[place] = batch
            self._look(grad, batch, "gradient", place + 1)  # the work of the layer behind

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            batch = args[1]
            for x in (output,) if isinstance(output, Tensor) else output:
                self._look(x, batch, "activation", place)
                if x.requires_grad:
                    x.register_hook(lambda grad: arrived(grad, batch))

        until.callback(module.register_forward_hook(after).remove)
        for leaf, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            self._parameter(parameter, f"{name}.{leaf}", place, until)

    def _parameter(self, parameter: nn.Parameter, name: str, place: int, until: ExitStack) -> None:
        """Look at each micro-batch's gradient of a parameter, from autograd or on its way into a sink."""

        def look(grad: Tensor | None) -> None:
            if grad is not None:  # else a sink took it
                self._look(grad, self._in_backward[place], "gradient", place, name)

        until.callback(parameter.register_hook(look).remove)
        sink: GradientSink | None = getattr(parameter, "vitruvius_sink", None)
        if sink is not None:
            attach_sink(parameter, _WatchedSink(sink, look))
            until.callback(attach_sink, parameter, sink)

    def _look(self, x: Tensor, batch: MicroBatch, phase: Phase, place: int, name: str | None = None) -> None:
        if not bool(x.detach().isfinite().all()):
            order = place if phase == "activation" else len(self._places) - 1 - place
            layer = name or self._places[place]
            self.found.append(Culprit(self._numbers[id(batch)], phase, order, layer, self._data_rank))


class _Met(Sequence[MicroBatch]):
    """Micro-batches that may be made only when they are fetched, each shown to `meet` then."""

    def __init__(self, inner: Sequence[MicroBatch], meet: Callable[[int, MicroBatch], None]) -> None:
        self._inner, self._meet = inner, meet

    def __len__(self) -> int:
        return len(self._inner)

    def __getitem__(self, m: Any) -> Any:
        batch = self._inner[m]
        self._meet(m, batch)
        return batch


class _WatchedSink:
    """A gradient sink, every product that goes into it looked at as the fp32 matrix that it is there."""

    def __init__(self, sink: GradientSink, look: Callable[[Tensor], None]) -> None:
        self.sink, self.look = sink, look

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        self.look(grad_output.to(wide).t() @ x.to(wide))
        self.sink.add_product(parameter, grad_output, x)

    def add_computed(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        self.look(product())
        self.sink.add_computed(parameter, product)


@contextmanager
def watch(stages: Iterable[Stage], layers: Sequence[LayerSpec], data_rank: int = 0) -> Iterator[Watch]:
    """Look at all that a run of the executor over `Watch.batches` computes on this rank.

    Args:
        stages: this rank's. layers: of the whole model, in order. data_rank: this rank's index along the data axis.
    """
    watching = Watch(layers, data_rank)
    with ExitStack() as until:
        for name, module in (layer for stage in stages for layer in stage.layers):
            watching.layer(module, name, until)
        yield watching


def first_culprit(found: Sequence[Culprit], axis: Axis, *, joint: bool = False) -> Culprit | None:
    """The first of all that the ranks of `axis` (the world) have found, the same on each. Collective.

    None if all is finite before it is summed over ranks: then the sum overflowed, or the norm.

    Args:
        joint: whether the loss is one of all micro-batches: all their activations come before it, and all gradients
            after.
    """

    def first(culprits: Iterable[Culprit]) -> Culprit | None:
        return min(culprits, key=lambda c: (c.phase if joint else "", c), default=None)

    firsts = comm.gather_objects(first(found), axis)
    return first(culprit for culprit in firsts if culprit is not None)
