"""What is said of images: true, the same in every layout, and in words that users choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import (
    DataConfig,
    Dataset,
    EvalStream,
    TextShape,
    TrainStream,
    build_datasets,
    captions_fingerprint,
    describe_datasets,
    prompts,
)
from data.augment import draw_augmentation
from data.captions import Look

Datasets = tuple[Dataset, Dataset]
LOOKS = DataConfig(rotate=60, scale=0.3, crop_min_area=0.5)
SHAPE = TextShape(length=48, vocabulary_size=300)


def build(config: DataConfig, text: TextShape | None = SHAPE) -> Datasets:
    return build_datasets(config, image_size=8, channels=1, num_classes=None, seed=0, text=text)


def said(texts: torch.Tensor | None) -> list[str]:
    """The texts of tokens that are bytes."""
    assert texts is not None
    return [bytes(token for token in row if token < 256).decode() for row in texts.tolist()]


def train_texts(dataset: Dataset, config: DataConfig, **options: Any) -> list[str]:
    defaults = {"global_batch_size": 64, "micro_batch_size": 64, "data_rank": 0, "data_size": 1, "seed": 0}
    stream = TrainStream(dataset, config=config, **{**defaults, **options})
    return said(next(stream.steps(5))[0].texts)


@pytest.mark.parametrize(
    ("look", "words"),
    [
        (Look(), ("upright", "medium", "grey")),
        (Look(turned=10, scale=1.1, brightness=1.2), ("leaning left", "big", "bright")),
        (Look(turned=-44, scale=0.9, brightness=0.8), ("leaning right", "small", "dim")),
        (Look(turned=90), ("turned left", "medium", "grey")),
        (Look(turned=-90), ("turned right", "medium", "grey")),
        (Look(turned=180), ("upside down", "medium", "grey")),
        (Look(turned=359), ("upright", "medium", "grey")),
    ],
)
def test_words_for_what_an_image_looks_like(look: Look, words: tuple[str, str, str]) -> None:
    assert tuple(look.words().values()) == words


def test_captions_say_what_the_augmentation_did(digits: Datasets) -> None:
    """All of it, by the numbers that the pixels come from, whatever the micro-batch."""
    train, _ = build(LOOKS)
    texts = train_texts(train, LOOKS)
    augmentation = draw_augmentation(LOOKS, 0, 5 * 64, 64)
    whole = {"global_batch_size": 64, "micro_batch_size": 64, "data_rank": 0, "data_size": 1, "seed": 0}
    batch = next(TrainStream(train, config=LOOKS, **whole).steps(5))[0]
    names = [row[0] for row in prompts(train)]
    seen = set()
    for i, text in enumerate(texts):
        assert names[batch.labels[i]] in text
        if "leaning" in text or "turned" in text or "upright" in text:
            degrees = np.degrees(augmentation.rotation[i])
            assert ("upright" in text) == (abs(degrees) < 4) and ("left" in text) == (degrees >= 4)
            seen.add("orientation")
        scale = augmentation.zoom[i] / augmentation.crop[i, 0] ** 0.5
        if any(word in text for word in ("small", "medium", "big")):
            assert ("big" in text) == (scale >= 1.05) and ("small" in text) == (scale <= 1 / 1.05)
            seen.add("scale")
    assert seen == {"orientation", "scale"} and len(set(texts)) > 30


def test_a_counter_clockwise_turn_is_to_the_left() -> None:
    """Of pixels: a bar from the centre upwards points to the left afterwards."""
    from data.augment import augment

    config = DataConfig(rotate=90)
    drawn = draw_augmentation(config, 0, 0, 64)
    bar = torch.zeros(64, 1, 15, 15)
    bar[..., :7, 6:9] = 1
    turned = augment(bar, drawn, config, crop=False)
    for image, look in zip(turned, drawn.looks(), strict=True):
        if abs(look.turned) > 30:
            left, right = image[..., :7].sum(), image[..., 8:].sum()
            assert (left > right) == ("left" in look.words()["orientation"])


def test_texts_are_the_same_whoever_makes_them(digits: Datasets) -> None:
    expected = train_texts(digits[0], LOOKS)
    options = {"micro_batch_size": 8, "data_size": 2, "data_rank": 1}
    assert train_texts(digits[0], LOOKS, **options) == expected[32:40]
    assert train_texts(digits[0], LOOKS, with_images=False) == expected
    workers = DataConfig(rotate=60, scale=0.3, crop_min_area=0.5, workers=1)
    assert train_texts(digits[0], workers, with_images=False) == expected
    assert train_texts(digits[0], LOOKS, seed=1) != expected


def test_held_out_texts_say_most_and_nothing_of_padding(digits: Datasets) -> None:
    stream = EvalStream(digits[1], config=LOOKS, micro_batch_size=200, data_rank=0, data_size=1)
    texts = [text for batch in stream for text in said(batch.texts)]
    names = [row[0] for row in prompts(digits[1])]
    assert texts[:360] == [f"a medium grey {names[label]}, upright" for label in digits[1].labels]
    assert texts[360:] == [""] * 40


def test_long_texts_are_cut_and_counted() -> None:
    short = TextShape(length=6, vocabulary_size=259)
    _, held_out = build(DataConfig(), short)
    options = {"micro_batch_size": 64, "data_rank": 0, "data_size": 1}
    streams = [EvalStream(held_out, config=DataConfig(workers=workers), **options) for workers in (0, 1)]
    for stream in streams:
        for batch in stream:
            assert batch.texts is not None and batch.texts.shape == (64, 6)
            assert (batch.texts[:, 0] == 256).all()
            real = batch.weights == 1
            assert (batch.texts[real][:, -1] == 257).all() and (batch.texts[~real][:, 1] == 257).all()
        assert stream.texts_cut == 360
    options |= {"micro_batch_size": 6}
    stream = TrainStream(held_out, config=DataConfig(), global_batch_size=12, seed=0, **options)
    step, counted = next(stream.steps(0)), []
    for m in (0, 1, 0, 1):  # a second pass reads them again
        assert step[m].texts is not None
        counted.append(stream.texts_cut)
    assert counted[1] > counted[0] > 0 and counted[3] == counted[1]
    report = describe_datasets("digits", held_out, held_out, None)
    assert report[1].startswith("  texts: 6 tokens (bytes), such as 'a medium grey ")
    assert "360 of the first 360 held-out texts are longer, and cut: text.context_length 30 would hold" in report[2]
    assert len(describe_datasets("digits", *build(DataConfig()), None)) == 2
    assert said(batch.texts)[0] == "a me"


def test_templates_of_the_user(tmp_path: Path) -> None:
    own, own_prompts = tmp_path / "own.txt", tmp_path / "prompts.txt"
    own.write_text("\ufeff# three\n\nsee {class}: {orientation}\n  {}!\nthe {{class}} {class}\n", encoding="utf-8")
    own_prompts.write_text("itap of a {}.\n{class}\n")
    config = DataConfig(templates=str(own), prompts=str(own_prompts))
    train, held_out = build(config)
    texts = train_texts(train, config)
    names = {row[1] for row in prompts(train)}
    assert {text for text in texts if text.endswith("!")} <= {f"{name}!" for name in names}
    others = {text.partition(" ")[0] for text in texts if not text.endswith("!")}
    assert others == {"see", "the"} and any(text.startswith("the {class} ") for text in texts)
    assert prompts(held_out)[3] == ["itap of a three.", "three"]
    assert captions_fingerprint(train) != captions_fingerprint(build(DataConfig())[0])
    assert captions_fingerprint(build(DataConfig(), None)[0]) == "none"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", r"data\.templates=.* has no templates"),
        ("{class}\na photo\n", r"line 2: 'a photo' must name the class once"),
        ("{class} {colour}\n", r"line 1: .* names \{colour\}: there are \{class\}, \{orientation\}, \{scale\}"),
        ("{class.__init__}\n", r"names \{class\.__init__\}"),
        ("{0}\n", r"names \{0\}"),
        ("{} and {}\n", r"must name the class once"),
        ("{class\n", r"is no template .* write \{\{ and \}\}"),
        (None, r"data\.templates=.*cannot be read \(.*No such file"),
    ],
)
def test_bad_templates_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "templates.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        build(DataConfig(templates=str(file)))


def test_prompts_know_nothing_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("{scale} {class}\n")
    with pytest.raises(ValueError, match=r"data\.prompts=.*names \{scale\}: there are \{class\}"):
        build(DataConfig(prompts=str(tmp_path / "p.txt")))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (TextShape(length=8, vocabulary_size=258), r"text\.vocabulary_size is 258, but data\.tokenizer bytes has 259"),
        (TextShape(length=8, vocabulary_size=259, end_token=2), r"end_token is 2, .* 257: set .* to 257, or data.tok"),
        (TextShape(length=2, vocabulary_size=259), r"text\.context_length is 2, .* set it to 3 or more"),
    ],
)
def test_a_text_tower_that_does_not_fit(shape: TextShape, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(DataConfig(), shape)


def test_every_kind_of_set_has_captions_and_prompts(folder: Path) -> None:
    for config in (DataConfig(kind="synthetic"), DataConfig(kind="textures", crops_per_class=1)):
        train, held_out = build_datasets(config, image_size=16, channels=1, num_classes=None, seed=0, text=SHAPE)
        assert len(prompts(held_out)) == train.num_classes == len({tuple(p) for p in prompts(train)})
        assert len(train_texts(train, config)) == 64
    (folder / "bee").rename(folder / "honey_bee")
    config = DataConfig(kind="image_folder", path=str(folder))
    train, _ = build_datasets(config, image_size=8, channels=3, num_classes=3, seed=0, text=SHAPE)
    assert [p[1] for p in prompts(train)] == ["a photo of ant", "a photo of cat", "a photo of honey bee"]
