"""A machine as a cluster file describes it, and how long things take there.

Times follow from a few figures, each with its source in the file: rates of matrix products by their intensity, of
attention by the number of keys, of passes over memory by their size, and links. Legend: T ranks of a group.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from engine.errors import ConfigError

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "message"]
Number = Literal["fp32", "bf16", "fp16", "fp8"]
PASSES = ("plain", "norm", "activation", "copy", "cast", "strided", "reduction")


@dataclass(frozen=True)
class Curve:
    """A positive function known at a few points, ascending; between them straight in logarithms, flat beyond."""

    points: tuple[tuple[float, float], ...]

    def at(self, x: float) -> float:
        """The value there."""
        xs = [point[0] for point in self.points]
        place = bisect_right(xs, x)
        if place in (0, len(xs)):
            return self.points[min(place, len(xs) - 1)][1]
        (x0, y0), (x1, y1) = self.points[place - 1 : place + 1]
        return y0 * (y1 / y0) ** (math.log(x / x0) / math.log(x1 / x0))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a device."""

    gb: float
    """10^9 bytes."""
    source: str


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What MFU is a share of."""

    tflops: dict[Number, float]
    source: str


@dataclass(frozen=True, kw_only=True)
class ProductRates:
    """TFLOP/s of the three products of a linear in one format, over their intensity 1 / (1/m + 1/n + 1/k)."""

    forward: Curve
    input_gradient: Curve
    weight_gradient: Curve


@dataclass(frozen=True, kw_only=True)
class Products:
    """Matrix products, launch apart."""

    rates: dict[Number, ProductRates]
    source: str


@dataclass(frozen=True, kw_only=True)
class AttentionRates:
    """TFLOP/s of fused attention in one format, over the number of keys: 4 FLOPs forward and 10 backward for each
    query, key and feature.
    """

    forward: Curve
    backward: Curve


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Fused attention, launch apart."""

    rates: dict[Number, AttentionRates]
    source: str


@dataclass(frozen=True, kw_only=True)
class PassRates:
    """GB/s, read and written, of passes in one format over the MB that they read and write."""

    plain: Curve
    """What computes little; the optimizer."""
    norm: Curve
    """LayerNorm and RMSNorm, of q and k too."""
    activation: Curve
    """GELU and the like."""
    copy: Curve | None = None
    """What only moves numbers, or fills with one. Where nothing is said of this and of those below, they go as `plain`,
    as on GPUs, whose kernels wait for memory whatever they do with it; a CPU computes in half precision by way of
    fp32."""
    cast: Curve | None = None
    """From a format to another."""
    strided: Curve | None = None
    """Copies number by number: of transposed matrices, and by an index."""
    reduction: Curve | None = None
    """Sums and largest values."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What reads and writes memory and computes little."""

    rates: dict[Number, PassRates]
    source: str


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a kernel takes however small it is: on a GPU from one kernel to the next, on a CPU the call."""

    microseconds: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Link:
    """Of one kind of operation."""

    latency_us: float
    """Of a message; collectives take it once per doubling of the ranks."""
    gb_per_second: float
    """That a rank sends (and receives as much)."""


@dataclass(frozen=True, kw_only=True)
class Links:
    """Between the devices of a node, or of two."""

    all_reduce: Link
    all_gather: Link
    reduce_scatter: Link
    all_to_all: Link
    message: Link
    overlap: float
    """Share of a collective's time that the device computes on meanwhile, where the engine lets it."""
    source: str


@dataclass(frozen=True, kw_only=True)
class HostLink:
    """Between a device and the memory of its host."""

    gb_per_second: float
    source: str


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machine. Ranks are numbered node by node.

    Attributes:
        file: that it was read from. device_type: CPUs are where the engine does a few things otherwise.
        devices_per_node: with a rank on each.
    """

    file: str = ""
    name: str
    device_type: Literal["cpu", "cuda"] = "cuda"
    nodes: int
    devices_per_node: int
    memory: Memory
    peak: Peak
    products: Products
    attention: Attention
    passes: Passes
    launch: Launch
    within_node: Links
    between_nodes: Links | None = None
    host: HostLink

    @property
    def devices(self) -> int:
        """All of them."""
        return self.nodes * self.devices_per_node

    def of_ranks(self, ranks: int) -> Cluster:
        """The same with as many nodes as so many ranks need."""
        return replace(self, nodes=-(-ranks // self.devices_per_node))

    @property
    def launch_seconds(self) -> float:
        """What a kernel takes at least."""
        return self.launch.microseconds * 1e-6

    # -- on a device --------------------------------------------------------------------------------------------------

    def product(self, kind: str, m: int, n: int, k: int, number: Number, count: int = 1) -> float:
        """Seconds of `count` products [m, k] [k, n] in one call.

        Args:
            kind: `forward`, `input_gradient` or `weight_gradient`.
        """
        if not m * n * k * count:
            return 0.0
        curve: Curve = getattr(self._rates("products", number), kind)
        intensity = 1 / (1 / m + 1 / n + 1 / k)
        return self.launch_seconds + 2 * m * n * k * count / curve.at(intensity) / 1e12

    def attend(self, kind: str, pairs: int, keys: int, number: Number) -> float:
        """Seconds of fused attention.

        Args:
            kind: `forward` or `backward`. pairs: queries x keys x features, over heads and images.
        """
        curve: Curve = getattr(self._rates("attention", number), kind)
        return self.launch_seconds + {"forward": 4, "backward": 10}[kind] * pairs / curve.at(keys) / 1e12

    def over_memory(self, kind: str, nbytes: int, number: Number) -> float:
        """Seconds of a pass that reads and writes so many bytes.

        Args:
            kind: one of PASSES.
        """
        rates = self._rates("passes", "bf16" if number == "fp8" and number not in self.passes.rates else number)
        curve: Curve = getattr(rates, kind) or getattr(rates, "plain")  # noqa: B009
        return self.launch_seconds + nbytes / curve.at(max(nbytes, 1) / 1e6) / 1e9

    def _rates(self, of: str, number: Number) -> object:
        rates = getattr(self, of).rates
        if number not in rates:
            raise ConfigError(
                f"{self.file}: {of}.rates has nothing of {number}: measure it (tools.plan --measure), or plan with "
                f"precision.dtype {' or '.join(rates)}"
            )
        return rates[number]

    # -- between devices ----------------------------------------------------------------------------------------------

    def collective(self, kind: Collective, nbytes: int, ranks: Sequence[int]) -> float:
        """Seconds until all of a group are done.

        Args:
            nbytes: that a rank hands over: of an all-gather its own part, of others all that it has.
        """
        size = len(ranks)
        if size == 1:
            return 0.0
        nodes, most = _spread(tuple(ranks), self.devices_per_node)
        if kind == "message":
            link = getattr(self._links(nodes), kind)
            return float(link.latency_us * 1e-6 + nbytes / link.gb_per_second / 1e9)
        sent = nbytes * {"all_gather": size, "all_reduce": 2, "reduce_scatter": 1, "all_to_all": 1}[kind] / size
        near: Link = getattr(self.within_node, kind)
        hops = math.ceil(math.log2(most))
        if nodes == 1:
            return hops * near.latency_us * 1e-6 + sent * (size - 1) / near.gb_per_second / 1e9
        far: Link = getattr(self._links(nodes), kind)
        latency = (hops * near.latency_us + math.ceil(math.log2(nodes)) * far.latency_us) * 1e-6
        if kind == "all_to_all":  # each rank sends to the others by its own link
            inside, outside = sent * (most - 1) / near.gb_per_second, sent * (size - most) / far.gb_per_second
            return latency + max(inside, outside) / 1e9
        # one ring per rank of a node, each over that rank's own link out of it
        rate = far.gb_per_second * most if most == 1 else min(near.gb_per_second, far.gb_per_second * most)
        return latency + sent * (size - 1) / rate / 1e9

    def overlap(self, ranks: Sequence[int]) -> float:
        """Share of a collective's time that ranks compute on meanwhile."""
        return self._links(_spread(tuple(ranks), self.devices_per_node)[0]).overlap

    def _links(self, nodes: int) -> Links:
        if nodes == 1:
            return self.within_node
        if self.between_nodes is None:
            raise ConfigError(
                f"{self.file}: nothing is said of links between nodes, which ranks of {nodes} nodes need: add the "
                f"group between_nodes, or plan for {self.devices_per_node} ranks"
            )
        return self.between_nodes

    def to_host(self, nbytes: int) -> float:
        """Seconds to copy to the memory of the host, or back."""
        return nbytes / self.host.gb_per_second / 1e9


@cache
def _spread(ranks: tuple[int, ...], per_node: int) -> tuple[int, int]:
    """(nodes that these ranks are on, most of them on one)."""
    each = Counter(rank // per_node for rank in ranks)
    return len(each), max(each.values())
