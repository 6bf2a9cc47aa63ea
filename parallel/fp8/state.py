"""Scales and amax histories of all linears on a rank, in a few tensors: one reduction per step serves them all.

During a step every cast takes the maximum of its tensor's amax and what the step has seen so far, on this rank.
`finish_step` reduces these maxima over the ranks that share the tensors (other images, other tokens, other features),
so all of them go on with the same scales, whatever the layout.

Where we differ from Transformer Engine's delayed scaling, on purpose:
- its scales start at 1, with which gradients of 1e-6 vanish: here a tensor that has no history yet is scaled by its
  own amax (current scaling) until the end of the first step that has seen a non-zero one;
- a NaN or infinite amax is not written to the history, where the maximum over 1024 steps would keep it for 1024 steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Axis
from parallel.fp8.backend import Fp8Backend
from parallel.fp8.quantise import Quantised, amax_of
from parallel.fp8.recipe import ROLES, Fp8Recipe, Role


class Fp8Registry:
    """The FP8 state of every linear on this rank (N of them, by name).

    Attributes:
        recipe, backend: how scales are found; who casts and multiplies.
        keep_weights: whether a weight is cast once per step and kept in 8 bits, or for each product, as where weights
            are sharded and must not be held whole.
        weight_bytes: that kept weights take during a step, the transposes that backward multiplies with included.
        step: counts `finish_step` and loads; 8-bit copies of weights are made once per step.
        records: whether what is cast counts for the next steps' scales; see `unrecorded`.
        amaxes: of the running step, of this rank: [N, 3], in the order of ROLES.
        history: amaxes of the last steps, newest first, over all ranks: [recipe.history, N, 3].
        scales: those of the running step (delayed scaling): [N, 3].
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        recipe: Fp8Recipe,
        backend: Fp8Backend,
        device: torch.device,
        keep_weights: bool = True,
    ) -> None:
        self.recipe, self.backend, self.step, self.keep_weights = recipe, backend, 0, keep_weights
        self.records, self.weight_bytes = True, 0
        count, steps = len(names), recipe.history if recipe.scaling == "delayed" else 0
        self.amaxes = torch.zeros(count, len(ROLES), device=device)
        self.history = torch.zeros(steps, count, len(ROLES), device=device)
        self.scales = torch.ones(count, len(ROLES), device=device)
        self.limits = recipe.limits(device)
        self.known = [[False] * len(ROLES) for _ in names]  # on the host: asking the device would wait for it
        self.states = {name: Fp8State(self, index) for index, name in enumerate(names)}

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Nothing that is cast within counts for later steps: for whatever only looks at the model."""
        self.records = False
        try:
            yield
        finally:
            self.records = True

    @torch.no_grad()
    def finish_step(self, axis: Axis) -> None:
        """End a step, skipped or not, before weights change: reduce amaxes, roll histories, find new scales.

        Args:
            axis: ranks that share tensors: data x context x tensor. Collective (delayed scaling only), one all-reduce.
        """
        self.forget_weights()
        if self.recipe.scaling == "current" or not self.states:
            return
        finite = self.amaxes.nan_to_num(nan=0.0, posinf=0.0)
        self.history = self.history.roll(1, 0)
        self.history[0] = comm.all_reduce(finite, axis, "max")
        self.scales.copy_(self.recipe.scale(self.history.amax(0), self.limits, self.scales))
        self.amaxes.zero_()
        self._update_known()

    def state_dict(self) -> dict[str, Tensor]:
        """`<linear>.amax_history` [H, 3] and `<linear>.scale` [3]: the same on all ranks that share the linear.

        Empty under current scaling. The tensors are copies.
        """
        if self.recipe.scaling == "current":
            return {}
        out = {}
        for name, state in self.states.items():
            out[f"{name}.amax_history"], out[f"{name}.scale"] = state.history.clone(), state.scales.clone()
        return out

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave, of this run or of one with other stages or another length of history.

        Args:
            saved: may hold other linears, too.

        Raises:
            ValueError: a linear of this rank is missing.
        """
        self.forget_weights()
        if self.recipe.scaling == "current":
            return
        missing = [name for name in self.states if f"{name}.scale" not in saved or f"{name}.amax_history" not in saved]
        if missing:
            raise ValueError(
                f"the checkpoint has no FP8 scales of {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}: it "
                "was written without FP8, or with current scaling; start without its FP8 state, or use scaling current"
            )
        self.history.zero_()
        for name, state in self.states.items():
            steps = min(self.recipe.history, len(saved[f"{name}.amax_history"]))
            state.history[:steps] = saved[f"{name}.amax_history"][:steps]
            state.scales.copy_(saved[f"{name}.scale"])
        self.amaxes.zero_()
        self.known = (self.scales != 1).tolist()
        self._update_known()

    def describe(self) -> str:
        """A line for the start-up report."""
        return f"fp8: {len(self.states)} linear(s), {self.recipe.describe()}; {self.backend.describe()}"

    def _update_known(self) -> None:
        if all(map(all, self.known)):
            return  # for good: no step waits for the device again
        seen = (self.history.amax(0) > 0).tolist()
        self.known = [[a or b for a, b in zip(*rows, strict=True)] for rows in zip(self.known, seen, strict=True)]

    def forget_weights(self) -> None:
        self.step += 1
        for state in self.states.values():
            state.forget_weight()


class Fp8State:
    """One linear's scales and history, and the casts of its three tensors."""

    def __init__(self, registry: Fp8Registry, index: int) -> None:
        self.registry, self._index = registry, index
        self._weight: tuple[tuple[int, int, int], Quantised, Tensor] | None = None

    @property
    def backend(self) -> Fp8Backend:
        """Who casts and multiplies."""
        return self.registry.backend

    @property
    def history(self) -> Tensor:
        """Amaxes of the last steps, newest first: a view [H, 3]."""
        return self.registry.history[:, self._index]

    @property
    def scales(self) -> Tensor:
        """Scales of the running step (delayed scaling): a view [3]."""
        return self.registry.scales[self._index]

    @torch.no_grad()
    def quantise(self, role: Role, x: Tensor, split: Axis | None, *, record: bool = True) -> Quantised:
        """The 8-bit form of x [R, C].

        Args:
            split: the tensor axis if its ranks hold different parts of the tensor; None if each holds all of it.
                Collective over it wherever the scale comes from the tensor itself.
            record: whether the amax counts for the next steps, where any does; not in evaluation.
        """
        quantised, amax = self._cast(role, x, split)
        self._record(role, amax, record)
        return quantised

    def quantise_weight(self, weight: Tensor, split: Axis | None, *, record: bool = True) -> Quantised:
        """The 8-bit form of a weight [F, D], if kept, made once per step (and again if torch saw the weight change).

        Its amax counts where it is used in training, whoever made the 8-bit form: evaluation, where the weight may be
        an average of weights, leaves no trace.
        """
        if not self.registry.keep_weights:
            return self.quantise("weight", weight, split, record=record)
        # The native optimizer writes through pointers, which no version counter sees: hence the step.
        key = (self.registry.step, weight.data_ptr(), weight._version)
        if self._weight is None or self._weight[0] != key:
            self._weight = (key, *self._cast("weight", weight, split))
        _, quantised, amax = self._weight
        self._record("weight", amax, record)
        return quantised

    @torch.no_grad()
    def _cast(self, role: Role, x: Tensor, split: Axis | None) -> tuple[Quantised, Tensor]:
        """(the 8-bit form, amax [1])."""
        place = ROLES.index(role)
        registry, amax = self.registry, None
        if registry.recipe.scaling == "delayed" and registry.known[self._index][place]:
            scale = registry.scales[self._index, place : place + 1]
        else:
            amax = amax_of(x)
            if split is not None:
                amax = comm.all_reduce(amax, split, "max")
            scale = registry.recipe.scale(amax, registry.limits[place], torch.ones_like(amax))
        return self.backend.quantise(x, scale, registry.recipe.dtype(role), amax)

    @torch.no_grad()
    def _record(self, role: Role, amax: Tensor, record: bool) -> None:
        registry, place = self.registry, ROLES.index(role)
        if record and registry.records and registry.recipe.scaling == "delayed":
            slot = registry.amaxes[self._index, place : place + 1]
            torch.maximum(slot, amax, out=slot)

    def forget_weight(self) -> None:
        """Free the 8-bit weight."""
        self._weight = None
