"""Parquet files as Hugging Face's datasets write them: images, labels, captions, row groups, and what is refused."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import DataConfig, Dataset, TextShape, TrainStream, build_datasets
from data.captions import Look
from data.errors import UnreadableImageError
from data.mixing import sample_order
from data.shards.stores import store_of
from data.webdataset import WebDataset
from tests.data.tars import picture
from tools.prepare_data.__main__ import main

TEXT = TextShape(length=20, vocabulary_size=259, end_token=257)
NAMES = ("ant", "bee", "cat")


def hugging_face(path: Path, numbers: Sequence[int], names: Sequence[str] | None = NAMES, **columns: Any) -> Path:
    """A file of images of one grey each, `number`, three to a row group, as datasets' push_to_hub writes it."""
    images = [{"bytes": picture(number), "path": f"{number}.png"} for number in numbers]
    given: dict[str, Any] = {
        "image": pa.array(images, type=pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "label": pa.array([number % 3 for number in numbers], type=pa.int64()),
        "caption": pa.array([[f"grey {number}", " so it is "] for number in numbers]),
    } | columns
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table({name: column for name, column in given.items() if column is not None})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=3)
    return path


def files(folder: Path) -> str:
    """Two files of 7 and 5 rows in groups of three; returns their pattern."""
    hugging_face(folder / "a-0-of-2.parquet", range(7))
    hugging_face(folder / "a-1-of-2.parquet", range(7, 12))
    return f"{folder}/a-{{0..1}}-of-2.parquet"


def build(path: object, num_classes: int | None = 3, text: TextShape | None = None, **keys: Any) -> list[WebDataset]:
    config = DataConfig(kind="parquet", path=str(path), **({"val_path": str(path)} | keys))
    found = build_datasets(config, image_size=(6, 9), channels=3, num_classes=num_classes, seed=0, text=text)
    assert all(isinstance(one, WebDataset) for one in found)
    return list(found)  # type: ignore[arg-type]


def greys(dataset: Dataset) -> list[int]:
    return (dataset.read(np.arange(len(dataset)))[:, 0, 0, 0] * 255).round().int().tolist()


def test_images_labels_and_captions_are_those_of_the_rows(tmp_path: Path) -> None:
    pattern = files(tmp_path)
    train, _ = build(pattern, text=TEXT)
    assert greys(train) == list(range(12)) and train.class_names == NAMES
    assert train.labels.tolist() == [i % 3 for i in range(12)]
    assert build(pattern, label_column="label")[0].fingerprint == train.fingerprint  # named or not: the same data
    assert train.captions is not None and train.captions.every(8, 2, Look()) == ["grey 8", "so it is"]
    assert train.captions.prompts() is not None and "bee" in train.captions.prompts()[1][0]  # type: ignore[index]
    assert train.shard_ends is not None and train.shard_ends.tolist() == [3, 6, 7, 10, 12]  # row groups
    assert train.store.name(train.places(np.array([8]))[0]).endswith("a-1-of-2.parquet, sample 8.png")
    assert (
        "12 images in 2 shards" in train.source and "left out: nothing; 2 indexed now; in 5 row groups" in train.source
    )
    folds = [build(pattern, val_path=None, fold=fold)[1] for fold in range(5)]
    assert sorted(itertools.chain.from_iterable(map(greys, folds))) == list(range(12))
    assert train.fingerprint != build(f"{tmp_path}/a-{{1..0}}-of-2.parquet")[0].fingerprint


def test_sources_windows_and_workers_are_as_for_tar_files(tmp_path: Path) -> None:
    files(tmp_path)
    one, other = (f"{tmp_path}/a-{number}-of-2.parquet" for number in range(2))
    keys: dict[str, Any] = {"weights": (3.0, 1.0), "shuffle_window": 1, "crop_min_area": 0.5}
    batches = []
    for workers in (0, 2):
        dataset, _ = build(f"{one}::{other}", text=TEXT, workers=workers, val_path=one, **keys)
        config = DataConfig(kind="parquet", path=f"{one}::{other}", val_path=one, workers=workers, **keys)
        stream = TrainStream(
            dataset, config=config, global_batch_size=8, micro_batch_size=4, data_rank=0, data_size=1, seed=1
        )
        batches.append([batch for step in itertools.islice(stream.steps(0), 2) for batch in step])
    for a, b in zip(*batches, strict=True):
        assert a.images is not None and a.texts is not None and torch.equal(a.images, b.images)
        assert torch.equal(a.texts, b.texts) and torch.equal(a.labels, b.labels)
    drawn = sample_order(dataset, 5, config).indices(np.arange(28)).tolist()
    first = [index for index in drawn if index < 7]
    assert len(first) == 21 and all(sorted(first[at : at + 7]) == list(range(7)) for at in (0, 7, 14))
    groups = [index // 3 for index in first[:7]]
    assert len(list(itertools.groupby(groups))) == 3  # one row group after the other


def test_columns_may_be_plain_and_have_other_names(tmp_path: Path) -> None:
    numbers = range(8)
    columns = {
        "image": None, "label": None, "caption": None,
        "pixels": pa.array([picture(n) if n != 2 else None for n in numbers], type=pa.large_binary()),
        "said": pa.array([f"text {n}" for n in numbers]).dictionary_encode(),
        "kind": pa.array(["b" if n % 2 else "a" for n in numbers]),
    }  # fmt: skip
    path = hugging_face(tmp_path / "x.parquet", numbers, None, **columns)
    keys = {"image_column": "pixels", "caption_column": "said", "label_column": "kind"}
    train, _ = build(path, 2, TEXT, **keys)
    assert greys(train) == [0, 1, 3, 4, 5, 6, 7] and train.class_names == ("a", "b")
    assert train.labels.tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert "left out: 1 rows without the bytes of an image" in train.source
    assert train.captions is not None and train.captions.every(2, 1, Look()) == ["text 3"]
    assert train.shard_ends is not None and train.shard_ends.tolist() == [2, 5, 7]
    assert (tmp_path / "x.parquet.pixels.said.kind.index").exists()


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = files(tmp_path)
    for keys, message in (
        ({"image_column": "img"}, r"a-\d-of-2\.parquet has no column 'img', but image, label, caption: .*image_column"),
        ({"caption_column": "said"}, r"has no column 'said'.*data\.caption_column"),
        ({"label_column": "caption"}, r"column 'caption' is of list.*not whole numbers or words"),
        ({"image_column": "label"}, r"column 'label' is of int64, not bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            build(pattern, **keys)
    other = hugging_face(tmp_path / "b.parquet", range(6), ("ant", "bee", "dog"))
    with pytest.raises(ValueError, match=r"b\.parquet have other names: write them alike"):
        build(f"{pattern}::{other}")
    with pytest.raises(ValueError, match=r"name their classes otherwise: label 2 is 'cat' and 'dog'"):
        build(pattern, val_path=str(other))
    few = hugging_face(tmp_path / "c.parquet", range(6), ("ant", "bee"))
    with pytest.raises(ValueError, match=r"c\.parquet has label 2, and its metadata name 2 classes"):
        build(few)
    no_parquet = tmp_path / "d.parquet"
    no_parquet.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ValueError, match=r"d\.parquet is no parquet file, damaged or cut short"):
        build(no_parquet)
    unlabelled = hugging_face(tmp_path / "e.parquet", range(6), label=pa.array([-1, 0, 1, 2, 0, 1]))
    with pytest.raises(ValueError, match=r"some samples have a label and others none, in .*e\.parquet \(1 of 6\)"):
        build(unlabelled)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"read by pyarrow, which is not installed .*pip install pyarrow"):
        build(pattern)


def test_bad_samples_and_changed_files_are_named(tmp_path: Path) -> None:
    untold = pa.array([["x"], [], None, ["y"], [""], ["z"]], type=pa.list_(pa.string()))
    path = hugging_face(tmp_path / "x.parquet", range(6), caption=untold)
    train, _ = build(path, text=TEXT)
    assert train.captions is not None
    for number in (1, 2, 4):
        with pytest.raises(UnreadableImageError, match=rf"x\.parquet, sample {number}\.png has no caption"):
            train.captions.every(number, 0, Look())
    kept = path.read_bytes()
    path.write_bytes(kept[:-20] + b"\7" * 20)  # while it is trained on
    with pytest.raises(UnreadableImageError, match=r"x\.parquet, sample 3\.png cannot be read: .*x\.parquet is"):
        build_open(train, 3)
    with pytest.raises(ValueError, match=r"1 shards have changed .*x\.parquet \(other bytes"):
        build(path)


def build_open(dataset: WebDataset, index: int) -> None:
    """Read by a process that has not opened the file yet."""
    store_of(dataset.store.catalogue, dataset.store.form).image(dataset.places(np.array([index]))[0])


def test_the_tool_indexes_checks_counts_and_packs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = files(tmp_path)
    assert main(["index", pattern, "--workers", "2"]) == 0 and main(["check", pattern, "--workers", "1"]) == 0
    assert "12 images in 2 shards, 0 faults" in capsys.readouterr().out
    assert main(["stats", pattern]) == 0
    assert "with a caption 12, with a label 12\n3 classes" in capsys.readouterr().out
    assert main(["pack", pattern, str(tmp_path / "tars"), "--images-per-shard", "7", "--workers", "1"]) == 0
    config = DataConfig(kind="webdataset", path=f"{tmp_path}/tars/{{000000..000001}}.tar")
    packed, _ = build_datasets(config, image_size=(6, 9), channels=3, num_classes=3, seed=0, text=TEXT)
    ours, _ = build(pattern, val_path=None, text=TEXT)
    assert packed.class_names == NAMES and torch.equal(packed.read(np.arange(9)), ours.read(np.arange(9)))
    assert packed.labels.tolist() == ours.labels.tolist()
    assert packed.captions is not None and packed.captions.every(0, 0, Look())[1] == "so it is"
    other = hugging_face(tmp_path / "o.parquet", range(3), negative=pa.array([picture(255 - n) for n in range(3)]))
    assert build(other)[0].fingerprint != build(other, image_column="negative")[0].fingerprint
    assert main(["pack", str(other), str(tmp_path / "one"), "--workers", "1"]) == 0
    with pytest.raises(ValueError, match=r"one holds shards that were packed otherwise \(source "):
        main(["pack", str(other), str(tmp_path / "one"), "--workers", "1", "--image-column", "negative"])
    bad = hugging_face(tmp_path / "bad.parquet", range(3), image=pa.array([picture(0), b"no image", picture(2)]))
    assert main(["check", str(bad), "--workers", "1"]) == 1
    assert "bad.parquet, sample row 1 cannot be decoded" in capsys.readouterr().out
