"""Tar files are indexed ahead, checked and counted."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataConfig, Dataset, build_datasets
from data.sampling import SampleOrder
from tests.data.conftest import folder as folder
from tests.data.tars import picture, sample, shards, write_tar
from tools.prepare_data.__main__ import main
from tools.prepare_data.sources import key_of


def test_shards_are_indexed_in_parts_checked_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = shards(tmp_path)
    assert main(["index", pattern, "--part", "1/2", "--workers", "1"]) == 0
    assert "5 images in 1 shards" in capsys.readouterr().out
    assert [file.name for file in tmp_path.glob("*.index")] == ["01.tar.index"]
    assert main(["index", pattern, "--workers", "2"]) == 0
    assert "21 images in 3 shards" in (said := capsys.readouterr().out) and "2 indexed now" in said
    assert main(["check", pattern, "--workers", "1"]) == 0 and "3 shards, 0 faults" in capsys.readouterr().out
    assert main(["stats", pattern]) == 0
    said = capsys.readouterr().out
    assert "images per shard 5 to 9, 7 on average" in said and "with .txt 0, with .json 21, with a label 21" in said
    assert "3 classes, images of each:\n  0: 7\n" in said


def test_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "x.tar", [sample(0), ("a/7", {"jpg": picture(3, "jpg")[:100]})])
    assert main(["check", str(path)]) == 1
    assert "sample a/7 cannot be decoded" in (said := capsys.readouterr().out) and "1 faults" in said
    write_tar(path, [sample(0), sample(1)])
    with pytest.raises(ValueError, match=r"1 shards have changed .* index --again"):
        main(["index", str(path)])
    assert main(["index", str(path), "--again"]) == 0 and main(["check", str(path)]) == 0
    index = tmp_path / "x.tar.index"
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    capsys.readouterr()
    assert main(["check", str(path)]) == 1 and "in 1 shards, 1 faults" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"too few shards for part 3 of 4"):
        main(["index", str(path), "--part", "3/4"])


def test_a_folder_is_packed_read_alike_and_gone_on_with(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "classes.txt").touch()  # as another task that has just begun leaves it
    packed, command = tmp_path / "packed", ["pack", str(folder), str(tmp_path / "packed"), "--images-per-shard", "5"]
    assert main([*command, "--part", "1/2", "--workers", "1"]) == 0
    assert (
        "2 shards written, 2 of 4 shards are there; the next that is missing is 000000.tar" in capsys.readouterr().out
    )
    kept = (packed / "000001.tar").stat().st_mtime_ns
    (packed / "000003.tar").write_bytes(b"cut short")
    assert main([*command, "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "3 shards written, 4 of 4 shards are there, with 18 images" in said
    assert (packed / "000001.tar").stat().st_mtime_ns == kept and not list(packed.glob(".*"))
    pattern = f"{packed}/{{000000..000003}}.tar"
    assert f"data.path: {pattern}" in said

    def sets(kind: Any, path: object) -> tuple[Dataset, Dataset]:
        config = DataConfig(kind=kind, path=str(path), val_path=str(path))
        return build_datasets(config, image_size=8, channels=3, num_classes=3, seed=0)

    ours, theirs = sets("webdataset", pattern)[0], sets("image_folder", folder)[0]
    everything = np.arange(18)
    assert ours.class_names == theirs.class_names == ("ant", "bee", "cat")
    assert torch.equal(ours.read(everything), theirs.read(everything))
    np.testing.assert_array_equal(ours.labels, theirs.labels)

    again = tmp_path / "again"  # cut and ordered anew
    assert main(["pack", pattern, str(again), "--images-per-shard", "18", "--shuffle", "3", "--workers", "1"]) == 0
    order = SampleOrder(18, 3).indices(everything)
    shuffled = sets("webdataset", again / "000000.tar")[0]
    assert shuffled.class_names == ours.class_names
    assert torch.equal(shuffled.read(everything), theirs.read(order))
    bad = write_tar(tmp_path / "bad.tar", [("a/7", {"jpg": b"no image"})])
    with pytest.raises(ValueError, match=r"bad\.tar, sample a/7 is no image that can be read"):
        main(["pack", str(bad), str(tmp_path / "of bad"), "--workers", "1"])
    with pytest.raises(ValueError, match=r"packed otherwise \(images_per_shard 5 there, 6 now\): give another folder"):
        main(["pack", str(folder), str(packed), "--images-per-shard", "6"])
    with pytest.raises(ValueError, match="is not empty, and nothing was packed there"):
        main(["pack", str(folder), str(folder / "ant")])


def test_a_key_fits_into_a_tar_file() -> None:
    assert key_of(7, "a.b c-" + "ж" * 99) == "000000007_a_b_c-" + "_" * 54


def test_a_table_is_packed_with_its_captions_and_smaller_images(folder: Path, tmp_path: Path) -> None:
    rows = ["ant/0.png,one,a", "bee/1.png,two,b", "ant/0.png,three,a"]
    (folder / "x.csv").write_text("\n".join(["image,caption,kind", *rows]))
    command = ["pack", str(folder / "x.csv"), str(tmp_path / "t"), "--label-column", "kind", "--shorter-side", "10"]
    assert main([*command, "--workers", "1"]) == 0
    with tarfile.open(tmp_path / "t" / "000000.tar") as archive:
        parts = {name.partition(".")[2]: archive.extractfile(name) for name in archive.getnames()[:3]}
        assert archive.getnames()[3:] == ["000000001_1.jpg", "000000001_1.cls", "000000001_1.txt"]
        assert parts["cls"] and parts["cls"].read() == b"0"
        assert parts["json"] and json.load(parts["json"]) == {"caption": ["one", "three"]}
        assert parts["jpg"] and min(Image.open(parts["jpg"]).size) == 10
