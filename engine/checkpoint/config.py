"""The group `checkpoint` of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved, when, and what a run starts from."""

    save_interval: int | None = 0
    """Steps between saves; 0: only at the end, and when the run is stopped; null: never."""

    keep: int | None = 3
    """The newest so many are kept; null: all of them."""

    keep_every: int = 0
    """Those of every so many steps are kept, too; 0: none for that reason."""

    keep_best: int = 0
    """The so many best by held-out accuracy (else loss) are kept, too, of those saved at a step with an evaluation."""

    async_save: bool = False
    """Whether a save is written by a thread while training goes on, from a copy of the state in the host's memory."""

    dir: str | None = None
    """Folder of the checkpoints, seen by all ranks; null: run_dir/checkpoints."""

    resume: Literal["auto", "never", "must"] = "auto"
    """Go on from the newest complete checkpoint in `dir`: if there is one, never, or else fail. Earlier files of a run
    that starts anew are set aside."""

    accept_other_data: bool = False
    """Go on although train.seed, the list of training images or their texts are others than those of the checkpoint,
    so that an epoch is not what it would have been: for a run that is meant to go on with other data."""

    load: str | None = None
    """Start from the weights of this checkpoint, or of the newest in this folder, or of another library's file or
    folder: for fine-tuning. Positions and patches are resized, other layers that do not fit are new."""

    load_weights: Literal["weights", "average"] = "weights"
    """With load: the weights themselves, or their moving average."""

    def __post_init__(self) -> None:
        for name, least in (("save_interval", 0), ("keep", 1), ("keep_every", 0), ("keep_best", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"checkpoint.{name} is {value}: it must be {least} or more, or left out")
        for name in ("dir", "load"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ValueError(f"checkpoint.{name} is empty: give a folder, or leave it out")
        if self.resume == "must" and self.load is not None:
            raise ValueError(
                "checkpoint.load starts a new run and checkpoint.resume must goes on with one: give one of the two"
            )
        if self.accept_other_data and self.resume == "never":
            raise ValueError("checkpoint.accept_other_data has no effect with checkpoint.resume never: remove it")
        if self.load is None and self.load_weights != "weights":
            raise ValueError("checkpoint.load_weights says which weights of checkpoint.load are meant: give load, too")
