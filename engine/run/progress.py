"""How far a run has come, in the numbers of its loop: checkpoints keep them, and a later attempt begins with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from parallel.checkpoint.manifest import CheckpointError


@dataclass
class Progress:
    """Counts at the end of a step, the same on every rank (seconds: each its own).

    Attributes:
        step: steps done, skipped ones too. samples: images drawn so far.
        skipped: steps that changed nothing. bad_in_a_row: of the last steps, how many no smaller loss scale would cure.
        interval_losses: of the steps since the last line of metrics that were not skipped. interval_targets: of the
            same, the loss of each target.
        mended: samples that others stood in for, of all draws. mended_in_epoch: of those of the epoch (from 0) that is
            `mended_epoch`.
        train_seconds: of wall time in all attempts, evaluation and saving included.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    interval_losses: list[float] = field(default_factory=list)
    interval_targets: list[dict[str, float]] = field(default_factory=list)
    mended: int = 0
    mended_in_epoch: int = 0
    mended_epoch: int = 0
    train_seconds: float = 0.0

    def begin_interval(self) -> None:
        """A line of metrics tells of all steps until now."""
        self.interval_losses, self.interval_targets = [], []

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers come back as the very bits."""
        return asdict(self)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """What `to_json` gave; a later version may have put more into it. Raises CheckpointError for what is none."""
        known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        for name, value in known.items():
            is_count = type(value) in (int, float) and value >= 0
            if not (isinstance(value, list) if name.startswith("interval_") else is_count):
                raise CheckpointError(
                    f"what the checkpoint says of the run's progress cannot be: {name} is {value!r:.40}"
                )
        return cls(**known)
