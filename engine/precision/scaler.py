"""Dynamic loss scaling (Micikevicius et al. 2018): the loss is multiplied by as much as fp16 gradients bear.

A pure state machine over plain numbers. It neither sees gradients nor talks to other ranks: every rank feeds it the
same decisions (overflow anywhere is overflow everywhere), so all ranks hold the same scale.
"""

from __future__ import annotations

from collections.abc import Mapping

GROWTH = 2.0
BACKOFF = 0.5

MAX_LOSS_SCALE = 2.0**32
"""No growth beyond: Megatron-LM starts here; it lifts gradients of 1e-17 into fp16's range; and where gradients that
were all zero have driven the scale up, the way back takes some thirty skipped steps, not a hundred."""


MIN_LOSS_SCALE = 2.0**-24
"""The least number of fp16. Below it the gradient of the loss itself is 0 in fp16; and where 1 / scale is beyond fp32,
unscaled zeros are NaN.
"""


class LossScaler:
    """The factor of the loss, and how it follows overflows.

    A step whose scaled gradients are not finite is skipped; the caller reports it as `update(overflow=True)`. It takes
    one from what is left of the hysteresis; with nothing left, it halves the scale. After `loss_scale_window` clean
    steps in a row the scale doubles, and the hysteresis is whole again.

    *Hysteresis* has two meanings in the field. Here it has Megatron-LM's (`DynamicGradScaler`): clean steps do not give
    it back, only a full window does; so, once used up, every further overflow halves the scale, whatever lies between.
    In NVIDIA apex (`update_scale_hysteresis`) any clean step makes it whole, so that only overflows in immediate
    succession count; with more than 1 of it, a scale that overflows at every second step never falls.

    Attributes:
        scale: what the loss is multiplied by.
        growth_tracker: clean steps since the last overflow or growth.
        hysteresis_left: the overflow of this number brings the scale down, at 0 every one does.

    Raises:
        ValueError: numbers that cannot be, by the names of their keys in the configuration.
    """

    def __init__(
        self,
        *,
        initial_loss_scale: float = 2.0**16,
        min_loss_scale: float = 1.0,
        loss_scale_window: int = 1000,
        hysteresis: int = 2,
    ) -> None:
        _check(initial_loss_scale, min_loss_scale, loss_scale_window, hysteresis)
        self.minimum, self.window, self.hysteresis = float(min_loss_scale), loss_scale_window, hysteresis
        self.scale = float(initial_loss_scale)
        self.growth_tracker = 0
        self.hysteresis_left = hysteresis

    @property
    def at_minimum(self) -> bool:
        """Whether overflows cannot lower the scale any more: the next one is no matter of the number format."""
        return self.scale <= self.minimum

    def update(self, overflow: bool) -> None:
        """Take note of a step: whether its loss or gradients were not finite on any rank, and it was skipped."""
        if overflow:
            self._overflowed()
            return
        self.growth_tracker += 1
        if self.growth_tracker >= self.window:
            self.growth_tracker, self.hysteresis_left = 0, self.hysteresis
            self.scale = min(self.scale * GROWTH, MAX_LOSS_SCALE)

    def _overflowed(self) -> None:
        self.growth_tracker = 0
        self.hysteresis_left = max(0, self.hysteresis_left - 1)
        if self.hysteresis_left == 0:
            self.scale = max(self.scale * BACKOFF, self.minimum)

    def state_dict(self) -> dict[str, float]:
        """All that a later run needs to go on, as plain numbers."""
        return {
            "scale": self.scale,
            "growth_tracker": self.growth_tracker,
            "hysteresis_left": self.hysteresis_left,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from `state`; where this run's limits are others than those it was saved under, within this run's."""
        self.scale = min(max(float(state["scale"]), self.minimum), MAX_LOSS_SCALE)
        self.growth_tracker = int(state["growth_tracker"])
        self.hysteresis_left = min(int(state["hysteresis_left"]), self.hysteresis)


def _check(initial: float, minimum: float, window: int, hysteresis: int) -> None:
    """Raise ValueError for what cannot be; comparisons are written so that NaN fails them."""
    if not MIN_LOSS_SCALE <= minimum <= MAX_LOSS_SCALE:
        raise ValueError(
            f"precision.min_loss_scale is {minimum}: a scale must be at least 2^-24 (the least number of fp16) and at "
            "most 2^32; use 1 unless gradients themselves exceed what fp16 can hold"
        )
    if not minimum <= initial <= MAX_LOSS_SCALE:
        raise ValueError(
            f"precision.initial_loss_scale is {initial}: it must lie between precision.min_loss_scale ({minimum}) and "
            "2^32; usual are 65536 and, to start from the top, 4294967296"
        )
    if window < 1:
        raise ValueError(
            f"precision.loss_scale_window is {window}: the scale grows after that many clean steps in a row, so it "
            "must be at least 1; usual is 1000"
        )
    if hysteresis < 1:
        raise ValueError(
            f"precision.hysteresis is {hysteresis}: the scale falls at the overflow of that number, so it must be at "
            "least 1 (every overflow); usual is 2"
        )
