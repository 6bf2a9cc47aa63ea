"""What data-parallel ranks tell each other in a step, how much of it the device waits for, and the optimizer.

A layer counts as a unit of its own (small neighbours travel together, which saves latencies), and all of its parameters
as summed over data x context, though those of norms are summed over tensor ranks, too. Legend: d ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from engine.assemble import sharding_policy
from engine.clusters import Cluster
from engine.config import Config
from engine.frozen import Frozen
from engine.recompute.timing import Timing
from parallel.grid import Grid
from parallel.sharding import ShardingPolicy

_READ_AND_WRITTEN = {"adamw": 28, "lamb": 44, "adafactor": 32, "muon": 28}
"""Bytes of fp32 that an update moves per number: AdamW reads weight, gradient and two moments and writes three of them;
Lamb goes through the update once more; Adafactor has one moment and factors; Muon's products are not counted.
"""
_AVERAGE = 12  # of the moving average


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Of the layers of a model.

    Attributes:
        ranks: that hold the same weights. numbers, nbytes: of each layer's weights on a rank, by name; numbers are of
            those that are trained. forward_only: layers that nothing goes backward through.
    """

    config: Config
    cluster: Cluster
    policy: ShardingPolicy
    ranks: tuple[int, ...]
    world: tuple[int, ...]
    numbers: Mapping[str, int]
    nbytes: Mapping[str, int]
    forward_only: frozenset[str] = frozenset()

    @staticmethod
    def of(config: Config, cluster: Cluster, grid: Grid, timing: Timing, frozen: Frozen) -> Traffic:
        """Of a resolved configuration."""
        sizes = timing.weights()
        trains = {layer.name: n == 3 for layer, n in zip(timing.layers, frozen.passes, strict=True)}
        return Traffic(
            config=config,
            cluster=cluster,
            policy=_policy(config, cluster),
            ranks=grid.along("data", "context").ranks,
            world=grid.world.ranks,
            numbers={name: numbers * trains[name] for name, (numbers, _) in sizes.items()},
            nbytes={name: nbytes for name, (_, nbytes) in sizes.items()},
            forward_only=frozenset(l.name for l, n in zip(timing.layers, frozen.passes, strict=True) if n == 1),
        )

    def on(self, config: Config, grid: Grid) -> Traffic:
        """Of the same layers on a grid with as many tensor ranks."""
        ranks, world = grid.along("data", "context").ranks, grid.world.ranks
        return replace(self, config=config, policy=_policy(config, self.cluster), ranks=ranks, world=world)

    # -- of a layer ---------------------------------------------------------------------------------------------------

    def gather(self, name: str) -> float:
        """Seconds of gathering its weights."""
        return self.cluster.collective("all_gather", self.nbytes[name] // len(self.ranks), self.ranks)

    def reduce(self, name: str) -> float:
        """Seconds of reducing its gradients to shards."""
        return self.cluster.collective("reduce_scatter", self._gradient_bytes(name), self.ranks)

    def _gradient_bytes(self, name: str) -> int:
        narrow = self.config.parallel.gradient_dtype == "weights" and self.config.precision.dtype != "fp32"
        return self.numbers[name] * (2 if narrow else 4)

    # -- of a stage, for each micro-batch -----------------------------------------------------------------------------

    def within(self, names: Sequence[str], busy: Mapping[str, float], splits: bool) -> dict[str, float]:
        """What its actions wait for: weights on their way to the first two, gradients on their way from the last.

        Args:
            busy: what its `forward`, `backward` and `weight` (if it `splits`) compute.
        """
        if len(self.ranks) == 1:
            return {}
        moves = dict.fromkeys(("forward", "backward", "weight"), 0.0)
        if self.policy.stage == 3:
            again = 1 - self._kept(names)
            moves["forward"] += again * sum(map(self.gather, names))
            moves["backward"] += again * sum(self.gather(name) for name in names if name not in self.forward_only)
        if self.policy.reduce == "micro_batch":
            moves["weight" if splits else "backward"] += sum(map(self.reduce, names))
        return {what: self._exposed(seconds, busy[what]) for what, seconds in moves.items() if seconds}

    def _kept(self, names: Sequence[str]) -> float:
        """Share of the gathered weights that stay from forward to backward and the next micro-batch."""
        return min(1.0, self.policy.gather / max(1, sum(self.nbytes[name] for name in names)))

    def _exposed(self, moves: float, busy: float) -> float:
        """What is waited for of collectives beside which a device computes for so long."""
        overlap = self.cluster.overlap(self.ranks)
        return (1 - overlap) * moves + max(0.0, overlap * moves - busy)

    # -- of a rank, at the end of a step ------------------------------------------------------------------------------

    def at_the_end(self, names: Sequence[str], last_backward: float) -> float:
        """What is waited for once in a step: the reductions that its last backward does not hide, sums and new weights
        for all.
        """
        if len(self.ranks) == 1:
            return 0.0
        size, stage, overlap = len(self.ranks), self.policy.stage, self.cluster.overlap(self.ranks)
        trained = [name for name in names if self.numbers[name]]
        first = self.reduce(trained[0]) if trained else 0.0  # whose gradient comes last
        seconds = overlap * first
        if self.policy.reduce == "step":
            all_of = sum(map(self.reduce, trained))
            seconds = max(seconds, self._exposed(all_of, last_backward)) if all_of else 0.0
        if stage == 0:
            seconds += self._each(trained, lambda name: 4 * self.numbers[name] // size)
        elif stage < 3:
            seconds += self._each(trained, lambda name: self.nbytes[name] // size)
        else:
            kept = self._kept(names)
            seconds += kept * sum(map(self.gather, names)) * (1 - overlap) + overlap * self.gather(names[0])
        return seconds

    def _each(self, names: Iterable[str], own: Callable[[str], int]) -> float:
        return sum(self.cluster.collective("all_gather", own(name), self.ranks) for name in names)

    def update(self, names: Sequence[str]) -> float:
        """Of the optimizer."""
        o = self.config.optimizer
        each = _READ_AND_WRITTEN[o.name] + _AVERAGE * (o.ema_decay is not None)
        each += 2 * (self.config.precision.dtype != "fp32")
        shards = len(self.ranks) if self.policy.stage else 1
        return self._pass(sum(self.numbers[name] for name in names) * each // shards)

    def norm(self, held: Sequence[Sequence[str]]) -> float:
        """Of the gradient: each rank's own shards, then one small sum over all ranks."""
        most = max(sum(self.numbers[name] for name in names) for names in held)
        return self._pass(4 * most // len(self.ranks)) + self.cluster.collective("all_reduce", 16, self.world)

    def _pass(self, nbytes: int) -> float:
        return self.cluster.over_memory("plain", nbytes, "fp32") if nbytes else 0.0


def _policy(config: Config, cluster: Cluster) -> ShardingPolicy:
    return sharding_policy(config, cluster.memory.gb * 1e9, on_cpu=cluster.device_type == "cpu")
