"""Tables of images and captions."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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

TEXT = TextShape(length=48, vocabulary_size=259)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten images of their own grey value, in two folders."""
    for i in range(10):
        folder = tmp_path / ("one" if i < 5 else "two words")
        folder.mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 20 * i, dtype=np.uint8)).save(folder / f"{i}.png")
    return tmp_path


def path_of(i: int) -> str:
    return f"{'one' if i < 5 else 'two words'}/{i}.png"


def rows(count: int = 10) -> str:
    return "image,caption\n" + "".join(f"{path_of(i)},picture {i}\n" for i in range(count))


def build(table: Path, *, num_classes: int | None = None, **options: Any) -> tuple[Dataset, Dataset]:
    config = DataConfig(kind="image_text", path=str(table), **options)
    return build_datasets(config, image_size=8, channels=1, num_classes=num_classes, seed=0, text=TEXT)


def write(folder: Path, text: str, name: str = "pairs.csv", encoding: str = "utf-8") -> Path:
    file = folder / name
    file.write_bytes(text.encode(encoding))
    return file


def captions(dataset: Dataset) -> list[tuple[int, ...]]:
    """Of each image, the grey value that shows which it is, and all that is said of it."""
    assert dataset.captions is not None
    greys = (dataset.read(np.arange(len(dataset))).mean((1, 2, 3)) * 255 / 20).round().int().tolist()
    return [(grey, *dataset.captions.every(i, 0, None)) for i, grey in enumerate(greys)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding"),
    [("p.csv", ",", "utf-8"), ("p.tsv", "\t", "utf-8-sig"), ("p.csv", "\t", "utf-16"), ("p.txt", ";", "utf-8")],
)
def test_each_image_has_its_captions(pictures: Path, name: str, delimiter: str, encoding: str) -> None:
    said = ['a "quoted" thing', "one, two; three\tfour", "two\nlines", "déjà vu", "  in spaces "]
    lines = [delimiter.join(("id", "caption", " image "))]
    for i in range(10):
        quoted = said[i % 5].replace('"', '""')
        lines += [f'{i}{delimiter}"{quoted}"{delimiter}{path_of(i)}']
    lines += ["", f'x{delimiter}another{delimiter}"{path_of(3)}"']
    train, held_out = build(write(pictures, "\r\n".join(lines), name, encoding))
    assert (len(train), len(held_out)) == (8, 2)
    found = sorted(captions(train) + captions(held_out))
    expected = [(i, said[i % 5].strip()) + (("another",) if i == 3 else ()) for i in range(10)]
    assert found == expected
    assert train.source == held_out.source == f"10 images with 11 captions in {pictures}; left out: nothing"
    with pytest.raises(ValueError, match="no classes to name"):
        prompts(train)


def test_training_sees_every_caption_evaluation_the_first(pictures: Path) -> None:
    table = write(pictures, rows(5) + "".join(f"{path_of(i)},again {i}\n" for i in range(5)))
    train, held_out = build(table, val_path=str(table))
    config = DataConfig()
    stream = TrainStream(
        train, config=config, global_batch_size=5, micro_batch_size=5, data_rank=0, data_size=1, seed=0
    )
    steps = stream.steps(0)
    seen = set()
    for _ in range(12):
        batch = next(steps)[0]
        assert batch.texts is not None and batch.images is not None
        greys = (batch.images.mean((1, 2, 3)) * 0.5 + 0.5) * 255 / 20
        for text, grey, label in zip(batch.texts.tolist(), greys.round().int().tolist(), batch.labels, strict=True):
            said = bytes(token for token in text if token < 256).decode()
            assert said in (f"picture {grey}", f"again {grey}") and label == grey
            seen.add(said)
    assert len(seen) == 10
    batch = next(iter(EvalStream(held_out, config=config, micro_batch_size=5, data_rank=0, data_size=1)))
    assert batch.texts is not None
    assert [bytes(t for t in text if t < 256).decode() for text in batch.texts.tolist()] == [
        f"picture {i}" for i in range(5)
    ]


def test_an_image_may_come_several_times_in_a_row_with_other_captions(pictures: Path) -> None:
    lines = [f"{path_of(i)},{i}{said}" for i in range(10) for said in "abcde"[: 2 + i % 4]]
    train, _ = build(write(pictures, "image,caption\n" + "\n".join(lines)))

    def rows(data_size: int, micro: int) -> list[tuple[int, str]]:
        """(image, caption) of each draw of twelve steps of 12 rows, in order."""
        assert train.texts is not None
        streams = [
            TrainStream(
                train, config=DataConfig(kind="image_text", path="x", repeats=4), global_batch_size=12,
                micro_batch_size=micro, data_rank=rank, data_size=data_size, seed=3,
            ).steps(0)
            for rank in range(data_size)
        ]  # fmt: skip
        found = []
        for _ in range(12):
            for batch in (batch for stream in streams for batch in next(stream)):
                said = ["".join(chr(token) for token in text if token < 256) for text in batch.texts.tolist()]
                image_of = dict(zip(batch.indices.tolist(), (text[0] for text in said), strict=True))
                assert [image_of[index] for index in batch.indices.tolist()] == [text[0] for text in said]
                found += [(int(text[0]), text[1]) for text in said]
        return found

    alone = rows(1, 12)
    assert rows(2, 2) == alone  # an image's rows lie on both ranks
    groups = [alone[i : i + 4] for i in range(0, len(alone), 4)]
    assert len({group[0][0] for group in groups[:8]}) == 8  # an epoch
    for group in groups:
        (image,), said = {image for image, _ in group}, [caption for _, caption in group]
        assert len(set(said)) == min(4, 2 + image % 4)
    assert len({tuple(said for _, said in group) for group in groups if group[0][0] % 4 == 3}) > 1


def test_bad_rows_are_left_out_counted_and_named(pictures: Path) -> None:
    text = rows() + "one/1.png\nnowhere/9.png,gone\nnowhere/9.png,gone too\n,no image\none/2.png, \none/3.png,a,b\n"
    table = write(pictures, text)
    with table.open("ab") as file:
        file.write(b'one/4.png,caf\xe9\none/4.png,"a"b\none/4.png,a\x00b\nnow\x00here,zero\none/0.png,"never closed\n')
    train, held_out = build(table)
    assert len(train) + len(held_out) == 10
    assert train.source is not None and train.source.startswith(f"10 images with 11 captions in {pictures}; left out: ")
    for reason in (
        "2 rows of another length than the first (the first: line 12, 1 columns, not 2)",
        "3 rows of images that are missing (the first: line 13, nowhere/9.png)",
        "1 rows without image (the first: line 15)",
        "1 rows without caption (the first: line 16)",
        "1 rows that are not UTF-8 (the first: line 18)",
        "2 rows that are no CSV (the first: line 19, ',' expected after '\"')",
    ):
        assert reason in train.source, (reason, train.source)
    assert train.source in "\n".join(describe_datasets("image_text", train, held_out, None))


def test_an_image_that_vanishes_later_is_named(pictures: Path) -> None:
    train, _ = build(write(pictures, rows()))
    for i in range(10):
        (pictures / path_of(i)).unlink()
    with pytest.raises(ValueError, match=r"\d\.png cannot be decoded"):
        train.read(np.arange(3))


def test_a_column_of_labels_makes_classes(pictures: Path) -> None:
    table = write(pictures, "kind,image,text\n" + "".join(f"k{i % 2},{path_of(i)},a {i}\n" for i in range(10)))
    other = write(pictures, "kind,image,text\n" + f"k1,{path_of(0)},a\n", "other.csv")
    names = {"caption_column": "text", "label_column": "kind"}
    train, held_out = build(table, num_classes=2, **names)
    assert train.class_names == ("k0", "k1") and np.bincount(train.labels).tolist() == [4, 4]
    assert prompts(held_out)[1][:2] == ["k1", "a photo of k1"]
    assert build(table, val_path=str(other), **names)[1].labels.tolist() == [1]
    write(pictures, "kind,image,text\n" + f"k9,{path_of(0)},a\n", "other.csv")
    with pytest.raises(
        ValueError, match=r"data\.val_path=.*other\.csv has kind \['k9'\], which data\.path does not have"
    ):
        build(table, val_path=str(other), **names)
    with pytest.raises(ValueError, match=r"data\.kind=image_text has no classes, .* data\.label_column"):
        build(table, num_classes=2, caption_column="text")


def test_fingerprints_tell_captions_and_images_apart(pictures: Path) -> None:
    def both(text: str) -> tuple[str, str]:
        train, _ = build(write(pictures, text))
        return train.fingerprint, captions_fingerprint(train)

    images, said = both(rows())
    assert both(rows()) == (images, said)
    assert both(rows().replace("picture 3", "picture three"))[0] == images
    assert both(rows().replace("picture 3", "picture three"))[1] != said
    assert both(rows(9) + f"./{path_of(9)},picture 9\n")[0] != images
    assert both(rows() + f"{path_of(0)},once more\n")[1] != said


def rank(table: str, results: Any) -> None:
    config = DataConfig(kind="image_text", path=table)
    train, _ = build_datasets(config, image_size=8, channels=1, num_classes=None, seed=0, text=TEXT, readers=2)
    assert train.captions is not None
    pairs = train.listing  # type: ignore[attr-defined]
    results.put((captions_fingerprint(train), train.source, isinstance(pairs.said.base, np.memmap)))


def test_one_process_of_a_host_reads_the_table(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = pictures / "tmp"
    place.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(place))
    table = write(pictures, rows() + "x.png,missing\n")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [context.Process(target=rank, args=(str(table), results)) for _ in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert len({(said, source) for said, source, _ in found}) == 1 and "missing (the first: line 12" in found[0][1]
    assert sorted(mapped for *_, mapped in found) == [False, True] and not list(place.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"data\.path=.*pairs\.csv cannot be read \(.*No such file"),
        ("", r"has no column 'image' in its first row ''"),
        (
            "file,caption\n",
            r"has no column 'image' in its first row 'file,caption': name columns there, and say in",
        ),
        ("image,caption\n", r"has no row with a caption and an image that is there: left out were no rows"),
        ("image,caption\nx.png,a\n", r"left out were 1 rows of images that are missing \(the first: line 2, x\.png\)"),
        (rows(4), r"has 4 images with captions, too few to hold out one in 5"),
    ],
)
def test_bad_tables_are_refused(pictures: Path, text: str | None, message: str) -> None:
    table = pictures / "pairs.csv"
    if text is not None:
        table.write_text(text)
    with pytest.raises(ValueError, match=message):
        build(table)


def test_a_folder_is_no_table(pictures: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: give the table itself"):
        build(pictures)


def test_keys_of_tables_alone() -> None:
    with pytest.raises(ValueError, match=r"data\.kind is image_text, but data\.path is not set: give the CSV or TSV"):
        DataConfig(kind="image_text")
    with pytest.raises(ValueError, match=r"data\.caption_column is 'x', but has no effect with data\.kind=digits"):
        DataConfig(caption_column="x")
    with pytest.raises(ValueError, match=r"data\.templates is 'x', but has no effect with data\.kind=image_text"):
        DataConfig(kind="image_text", path="x", templates="x")
