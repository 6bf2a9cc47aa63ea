"""Named regions: a block's forward pass as a short list of steps that others may watch or run in their own way.

Everything that autograd keeps of a block, its weights apart, is saved while one of its regions runs, through
`save_for_backward` and in no other way. So whoever runs the regions decides what stays
(`torch.autograd.graph.saved_tensors_hooks` around the call), what is computed again, and sees what goes in and comes
out, by name, whatever kernels compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

T = TypeVar("T")

Region = Literal[
    "norm", "gather", "projection", "fc1", "qkv", "qk_norm", "attention", "activation", "output", "residual", "merge",
    "tap",
]  # fmt: skip
"""norm: LayerNorm or RMSNorm, with the residual sum in front of it where they are one pass; gather: of the rows that
sequence parallelism splits, for the projection, which differentiates it (None where rows are whole); projection: qkv,
fc1, or both in one; fc1, qkv: those parts of both; qk_norm: norms of q and k, rotation; attention: q, k, v of the heads
to their mixture; activation: of the MLP; output: attention's projection, fc2, or both in one; residual: LayerScale,
drop-path and sum; merge: of patches, between the stages of a pyramid; tap: who looks at q, k and v (model.taps).
"""


class Policy(Protocol):
    """Who runs the regions."""

    def run(self, place: str, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """`function(*inputs)`.

        Args:
            place: the layer, and the branch of it where it has two of a kind: `blocks.3`, `blocks.3.attn`.
        """


class Keep:
    """Autograd keeps all that backward needs."""

    def run(self, place: str, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """As Policy."""
        return function(*inputs)


@dataclass(frozen=True)
class Regions:
    """A layer's, which calls them as `regions("norm", self.norm, x)`."""

    place: str = ""
    policy: Policy = field(default_factory=Keep)

    def __call__(self, region: Region, function: Callable[..., T], *inputs: Any) -> T:
        """What `function(*inputs)` gives."""
        return self.policy.run(self.place, region, function, *inputs)

    def at(self, branch: str) -> Regions:
        """Those of a branch of the layer."""
        return Regions(f"{self.place}.{branch}", self.policy)
