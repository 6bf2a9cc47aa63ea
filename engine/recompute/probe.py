"""A layer set up to be timed: clocks, policies that watch its regions, a sink for weight gradients, random rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from engine.clusters.pricing import Pricer, Spent
from engine.recompute.regions import split_place
from model import Build, LayerSpec, MicroBatch, makers
from model.flops import ProductFlops
from model.regions import Policy, Region
from model.stage import put_under
from parallel.layout import attach_info, info_of
from parallel.tensor import products
from parallel.tensor.weight_grad import attach_sink

T = TypeVar("T")
Place = tuple[str, str]
"""(branch of the block, or "", region)."""
Prepare = Callable[[nn.Module], object]
"""What is done to layers beside building them (8-bit products)."""


class Clock(Protocol):
    """Takes the time of what runs between two stamps."""

    def stamp(self) -> Any:
        """This moment."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two."""

    def spent(self) -> Spent:
        """Since the last call, by what."""


class Wall:
    """Of this process, or of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin = self.stamp()

    def stamp(self) -> Any:
        """As Clock."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """As Clock."""
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def spent(self) -> Spent:
        """As Clock."""
        begin, self._begin = self._begin, self.stamp()
        return {"measured": self.seconds(begin, self._begin)}


class Priced:
    """Of a pricer."""

    def __init__(self, pricer: Pricer) -> None:
        self._pricer = pricer

    def stamp(self) -> float:
        """As Clock."""
        return self._pricer.clock

    def seconds(self, begin: float, end: float) -> float:
        """As Clock."""
        return end - begin

    def spent(self) -> Spent:
        """As Clock."""
        spent = dict(self._pricer.spent)
        self._pricer.spent.clear()
        return spent


class Flops(ProductFlops):
    """Of products: FLOPs in the place of seconds."""

    def __init__(self) -> None:
        super().__init__()
        self._begin = 0

    def stamp(self) -> int:
        """As Clock."""
        return self.flops

    def seconds(self, begin: int, end: int) -> float:
        """As Clock."""
        return float(end - begin)

    def spent(self) -> Spent:
        """As Clock."""
        begin, self._begin = self._begin, self.stamp()
        return {"products": float(self._begin - begin)}


@dataclass
class TimedRegions:
    """A policy that keeps everything, and takes the time."""

    clock: Clock
    spans: list[tuple[Place, Any, Any]] = field(default_factory=list)

    def run(self, place: str, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """As Policy."""
        begin = self.clock.stamp()
        out = function(*inputs)
        self.spans.append(((split_place(place)[1], region), begin, self.clock.stamp()))
        return out

    def take(self) -> dict[Place, float]:
        """Seconds of each region since the last call."""
        found = dict[Place, float]()
        for place, begin, end in self.spans:
            found[place] = found.get(place, 0.0) + self.clock.seconds(begin, end)
        self.spans.clear()
        return found


class RunAgain:
    """A policy that lets another run the regions, and notes which run a second time, and how much of them."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.again = policy, dict[Place, float]()

    def run(self, place: str, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """As Policy."""
        return self.policy.run(place, region, _Watched(function, (split_place(place)[1], region), self.again), *inputs)


class _Watched:
    """A region's function."""

    def __init__(self, function: Callable[..., Any], place: Place, again: dict[Place, float]) -> None:
        self._function, self._place, self._again, self._columns = function, place, again, 0
        if (part := getattr(function, "part", None)) is not None:
            self.part = lambda columns, *inputs: self._part(part, columns, *inputs)

    def __call__(self, *inputs: Any) -> Any:
        out = self._function(*inputs)
        if self._columns:
            self._again[self._place] = 1.0
        first = out[0] if isinstance(out, tuple) else out
        self._columns = 1 if first is None else max(1, first.shape[-1])
        return out

    def _part(self, part: Callable[..., Any], columns: slice, *inputs: Any) -> Any:
        out = part(columns, *inputs)
        if out is not None:
            self._again[self._place] = out.shape[-1] / self._columns
        return out


class Sink:
    """Takes the products of weight gradients, adding them up in fp32 as a bucket does, at once or later.

    Attributes:
        defers: whether they wait for `run`.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self.defers, self._products = False, list[Callable[[], object]]()
        self._sums = dict[nn.Parameter, Tensor]()
        for parameter in layer.parameters():
            attach_sink(parameter, self)
            if device.type != "meta" and parameter.dim() == 2:
                self._sums[parameter] = torch.zeros(parameter.shape, device=device)

    def add_product(self, parameter: nn.Parameter, grad_output: Tensor, x: Tensor) -> None:
        """As GradientSink. On the meta device a product is one: CUDA's goes straight into the sum."""
        out = self._sums.get(parameter)
        self._add(lambda: products.weight_gradient(grad_output, x, out, accumulate=out is not None))

    def add_computed(self, parameter: nn.Parameter, product: Callable[[], Tensor]) -> None:
        """As GradientSink."""
        self._add(product)

    def _add(self, product: Callable[[], object]) -> None:
        self._products.append(product)
        if not self.defers:
            self.run()

    @torch.no_grad()
    def run(self) -> None:
        """All that were taken. Later, too, nothing is noted for a backward pass."""
        while self._products:
            self._products.pop(0)()


class ReadyLayer:
    """One layer of a model with random weights, and what takes the products of its weight gradients.

    Args:
        layers: of the model. index: of the one. build: as a rank builds it. batch_size: images of a micro-batch.
        prepare: what is done to it, in a module under its name, once it is there. device: of it.
    """

    def __init__(
        self, layers: Sequence[LayerSpec], index: int, build: Build, batch_size: int, prepare: Prepare,
        device: torch.device,
    ) -> None:  # fmt: skip
        self._layers, self._index, self._build, self._size, self._device = layers, index, build, batch_size, device
        spec = layers[index]
        self.module = spec.factory(build.of(spec))
        for name, parameter in list(self.module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            dtype = build.precision.of_weight(f"{spec.name}.{name}")
            own = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02))
            attach_info(own, info_of(parameter))
            setattr(self.module.get_submodule(owner), leaf, own)
        self.module.to(device)
        put_under(root := nn.Module(), spec.name, self.module)
        prepare(root)
        self.sink = Sink(self.module, device)

    def step(self, clock: Clock | None = None) -> tuple[Spent, Spent]:
        """Forward and backward; what they took."""
        self.module.zero_grad()
        given = self._inputs()
        if clock is not None:
            clock.spent()
        y = self.module(*given)
        forward = {} if clock is None else clock.spent()
        outputs = [x for x in (y if isinstance(y, tuple) else (y,)) if x.requires_grad]
        gradients = [torch.ones_like(x) for x in outputs]
        if clock is not None:
            clock.spent()
        torch.autograd.backward(outputs, gradients)
        return forward, {} if clock is None else clock.spent()

    def _inputs(self) -> tuple[Any, ...]:
        """Random rows, or none, and a micro-batch of what the layer reads; of one that joins towers, rides."""
        spec, precision, device = self._layers[self._index], self._build.precision, self._device
        here, size = self._build.of(spec), self._size * spec.per_sample
        images = texts = None
        if "images" in spec.reads:
            images = torch.rand(size, here.sizes.channels, *here.sizes.image, device=device)
        if "texts" in spec.reads:
            texts = torch.zeros(size, here.tokens.count, dtype=torch.int64, device=device)
        zeros = torch.zeros(size, dtype=torch.int64, device=device)
        batch = MicroBatch(
            images=images, texts=texts, labels=zeros, sample_ids=zeros, weights=torch.ones(size, device=device)
        )
        flow = [maker.boundary(self._size, self._build) for maker in makers(self._layers, self._index)]
        dtype = precision.of_layer(spec.name)
        x, rides = spec.parted(tuple(torch.randn(of, dtype=dtype, device=device).requires_grad_() for of in flow))
        return spec.arguments(x, batch, rides)
