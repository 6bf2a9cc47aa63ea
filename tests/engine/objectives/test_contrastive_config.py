"""Keys of objective contrastive: what is refused, what follows from what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from data import DataConfig, TextShape
from engine.config import Config, TrainConfig
from engine.config.contrastive import ContrastiveConfig
from engine.config.objective_keys import check_repeats
from engine.config.objectives import text_shape
from engine.errors import ConfigError
from model import TextConfig
from parallel.config import ParallelConfig
from tests.engine.objectives.pairs import TEXT, config_of
from tests.engine.small import small

VIEWS = ContrastiveConfig(pairs="views")
REFUSED: dict[str, tuple[Callable[[], Config], str]] = {
    "a key of the other objective": (
        lambda: small(contrastive=ContrastiveConfig(embedding=64)).resolve(1),
        "contrastive.embedding is 64, a key of objective contrastive, but objective is supervised: leave it out",
    ),
    "a text tower without texts": (lambda: small(text=TEXT).resolve(1), "text.width is 16, a key of objective contras"),
    "classes": (lambda: config_of(num_classes=10), "model.num_classes is 10, a key of objective supervised, but obj"),
    "a loss of classes": (
        lambda: config_of(train=TrainConfig(steps=1, global_batch_size=8, loss="sigmoid")),
        "train.loss is sigmoid, a key of objective supervised",
    ),
    "mixed images": (
        lambda: config_of(data=DataConfig(cutmix=1.0)),
        "data.cutmix is 1.0, a key of objectives supervised and distillation, but objective is contrastive: leave it",
    ),
    "views of pairs": (lambda: config_of(data=DataConfig(views=2)), "data.views is 2, a key of contrastive.pairs vie"),
    "texts beside views": (lambda: config_of(contrastive=VIEWS), "text.width is 16, a key of contrastive.pairs image"),
    "a text tower that is none": (lambda: config_of(text=TextConfig()), "text.width is not set: give it, or a text."),
    "a bias under a softmax": (
        lambda: config_of(contrastive=ContrastiveConfig(bias=-10.0)),
        "contrastive.bias is -10.0, but contrastive.loss infonce has none",
    ),
    "labels with one partner": (
        lambda: config_of(contrastive=ContrastiveConfig(positives="label")),
        "contrastive.positives is label, but contrastive.loss infonce is for one true partner: leave it out, or use",
    ),
    "a queue without keys": (
        lambda: config_of(text=TextConfig(), contrastive=replace(VIEWS, queue=64)),
        "contrastive.queue is 64, but no moving average makes keys: set contrastive.momentum, such as 0.99",
    ),
    "a queue of fewer keys than ranks": (
        lambda: config_of(4, text=TextConfig(), contrastive=replace(VIEWS, momentum=0.9, queue=3)),
        "contrastive.queue is 3, fewer keys than the 4 data-parallel ranks that share them: use 4 or more",
    ),
    "momentum of texts": (
        lambda: config_of(contrastive=ContrastiveConfig(momentum=0.99)),
        "contrastive.momentum is 0.99, but it is for contrastive.pairs views and loss infonce, not for image_text",
    ),
    "an average of texts without memory": (
        lambda: config_of(contrastive=ContrastiveConfig(loss="sigmoid", momentum=0.0)),
        "contrastive.momentum is 0.0, but it is for contrastive.pairs views and loss infonce, not for image_text",
    ),
    "a predictor of fewer features than ranks": (
        lambda: config_of(2, text=TextConfig(), contrastive=replace(VIEWS, momentum=0.9, predictor=1),
                          parallel=ParallelConfig(tensor_parallel_size=2)),
        "contrastive.predictor 1 cannot be split over parallel.tensor_parallel_size 2: use a size of at most 1",
    ),
    "a temperature beyond the bound": (
        lambda: config_of(contrastive=ContrastiveConfig(temperature=0.001)),
        "contrastive.temperature 0.001 is a logit scale of 1000, above contrastive.max_logit_scale 100",
    ),
    "few images": (
        lambda: config_of(data=DataConfig(images_per_class=3)),
        "data.images_per_class is 3, a key of objectives supervised and distillation, but objective is contrastive",
    ),
    "one pair": (
        lambda: config_of(train=TrainConfig(steps=1, global_batch_size=1)),
        "train.global_batch_size is 1: a pair is told from the others of its batch, so use 2 or more",
    ),
    "fewer pairs than ranks": (
        lambda: config_of(8, train=TrainConfig(steps=1, global_batch_size=4)),
        "train.global_batch_size 4 cannot be dealt to 8 data-parallel ranks",
    ),
    "one pass of another schedule": (
        lambda: config_of(
            2, parallel=ParallelConfig(pipeline_parallel_size=2), contrastive=ContrastiveConfig(passes=1)
        ),
        "contrastive.passes is 1, which needs the outputs of all 2 micro-batches before the first backward, but "
        "parallel.schedule 1f1b runs backwards in between: use gpipe",
    ),
    "more stages than layers": (
        lambda: config_of(16, parallel=ParallelConfig(pipeline_parallel_size=16), train=TrainConfig(
            steps=1, global_batch_size=16)),
        "parallel.pipeline_parallel_size 16 is more than the 10 layers of both towers (embeddings, 5 blocks, heads, p",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_is_refused(what: str) -> None:
    make, message = REFUSED[what]
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("loss", "positives", "repeats", "batch", "message"),
    [
        (
            "supcon",
            "image",
            2,
            9,
            "data.repeats is 2, of which train.global_batch_size 9 is no multiple, .* batch of 8",
        ),
        ("supcon", "image", 1, 8, "contrastive.positives is image, but data.repeats is 1, .* set data.repeats to 2 or"),
        ("infonce", None, 2, 8, "data.repeats is 2, but contrastive.loss infonce has one true partner"),
        ("supcon", "label", 2, 8, None),
        ("supcon", "image", 2, 8, None),
    ],
)
def test_repeats(loss: Any, positives: Any, repeats: int, batch: int, message: str | None) -> None:
    config = config_of(
        contrastive=ContrastiveConfig(loss=loss, positives=positives), data=DataConfig(repeats=repeats),
        train=TrainConfig(steps=1, global_batch_size=batch),
    )  # fmt: skip
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_repeats(config)


@pytest.mark.parametrize(
    ("ranks", "parallel", "batch", "given", "expected"),
    [
        (1, {}, (8, 8), "auto", 1),  # one micro-batch
        (1, {}, (8, 2), "auto", "auto"),  # memory decides
        (1, {}, (8, 2), 1, 1),
        (2, {"pipeline_parallel_size": 2}, (8, 4), "auto", 2),
        (2, {"pipeline_parallel_size": 2, "schedule": "gpipe"}, (8, 4), "auto", 1),
        (2, {"pipeline_parallel_size": 2, "schedule": "zb_v"}, (8, 4), 2, 2),
    ],
)
def test_passes(ranks: int, parallel: dict[str, Any], batch: tuple[int, int], given: Any, expected: Any) -> None:
    train = TrainConfig(steps=1, global_batch_size=batch[0], micro_batch_size=batch[1])
    asked = {"parallel": ParallelConfig(**parallel), "train": train, "contrastive": ContrastiveConfig(passes=given)}
    config = config_of(ranks, **asked)
    assert config.contrastive.passes == expected
    schedule = config.pipeline(config.grid_shape(ranks)).schedule(batch[0] // batch[1])
    assert schedule.name == ("gpipe" if expected == 1 else parallel.get("schedule", "1f1b"))
    assert config.resolve(ranks) == config, "resolved again, as config.yaml is, it is what it was"
    told = config.to_yaml(small(objective="contrastive", text=TEXT, num_classes=None, **asked))
    assert (f"passes: auto  # here {expected}" in told) == (given == "auto" != expected)


def test_usual_values() -> None:
    keys = config_of(contrastive=ContrastiveConfig(loss="sigmoid")).contrastive
    assert (keys.bias, keys.temperature, keys.max_logit_scale, keys.positives) == (-10.0, 0.1, 0.0, "pair")
    keys = config_of().contrastive
    assert (keys.bias, keys.temperature, keys.max_logit_scale, keys.learn_temperature) == (None, 0.07, 100.0, True)
    keys = config_of(contrastive=ContrastiveConfig(loss="supcon")).contrastive
    assert keys.positives == "label"
    assert text_shape(config_of()) == TextShape(length=8, vocabulary_size=259, end_token=257)
    siglip = text_shape(config_of(text=replace(TEXT, pool="last", vocabulary_size=32000, end_token=1)))
    assert siglip == TextShape(length=8, vocabulary_size=32000, end_token=1), "other tokens are refused by it"
    assert text_shape(small().resolve(1)) is None
