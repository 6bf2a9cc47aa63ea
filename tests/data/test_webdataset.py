"""The samples of tar files as a data set: images, labels, captions, parts, order."""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DataConfig, Dataset, TextShape, TrainStream, build_datasets
from data.captions import Look
from data.held_out import Part
from data.keyed import Purpose
from data.mixing import order_of, period, sample_order, whole_shares
from data.permutation import permuted
from data.sampling import SampleOrder, _keys
from data.shards import catalogue
from data.webdataset import webdataset
from tests.data.tars import picture, sample, shards, write_tar

TEXT = TextShape(length=20, vocabulary_size=259, end_token=257)


def build(
    path: object, text: TextShape | None = None, num_classes: int | None = 3, **keys: Any
) -> tuple[Dataset, Dataset]:
    keys = {name: str(value) if name == "val_path" else value for name, value in keys.items()}
    config = DataConfig(kind="webdataset", path=str(path), **keys)
    return build_datasets(config, image_size=(6, 9), channels=3, num_classes=num_classes, seed=0, text=text)


def greys(dataset: Dataset) -> list[int]:
    images = dataset.read(np.arange(len(dataset)))
    assert images.shape[1:] == (3, 6, 9) and (images.flatten(1).std(1) < 1e-6).all()
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def test_samples_are_those_of_the_tar_files(tmp_path: Path) -> None:
    pattern = shards(tmp_path)
    train, held_out = build(pattern, val_path=pattern)
    assert greys(train) == greys(held_out) == list(range(21))
    assert train.labels.tolist() == [i % 3 for i in range(21)] and train.num_classes == 3 and train.class_names is None
    np.testing.assert_array_equal(train.labels_of(np.array([20, 7, 0])), [2, 1, 0])
    pixels, label = train.load(13)
    assert label == 1 and torch.equal(torch.from_numpy(pixels), train.read(np.array([13]))[0])
    folds = [build(pattern, fold=fold) for fold in range(5)]
    assert sorted(itertools.chain.from_iterable(greys(held_out) for _, held_out in folds)) == list(range(21))
    for train, held_out in folds:
        assert sorted(greys(train) + greys(held_out)) == list(range(21)) and 4 <= len(held_out) <= 5
        assert held_out.labels.tolist() == [grey % 3 for grey in greys(held_out)]
        assert len({train.fingerprint, held_out.fingerprint}) == 2


def test_a_fingerprint_is_of_the_bytes_and_not_of_their_place(tmp_path: Path) -> None:
    one, other = (build(shards(tmp_path / name))[0].fingerprint for name in "ab")
    assert one == other != build(shards(tmp_path / "c", sizes=(7, 5, 8)))[0].fingerprint


def test_labels_are_numbers_names_or_lines_of_a_class_map(tmp_path: Path) -> None:
    pattern = shards(tmp_path)
    train, _ = build(pattern, label_column="kind", val_path=pattern)
    assert train.class_names == ("a", "b", "c") and train.labels[:4].tolist() == [0, 1, 2, 0]
    (tmp_path / "classes.txt").write_text("c\na\nb\nd\n")
    train, held_out = build(pattern, label_column="kind", val_path=pattern, num_classes=4)
    assert train.num_classes == 4 and train.labels[:4].tolist() == held_out.labels[:4].tolist() == [1, 2, 0, 1]
    assert build(pattern, num_classes=4)[0].class_names == ("c", "a", "b", "d")
    (tmp_path / "classes.txt").write_text("c\na\n")
    with pytest.raises(ValueError, match=r"has label 2, but classes\.txt has 2 lines"):
        build(pattern)
    with pytest.raises(ValueError, match=r"classes \['b'\], which classes\.txt beside data\.path"):
        build(pattern, label_column="kind")
    (tmp_path / "classes.txt").write_text("c\n\na\nb\n\n")
    with pytest.raises(ValueError, match=r"classes\.txt, line 2 is empty"):
        build(pattern)
    (tmp_path / "classes.txt").unlink()
    more = write_tar(tmp_path / "more.tar", [sample(i, json=json.dumps({"kind": "z"})) for i in range(3)])
    with pytest.raises(ValueError, match=r"classes \['z'\], which data\.path does not have"):
        build(pattern, label_column="kind", val_path=more)
    with pytest.raises(ValueError, match=r"some samples have a label and others none, in .*more\.tar \(3 of 3\)"):
        build(pattern, val_path=more)
    mixed = write_tar(tmp_path / "mixed.tar", [sample(i, cls="ab"[i % 2]) for i in range(5)])
    with pytest.raises(ValueError, match=r"mixed\.tar are numbers on one side and names on the other"):
        build(pattern, val_path=mixed)
    with pytest.raises(
        ValueError, match=r"the labels of .*00\.tar are all numbers, and those of other shards are names"
    ):
        build(f"{tmp_path}/{{00,mixed}}.tar")
    with pytest.raises(ValueError, match=r"has no classes, but the objective needs some"):
        build(more, val_path=more)
    assert build(more, val_path=more, num_classes=None)[0].labels_of(np.array([2, 1])).tolist() == [2, 1]


@pytest.mark.parametrize("label", [None, "kind"])
def test_ranks_of_a_host_look_once(tmp_path: Path, label: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, looked, expand = shards(tmp_path / "s"), [], catalogue.expand
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(catalogue, "expand", lambda *given: looked.append(given) or expand(*given))
    config = DataConfig(kind="webdataset", path=pattern, label_column=label)
    found = [webdataset(config, (3, 6, 9), (), readers=2)[0] for _ in range(2)]
    assert len(looked) == 1 and [path.name for path in tmp_path.iterdir()] == ["s"]
    assert found[0].fingerprint == found[1].fingerprint and found[0].labels.tolist() == found[1].labels.tolist()


def test_captions_are_texts_or_fields(tmp_path: Path) -> None:
    said = [
        sample(i, txt=f"text {i}\n", json=json.dumps({"caption": f"json {i}", "many": [f"one {i}", f"two {i}"]}))
        for i in range(6)
    ]
    path = write_tar(tmp_path / "x.tar", said)

    def every(index: int, **keys: Any) -> list[str]:
        captions = build(path, TEXT, None, val_path=str(path), **keys)[0].captions
        assert captions is not None
        drawn = [captions.one(index, 0, Look(), np.array([0, 0.6], dtype=np.float32), turn) for turn in range(2)]
        found = list(captions.every(index, 0, Look()))
        assert drawn == [found[1 % len(found)], found[0]]
        return found

    assert every(4) == ["text 4"] and every(4, caption_column="many") == ["one 4", "two 4"]
    untold = write_tar(tmp_path / "y.tar", [*said[:3], sample(8, txt=" \n"), sample(9)])
    captions = build(untold, TEXT, None, val_path=str(path))[0].captions
    assert captions is not None
    for index, number in ((3, 8), (4, 9)):
        with pytest.raises(ValueError, match=rf"y\.tar, sample part/0000{number} has no caption \(\.txt nor \.json\)"):
            captions.every(index, 0, Look())
    with pytest.raises(ValueError, match=r"data\.templates has no effect"):
        build(path, TEXT, None, val_path=str(path), templates=str(tmp_path / "templates.txt"))
    with pytest.raises(ValueError, match=r"x\.tar: nothing is said of the first image, and there are no classes"):
        build(path, TEXT, None, caption_column="absent")
    silent = shards(tmp_path / "silent", sizes=(6,))
    captions = build(silent, TEXT, caption_column="absent")[0].captions
    assert captions is not None and "class 1" in captions.every(1, 1, Look())[0]  # of templates


def test_training_reads_the_same_in_workers_with_crops_and_texts(tmp_path: Path) -> None:
    pattern = shards(tmp_path)
    keys: dict[str, Any] = {"crop_min_area": 0.5, "rotate": 10.0, "shuffle_window": 2}
    batches = []
    for workers in (0, 2):
        dataset, _ = build(pattern, TEXT, workers=workers, **keys)
        config = DataConfig(kind="webdataset", path=pattern, workers=workers, **keys)
        stream = TrainStream(
            dataset, config=config, global_batch_size=8, micro_batch_size=4, data_rank=0, data_size=1, seed=1
        )
        batches.append([batch for step in itertools.islice(stream.steps(3), 2) for batch in step])
    for one, other in zip(*batches, strict=True):
        assert one.images is not None and one.texts is not None
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_a_bad_image_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("a/7", {"jpg": picture(3, "jpg")[:100]}), *map(sample, range(5))])
    with pytest.raises(ValueError, match=r"x\.tar, sample a/7 cannot be decoded"):
        build(path, num_classes=None, val_path=str(path))[0].read(np.arange(1))


@pytest.mark.parametrize("size", [5, 6, 9, 21, 103])
def test_a_fifth_is_held_out_by_a_rule_for_each_sample(size: int) -> None:
    parts = [[Part(size, fold, is_held_out) for is_held_out in (False, True)] for fold in range(5)]
    found = [[part.samples(np.arange(len(part))).tolist() for part in of_fold] for of_fold in parts]
    assert sorted(itertools.chain.from_iterable(held_out for _, held_out in found)) == list(range(size))
    for of_fold, (train, held_out) in zip(parts, found, strict=True):
        assert sorted(train + held_out) == list(range(size)) and train == sorted(train)
        for part, samples in zip(of_fold, (train, held_out), strict=True):
            before = part.before(np.arange(size + 1)).tolist()
            assert before == [sum(sample < end for sample in samples) for end in range(size + 1)]
    assert all(len({sample // 5 for sample in held_out}) == len(held_out) for _, held_out in found)


def test_shards_are_shuffled_then_samples_in_windows_of_them() -> None:
    sizes = [7, 5, 0, 9, 1, 4]
    ends = np.cumsum(sizes)
    for window in (1, 2, 4, 6, 10):
        order = SampleOrder(26, seed=3, shard_ends=ends, window=window)
        for epoch in range(3):
            expected: list[int] = []
            shuffled = permuted(np.arange(6), 6, _keys(3, Purpose.SHARDS, epoch)).tolist()
            for number, first in enumerate(range(0, 6, window)):
                pool = [
                    index for shard in shuffled[first : first + window]
                    for index in range(int(ends[shard]) - sizes[shard], int(ends[shard]))
                ]  # fmt: skip
                places = (
                    permuted(np.arange(len(pool)), len(pool), _keys(3, Purpose.WINDOW, epoch, number)) if pool else []
                )
                expected += [pool[place] for place in places]
            assert order.indices(np.arange(26) + 26 * epoch).tolist() == expected
            assert sorted(expected) == list(range(26))
    large = SampleOrder(10**9, seed=0, shard_ends=np.arange(1, 100_001) * 10_000, window=50)
    found = large.indices(np.arange(5 * 10**8, 5 * 10**8 + 4096))
    assert len(np.unique(found)) == 4096 and len(np.unique(found // 10_000)) == 50


def test_shares_of_sources_are_exact_to_one_sample_at_every_moment() -> None:
    for weights, expected in (
        ((3, 1), [3, 1]),
        ((0.7, 0.2, 0.1), [7, 2, 1]),
        ((1, 1, 1), [1, 1, 1]),
        ((97, 2, 11.5, 8), None),
    ):
        shares = whole_shares(weights)
        assert expected in (None, shares)
        sources, before = period(shares)
        had = np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)
        due = np.arange(1, len(sources) + 1)[:, None] * np.array(shares) / sum(shares)
        assert np.abs(had - due).max() < 1 and had[-1].tolist() == shares
        np.testing.assert_array_equal(before, had[np.arange(len(sources)), sources] - 1)
    for wrong in ((1.0, 0.0), (1.0, float("inf")), (1.0, 3.14159265)):
        with pytest.raises(ValueError, match=r"data\.weights is"):
            whole_shares(wrong)


def test_sources_are_mixed_in_their_shares_each_in_epochs_of_its_own(tmp_path: Path) -> None:
    one, other = shards(tmp_path / "a", sizes=(7, 5, 9)), shards(tmp_path / "b", sizes=(4, 6))
    keys: dict[str, Any] = {"val_path": one, "weights": (3.0, 1.0), "shuffle_window": 1}
    dataset, _ = build(f"{one}::{other}", **keys)
    assert dataset.source_ends is not None and dataset.source_ends.tolist() == [21, 31]
    config = DataConfig(kind="webdataset", path=f"{one}::{other}", **keys)
    drawn = sample_order(dataset, 5, config).indices(np.arange(280)).tolist()
    first, second = ([i for i in drawn if (i < 21) == is_first] for is_first in (True, False))
    assert len(first) == 210 and len(second) == 70
    assert all(sorted(first[at : at + 21]) == list(range(21)) for at in range(0, 210, 21))
    assert all(sorted(second[at : at + 10]) == list(range(21, 31)) for at in range(0, 70, 10))
    for epoch in np.array(second).reshape(7, 10):  # one shard at a time
        assert len({int(i >= 25) for i in epoch[:4]}) == 1 or len({int(i >= 25) for i in epoch[:6]}) == 1
    assert order_of(config) == "Feistel, 16 rounds, 1 shards at a time, sources 3:1"
    with pytest.raises(ValueError, match=r"data\.weights has 1 numbers, and data\.path=.* 2 sources"):
        build(f"{one}::{other}", val_path=one, weights=(3.0,))
    ends = [f"{tmp_path}/a/00.tar::{tmp_path}/a/{{01,02}}.tar", f"{tmp_path}/a/{{00,01}}.tar::{tmp_path}/a/02.tar", one]
    assert len({build(path, val_path=one)[0].fingerprint for path in ends}) == 3
    with pytest.raises(ValueError, match=r"names a shard in two sources"):
        build(f"{one}::{one}", val_path=one)
    held_out = build(f"{one}::{other}", weights=(3.0, 1.0))[0]
    assert held_out.source_ends is not None and held_out.source_ends.tolist()[-1] == len(held_out)
