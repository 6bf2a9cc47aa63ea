"""Sources of several kinds as one set: samples, labels, captions, order, what is refused."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DataConfig, Dataset, TextShape, build_datasets
from data.captions import Look
from data.mixing import sample_order
from data.source_names import Source, sources_of
from tests.data.tars import picture, sample, write_tar
from tests.data.test_parquet import hugging_face

TEXT = TextShape(length=20, vocabulary_size=259, end_token=257)


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, str]:
    """Greys 0 to 5 in folders ant and bee, 10 to 14 in a table, 20 to 25 in a tar file, 30 to 36 in parquet."""
    for number in range(6):
        file = tmp_path / "photos" / ("ant" if number < 3 else "bee") / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    for number in range(10, 15):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    rows = [f"{number}.png,said of {number},{'cat' if number % 2 else 'ant'}" for number in range(10, 15)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption,kind", *rows]))
    tar = write_tar(tmp_path / "x.tar", [sample(n, txt=f"told of {n}", cls="dog") for n in range(20, 26)])
    parquet = hugging_face(tmp_path / "x.parquet", range(30, 37))
    return {
        "folder": f"folder:{tmp_path}/photos", "table": f"table:{tmp_path}/pairs.csv", "tar": f"tar:{tar}",
        "parquet": f"parquet:{parquet}",
    }  # fmt: skip


def build(path: str, num_classes: int | None = None, text: TextShape | None = None, **keys: Any) -> list[Dataset]:
    config = DataConfig(path=path, **({"kind": "webdataset"} | keys))
    return list(build_datasets(config, image_size=(6, 9), channels=3, num_classes=num_classes, seed=0, text=text))


def greys(dataset: Dataset) -> list[int]:
    return (dataset.read(np.arange(len(dataset)))[:, 0, 0, 0] * 255).round().int().tolist()


def test_images_and_captions_are_those_of_the_sources(sources: dict[str, str]) -> None:
    path = "::".join(sources.values())
    train, held_out = build(path, text=TEXT, val_path=path)
    numbers = [*range(6), *range(10, 15), *range(20, 26), *range(30, 37)]
    assert greys(train) == greys(held_out) == numbers and train.num_classes == 0  # the table has none
    assert train.labels_of(np.array([7, 3])).tolist() == [7, 3]
    shuffled = np.random.default_rng(0).permutation(len(numbers))
    assert torch.equal(train.read(shuffled), train.read(np.arange(len(numbers)))[torch.from_numpy(shuffled)])
    assert train.source_ends is not None and train.source_ends.tolist() == [6, 11, 17, 24]
    assert train.shard_ends is not None and train.shard_ends.tolist() == [6, 11, 17, 20, 23, 24]
    captions = train.captions
    assert captions is not None and captions.prompts() is None
    said = [captions.every(index, index, Look()) for index in (4, 6, 12, 18)]
    assert "bee" in said[0][0] and said[1:] == [["said of 10"], ["told of 21"], ["grey 31", "so it is"]]
    choices = np.array([0, 0.6], dtype=np.float32)
    assert captions.one(18, 18, Look(), choices) == "so it is" and "ant" in captions.one(0, 0, Look(), choices)
    assert train.source is not None and train.source.count("\n") == 3
    rest = build(path, text=TEXT, fold=2)
    assert sorted(greys(rest[0]) + greys(rest[1])) == numbers and 4 <= len(rest[1]) <= 5
    turned, _ = build("::".join(reversed(sources.values())), val_path=path)
    assert len({one.fingerprint for one in (train, *rest, turned)}) == 4


def test_classes_are_one_list_of_names(sources: dict[str, str]) -> None:
    path = "::".join(sources.values())
    named = path.replace("table:", "table(label=kind, caption=caption):")
    train, held_out = build(named, 4, TEXT, val_path=sources["folder"], kind="image_text")
    assert train.class_names == held_out.class_names == ("ant", "bee", "cat", "dog")
    assert train.labels.tolist() == [0] * 3 + [1] * 3 + [0, 2, 0, 2, 0] + [3] * 6 + [i % 3 for i in range(30, 37)]
    assert held_out.labels.tolist() == [0] * 3 + [1] * 3
    assert train.captions is not None and (found := train.captions.prompts()) is not None
    assert len(found) == 4 and "dog" in found[3][0]
    with pytest.raises(ValueError, match=r"val_path=.* has the classes \['dog'\], which data\.path does not have"):
        build(sources["folder"], 2, val_path=sources["tar"])
    with pytest.raises(ValueError, match=r"has no classes, but the objective needs some"):
        build(path, 4)


def test_numbers_are_labels_only_among_themselves(tmp_path: Path, sources: dict[str, str]) -> None:
    tar = write_tar(tmp_path / "n.tar", [sample(n, cls=n % 2) for n in range(6)])
    nameless = hugging_face(tmp_path / "n.parquet", range(6), None)
    train, _ = build(f"{tar}::parquet:{nameless}", 3)
    assert train.num_classes == 3 and train.class_names is None and set(train.labels.tolist()) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"have names and those of others are numbers: .*classes\.txt"):
        build(f"{tar}::{sources['folder']}", 3)


def test_shares_and_windows_are_of_sources_of_any_kind(sources: dict[str, str]) -> None:
    path, keys = f"{sources['folder']}::{sources['parquet']}", {"weights": (1.0, 3.0), "shuffle_window": 1}
    train, _ = build(path, val_path=path, **keys)
    drawn = sample_order(train, 3, DataConfig(kind="webdataset", path=path, **keys)).indices(np.arange(56)).tolist()
    second = [index - 6 for index in drawn if index >= 6]
    assert len(second) == 42 and all(sorted(second[at : at + 7]) == list(range(7)) for at in range(0, 42, 7))
    folders = f"{sources['folder'].removeprefix('folder:')}::{sources['folder']}"
    with pytest.raises(ValueError, match=r"in two sources: name each once"):
        build(folders, 2, kind="image_folder")
    with pytest.raises(ValueError, match=r"names .*photos/ant in two sources: name each once"):
        build(f"{sources['folder']}::{sources['folder']}/ant", 2)
    with pytest.raises(ValueError, match=r"data\.weights has 3 numbers, and data\.path=.* 2 sources"):
        build(path, weights=(1.0, 1.0, 1.0))


def test_a_shard_of_two_sources_is_refused_under_whatever_name(tmp_path: Path, sources: dict[str, str]) -> None:
    """Unless it is for other captions or labels. Copies of one are told."""
    tar, again = sources["tar"], tmp_path / "linked" / "y.tar"
    again.parent.mkdir()
    again.symlink_to(tmp_path / "x.tar")
    for other, message in (
        (f"tar:{again}", r"names .*y\.tar in two sources: name each once"),
        (f"{tmp_path}/*.tar", r"names .*x\.tar twice, the other time as .*x\.tar: name each shard once"),
    ):
        with pytest.raises(ValueError, match=message):
            build(f"{tar}::{sources['folder']}::{other}", 3)
    assert len(build(f"{tar}::tar(caption=other):{again}", val_path=tar)[0]) == 12
    with pytest.raises(ValueError, match=r"names .*x\.tar twice, the other time as .*y\.tar"):
        build(f"{tmp_path}/x.tar::{again}")
    again.unlink()
    again.write_bytes((tmp_path / "x.tar").read_bytes())
    line = build(f"{tmp_path}/x.tar::{again}", val_path=tar)[0].source
    assert line is not None and line.endswith(f"images come twice: {again} has the bytes of {tmp_path}/x.tar")


def test_sources_share_what_files_may_be_open(
    tmp_path: Path, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 64 files each store alone would keep 8 indexes and 4 shards; of 7 stores each keeps one of both."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64, 64))
    tars = [tmp_path / f"{number}.tar" for number in range(24)]
    for number, tar in enumerate(tars):
        write_tar(tar, [sample(number, cls="dog")])
    paths = [f"tar:{tmp_path}/{{{first}..{first + 3}}}.tar" for first in range(0, 24, 4)]
    path = "::".join([*paths, sources["folder"], sources["parquet"]])
    train, _ = build(path, 4, val_path=sources["folder"])
    assert greys(train)[:24] == list(range(24)) and set(train.labels.tolist()) == {0, 1, 2, 3}
    opened = [str(descriptor.resolve()) for descriptor in Path("/proc/self/fd").iterdir()]
    assert len([name for name in opened if name.startswith(str(tmp_path))]) <= 2 * 7


def test_how_sources_are_named(sources: dict[str, str]) -> None:
    assert sources_of("tar:a::b", "parquet", "data.path") == [Source("webdataset", "a"), Source("parquet", "b")]
    assert sources_of("s3:a", "webdataset", "data.path") == [Source("webdataset", "s3:a")]
    assert sources_of("table(label=a,image=b):c", "parquet", "data.path")[0].columns == {"label": "a", "image": "b"}
    for wrong in ("folder(label=a):b", "tar(image=a):b", "tar(label=):b", "tar(x=y):b"):
        with pytest.raises(ValueError, match=r"is not understood: a source of this kind takes"):
            sources_of(wrong, "webdataset", "data.path")
    for wrong in ("tar:", "a::"):
        with pytest.raises(ValueError, match=r"has a source without a path"):
            sources_of(wrong, "webdataset", "data.path")
    alone = build(sources["tar"], 1)[0]  # of data.kind itself, so nothing is joined
    assert type(alone).__name__ == "WebDataset"
    with pytest.raises(ValueError, match=r"data\.image_column is 'x', but has no effect with data\.kind=webdataset"):
        build(f"{sources['tar']}::{sources['folder']}", image_column="x")
    with pytest.raises(ValueError, match=r"data\.templates has no effect .* whose samples have captions"):
        build(f"{sources['tar']}::{sources['table']}", templates="x", text=TEXT)
