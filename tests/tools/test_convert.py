"""tools.convert on the command line: what it prints, what it refuses, and that a conversion is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data import DataConfig, build_datasets
from engine.config.cli import ConfigError
from model import ModelConfig, VisionTransformer
from model.formats import api
from model.formats.api import open_weights
from model.formats.base import ConversionError, Preprocessing
from model.formats.checkpoint import description_of
from tools.convert import verify
from tools.convert.__main__ import main
from tools.convert.images import prepared
from tools.convert.report import unsaid

CONFIG = ModelConfig(
    width=16, depth=2, num_heads=2, mlp_dim=24, image_size=(8, 16), patch_size=4, num_classes=3, pool="cls",
    position="learned_1d",
)  # fmt: skip
PREPROCESSING = Preprocessing(mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), interpolation="bilinear", crop_fraction=0.5)


@pytest.fixture
def model(tmp_path: Path) -> VisionTransformer:
    """Saved at tmp_path / ours, and as a ViT of transformers at tmp_path / theirs."""
    model = VisionTransformer(CONFIG, seed=1)
    for i, p in enumerate(model.parameters()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(i))
    model.save_pretrained(tmp_path / "ours", preprocessing=PREPROCESSING)
    model.save_pretrained(tmp_path / "theirs", "hf_vit", preprocessing=PREPROCESSING)
    return model


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def test_there_and_back(model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--to", "vitruvius", tmp_path / "theirs", tmp_path / "back", "--verify") == 0
    told = capsys.readouterr().out
    assert "(hf_vit)" in told and "mean 0.4, 0.5, 0.6" in told and "equal but for rounding" in told
    again = VisionTransformer.from_pretrained(tmp_path / "back")
    assert again.config == model.config and again.preprocessing == PREPROCESSING
    for name, weight in model.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name
    assert run("--to", "hf_vit", "--from", "vitruvius", tmp_path / "back", tmp_path / "there") == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "there"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("way", ["centre", "timm", "big_vision", "big_vision_resize"])
def test_images_are_those_that_a_run_evaluates_and_are_said_so_to_others(
    way: str, model: VisionTransformer, tmp_path: Path
) -> None:
    photo = tmp_path / "photos" / "a" / "x.png"
    photo.parent.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 50, 3), np.uint8)).save(photo)
    part = {"crop_pct": 0.5} if way in ("timm", "big_vision") else {}
    data: Any = {"eval_transform": way, "mean": (0.4, 0.5, 0.6), "std": (0.25,)} | part
    config = DataConfig(kind="image_folder", path=str(tmp_path / "photos"), val_path=str(tmp_path / "photos"), **data)
    pixels = build_datasets(config, image_size=(8, 16), channels=3, num_classes=1, seed=0)[1].read(np.array([0]))[0]
    saved: Any = SimpleNamespace(config={"model": asdict(CONFIG), "data": asdict(config)}, about={})
    how = description_of(saved, tmp_path).preprocessing
    assert how is not None
    assert torch.equal(prepared(photo, 3, (8, 16), how), (pixels - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / 0.25)
    for kind in ("timm", "hf_vit", "vitruvius"):
        model.save_pretrained(tmp_path / kind, kind, preprocessing=replace(how, std=(0.25,) * 3))
        again = VisionTransformer.from_pretrained(tmp_path / kind).preprocessing
        assert again == replace(how, std=(0.25,) * 3, antialias=how.antialias or kind != "vitruvius"), kind
        with open_weights(tmp_path / "vitruvius" if kind == "vitruvius" else tmp_path / "ours") as weights:
            weights.description = replace(weights.description, preprocessing=how)
            said = list(unsaid(weights, kind))
        assert bool(said) == (way == "big_vision_resize" and kind != "vitruvius")


def test_dtype(model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--to", "hf_vit", "--dtype", "bf16", "--verify", tmp_path / "ours", tmp_path / "small") == 0
    assert "in bf16" in capsys.readouterr().out
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["classifier.weight"], model.get_parameter("head.fc.weight").bfloat16())


def test_verify_tells_of_a_difference(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def off(path: Path, kind: str, images: torch.Tensor) -> verify.Outputs:
        found = right(path, kind, images)
        return found if kind == "hf_vit" else found._replace(logits=found.logits + 2e-4)

    right = verify.outputs
    monkeypatch.setattr(verify, "outputs", off)
    assert run("--to", "vitruvius", tmp_path / "theirs", tmp_path / "back", "--verify") == 1
    assert "more than 0.0001" in capsys.readouterr().out


def keep_first(folder: Path, keys: int) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensors[name] for name in sorted(tensors)[:keys]}, folder / "model.safetensors")


def rewrite(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def plant(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"planted": torch.ones(2)}, folder / "model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], object], list[str], str]] = {
    "no kind": (lambda p: None, ["theirs", "new"], "--to is missing"),
    "unknown kind": (lambda p: None, ["--to", "keras", "theirs", "new"], "'keras' is unknown"),
    "another kind": (lambda p: None, ["--to", "hf_vit", "--from", "hf_vit", "ours", "new"], "is of kind vitruvius"),
    "no such source": (lambda p: None, ["--to", "hf_vit", "none", "new"], "none does not exist"),
    "taken": (lambda p: None, ["--to", "hf_vit", "ours", "theirs"], "theirs exists: give another place"),
    "no average": (lambda p: None, ["--to", "hf_vit", "--weights", "ema", "ours", "new"], "no moving average"),
    "their average": (lambda p: None, ["--to", "vitruvius", "--weights", "ema", "theirs", "new"], "no checkpoint of"),
    "unknown flag": (lambda p: None, ["--to", "hf_vit", "ours", "new", "--optimizer.lr", "1"], "--optimizer.lr is no"),
    "no place for figures": (
        lambda p: None,
        ["--to", "hf_vit", "ours", "new", "--json", "none/figures.json"],
        "--json none/figures.json cannot be written",
    ),
    "below a file": (
        lambda p: None,
        ["--to", "hf_vit", "ours", "ours/manifest.json/x"],
        "cannot be written",
    ),
    "a long name": (lambda p: None, ["--to", "hf_vit", "ours", "x" * 252], "cannot be written: File name too long"),
    "no such config": (
        lambda p: None,
        ["--to", "vitruvius", "theirs", "new", "--source_config", "none.json"],
        "none.json cannot be read",
    ),
    "figures of a reshard": (
        lambda p: None,
        ["--reshard", "data=2", "--json", "x", "ours", "new"],
        "--json and --reshard",
    ),
    "sizes of no sense": (
        lambda p: rewrite(p / "theirs", image_size=float("inf")),
        ["--to", "vitruvius", "theirs", "new"],
        "does not describe",
    ),
    "other heads": (
        lambda p: None,
        ["--to", "vitruvius", "theirs", "new", "--model.num_heads", "4"],
        "model.num_heads is 2, not 4",
    ),
    "missing": (lambda p: keep_first(p / "theirs", 30), ["--to", "vitruvius", "theirs", "new"], "missing, it should"),
    "surplus": (lambda p: plant(p / "theirs"), ["--to", "vitruvius", "theirs", "new"], "planted [2]: of no use"),
    "other shapes": (
        lambda p: rewrite(p / "theirs", intermediate_size=32),
        ["--to", "vitruvius", "theirs", "new"],
        "it should be [32, 16]",
    ),
    "torn": (
        lambda p: os.truncate(p / "theirs" / "model.safetensors", 9000),
        ["--to", "vitruvius", "theirs", "new"],
        "is no whole safetensors file",
    ),
    "damaged": (
        lambda p: flip(p / "ours" / "weights-00000.safetensors"),
        ["--to", "hf_vit", "ours", "new"],
        "checksum",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, arguments, expected = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    spoil(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises((ConversionError, ConfigError)) as refused:
        run(*arguments)
    assert expected in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_keys_may_stand_before_the_paths(model: VisionTransformer, tmp_path: Path) -> None:
    """Their values are not taken for SRC."""
    arguments = ("--to", "timm", "--model.num_heads", "2", "--model.depth=2", tmp_path / "ours", tmp_path / "new")
    assert run(*arguments) == 0


def test_two_at_one_place(model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused, and what the first has written is whole; what one that was killed has left is removed."""
    (tmp_path / "new.writing").mkdir()
    (tmp_path / "new.writing" / "half").write_text("of one that was killed")

    def write(*arguments: object, write: Callable[..., object] = api.write_shards) -> None:
        write(*arguments)
        with pytest.raises(ConversionError, match="is being written by another"):
            model.save_pretrained(tmp_path / "new", "big_vision")

    monkeypatch.setattr(api, "write_shards", write)
    assert run("--to", "hf_vit", tmp_path / "ours", tmp_path / "new") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "ours", "theirs"]
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]


def test_numbers_that_a_dtype_has_not(model: VisionTransformer, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_parameter("head.fc.bias")[1] = 70_000.0
    for kind in ("vitruvius", "hf_vit"):
        with pytest.raises(ConversionError, match=r"bias has numbers up to 7e\+04, beyond the 6.55e\+04 of float16"):
            model.save_pretrained(tmp_path / "small", kind, dtype=torch.float16)
    model.save_pretrained(tmp_path / "small", "hf_vit", dtype=torch.bfloat16)


def test_what_the_other_library_does_not_run_is_told(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, images: torch.Tensor) -> verify.Outputs:
        raise RuntimeError("size mismatch")

    monkeypatch.setitem(verify.RUNNERS, "hf_vit", refuse)
    assert run("--to", "hf_vit", tmp_path / "ours", tmp_path / "new", "--verify") == 1
    assert "does not run it: size mismatch" in capsys.readouterr().out


def test_a_run_knows_its_classes(model: VisionTransformer, tmp_path: Path) -> None:
    """By the file that it writes beside its checkpoints."""
    step = tmp_path / "run" / "checkpoints" / "step-00000007"
    model.save_pretrained(step)
    (tmp_path / "run" / "classes.json").write_text(json.dumps(["cat", "dog", "tree"]))
    assert run("--to", "hf_vit", tmp_path / "run", tmp_path / "new") == 0
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "tree"}


def test_what_may_be_left_out_is_named(
    model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "theirs")
    assert run("--to", "vitruvius", tmp_path / "theirs", tmp_path / "new", "--leave_out", "plant*") == 0
    assert "left out  1 tensor(s): planted" in capsys.readouterr().out
