"""Two groups of keys that are of the run itself: `train` and `log`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_COUNT = 10**9
"""Steps of a run and images of a step: more than any run has, and images drawn in all still have 64-bit numbers."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on how many images at a time, towards what."""

    global_batch_size: int = 128
    """Images per optimizer step, over all ranks."""

    micro_batch_size: int | None = None
    """Images that pass through the model at once on one data-parallel rank; null: one micro-batch per pipeline
    rank, or as many as a schedule's file is for.
    """

    steps: int | None = None
    """Optimizer steps; give this or epochs, of which flags displace a file's."""

    epochs: float | None = None
    """Passes over the training set; give this or steps, of which flags displace a file's."""

    seed: int = 0
    """Decides initial weights, data order, augmentation and drop-path, the same in every layout."""

    eval_interval: int = 0
    """Steps between evaluations on the held-out images; 0: only after the last step."""

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Cross entropy over classes, or the sum of one binary cross entropy per class (ViT-22B)."""

    label_smoothing: float = 0.0
    """In training, what of each label all classes share evenly, such as 0.1."""

    max_bad_steps: int = 5
    """Steps in a row with a NaN or Inf loss or gradient, each skipped, after which the run ends with exit code 4."""

    check_interval: int = 100
    """Steps between comparisons, by hashes, of what several ranks have copies of; each save has one before it, too. 0:
    never. See docs/runs.md."""

    freeze: tuple[str, ...] = ()
    """Patterns such as blocks.[0-3], embed, *.bias, of whole names of parameters or of what they begin with up to a
    dot: what is not trained.
    """

    stop_step: int | None = None
    """Stop after this step with the schedule as it is, save, and end with exit code 3; null: go to the end."""

    time_limit: float | None = None
    """Minutes from the start after which no step is begun that would not end in time: save, exit code 3."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size", "micro_batch_size", "steps", "epochs", "max_bad_steps", "stop_step", "time_limit",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"train.{name} is {value}: it must be positive")
            if value is not None and value > MAX_COUNT:
                raise ValueError(f"train.{name} is {value}: it must be at most {MAX_COUNT}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"train.label_smoothing is {self.label_smoothing}: it must be from 0 to below 1, such as 0.1"
            )
        if self.seed < 0:
            raise ValueError(f"train.seed is {self.seed}: it must be 0 or more")
        for name in ("eval_interval", "check_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} is {getattr(self, name)}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is reported, how often."""

    interval: int = 10
    """Steps between lines of metrics.jsonl and the console."""

    tensorboard: bool = True
    """Whether TensorBoard events are written."""

    profile_steps: tuple[int, int] | None = None
    """First and last step to record in run_dir/profile: timeline.json, and torch's trace of the first; null: none."""

    attention_interval: int = 0
    """Steps between looks at what held-out images have the model attend to, also after the last: maps, entropies, the
    largest logits; 0: never. See docs/seeing.md."""

    attention_images: int = 4
    """How many held-out images that are."""

    def __post_init__(self) -> None:
        if self.attention_interval < 0 or self.attention_images < 1:
            raise ValueError(
                f"log.attention_interval is {self.attention_interval} and log.attention_images {self.attention_images}:"
                " the first must be 0 or more, the second 1 or more"
            )
        if self.profile_steps is not None and not 1 <= self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError(
                f"log.profile_steps is {list(self.profile_steps)}: give the first and last step, from 1 on"
            )
        if self.interval < 1:
            raise ValueError(f"log.interval is {self.interval}: it must be at least 1")
