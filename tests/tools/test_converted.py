"""A checkpoint of weights alone, as a conversion writes it, given where those of runs are: it works, or is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from model import ImageText, ModelConfig, TextConfig, VisionTransformer
from model.formats.api import open_weights, save_weights
from model.formats.base import Preprocessing
from model.formats.pairs import TAUGHT_BY
from parallel.checkpoint.manifest import read_manifest
from parallel.checkpoint.place import newest
from parallel.checkpoint.read import Reader
from parallel.process_group import World
from tests.engine.run.forked import running
from tests.engine.small import MODEL, flags
from tests.tools.jobs import run_jobs
from tools.convert.reshard import reshard
from tools.inspect_checkpoint.__main__ import main as inspect
from tools.rerun_step import main as rerun

VIT = MODEL | {"position": "learned_1d", "pool": "cls", "block": "sequential", "width": 32, "num_classes": 400}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`hf`, of transformers; `ours`, of it; and that once more where a run has its checkpoints."""
    path = tmp_path_factory.mktemp("converted")
    model = VisionTransformer(ModelConfig(**VIT), seed=3)
    model.save_pretrained(path / "hf", "hf_vit", preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)))
    for to in ("ours", "run/checkpoints/step-00000000"):
        with open_weights(path / "hf") as weights:
            weights.description = replace(weights.description, labels=tuple(f"class {i}" for i in range(400)))
            save_weights(weights, path / to)
    return path


def command(folder: Path, **changes: str) -> list[str]:
    given = {f"model__{key}": str(value) for key, value in VIT.items()} | {"optimizer__ema_decay": "0.9"}
    return flags(**given | changes)


def test_a_run_starts_from_it(folder: Path, tmp_path: Path) -> None:
    """As from the other library's, and what it tells is where it came from."""
    ends = []
    for name in ("hf", "ours"):
        argv = command(folder, run_dir=str(tmp_path / name), checkpoint__load=str(folder / name))
        with running(tmp_path / f"t {name}", 2, argv) as run:
            assert run.codes() == [0, 0], run.said()
            said = run.said(0)
        assert "data.std [0.25] -> [0.5]" in said and "taken: 56 tensor(s)" in said
        assert f"weights from {folder / name} ({'hf_vit' if name == 'hf' else 'step 0, converted from hf_vit'})" in said
        with Reader(tmp_path / name / "checkpoints/step-00000001") as reader:
            ends.append({key: reader.whole(key) for key in reader.manifest.tensors})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_no_run_goes_on_from_it(folder: Path, tmp_path: Path) -> None:
    run_dir = folder / "run"
    before = sorted(run_dir.rglob("*"))
    for number, (changes, why) in enumerate(
        [
            ({"run_dir": str(run_dir)}, "has weights alone"),
            ({"checkpoint__resume": "must", "run_dir": str(run_dir)}, "has weights alone"),
            ({"checkpoint__dir": str(folder / "ours"), "run_dir": str(tmp_path / "r")}, "is one checkpoint"),
        ]
    ):
        with running(tmp_path / f"{number}", 2, command(folder, **changes)) as run:
            assert run.codes() == [2, 2], run.said()
            assert why in run.said() and "checkpoint.load" in run.said()
    assert set(run_dir.rglob("step-*")) == {p for p in before if p.name.startswith("step-")}


def test_no_step_of_it_is_run_again(folder: Path) -> None:
    for path in (folder / "ours", folder / "run"):
        with pytest.raises(ConfigError, match="has weights alone"):
            rerun([str(path)], World())


def test_it_is_shown(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect([str(folder / "ours"), "--norms", "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "every checksum is right" in shown and "converted_from" in shown and "hf_vit" in shown
    assert max(map(len, shown.splitlines())) < 700  # though there are 400 names of classes
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["about"]["labels"][399] == "class 399"
    assert inspect([str(folder / "ours"), str(folder / "run")]) == 0


def test_it_is_cut_for_a_layout(folder: Path, tmp_path: Path) -> None:
    path = reshard(folder / "ours", tmp_path / "cut", "tensor=2 data=2 zero=3", (), lambda line: None)
    with open_weights(folder / "ours") as one, open_weights(path) as other:
        assert one.description == other.description and one.tensors == other.tensors
        assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)


def test_both_towers(tmp_path: Path) -> None:
    """Of CLIP: a run goes on from what is converted, whose configuration comes with it, and from theirs alike; what it
    evaluates at weights that have hardly moved is what tools.evaluate finds; it is cut for a layout, shown, and alone.
    """
    image = ModelConfig(
        image_size=8, patch_size=2, in_channels=1, width=32, depth=2, num_heads=4, norm_eps=1e-5, pre_norm=True,
        patch_bias=False, pool="cls", position="learned_1d",
    )  # fmt: skip
    text = TextConfig(width=32, depth=2, num_heads=4, context_length=24)
    model = ImageText(image, text, embedding=12, seed=5)
    model.save_pretrained(tmp_path / "clip", "hf_clip_vision", preprocessing=Preprocessing(mean=(0.3,), std=(0.4,)))
    with open_weights(tmp_path / "clip", whole=True) as weights:
        save_weights(weights, tmp_path / "ours")
    keys = ["--config", str(tmp_path / "ours" / "config.yaml"), "--data.kind", "digits", "--train.steps", "1"]
    keys += ["--train.global_batch_size", "16", "--optimizer.lr", "1e-12", "--log.tensorboard", "false"]
    jobs: dict[str, tuple[str, int, list[str]]] = {}
    for name in ("ours", "clip"):
        more = ["--checkpoint.load", str(tmp_path / name), "--run_dir", str(tmp_path / f"run {name}")]
        jobs[name] = "pretrain_vit", 2, [*keys, *more]
    for task in ("zero_shot", "retrieval"):
        argv = ["--checkpoint", str(tmp_path / "ours"), "--task", task, "--data.kind", "digits"]
        jobs[task] = "tools.evaluate.__main__", 1, [*argv, "--json", str(tmp_path / f"{task}.json")]
    codes = run_jobs(tmp_path, jobs, timeout=120)
    assert codes == {name: [0] * size for name, (_, size, _) in jobs.items()}, [
        (tmp_path / f"{name}.txt").read_text() for name in jobs
    ]
    found = {}
    for name in ("ours", "clip"):
        said = (tmp_path / f"{name}.txt").read_text()
        assert "taken: " in said and not any(word in said for word in ("  new: ", "left out", "resized", "other than"))
        lines = [json.loads(line) for line in (tmp_path / f"run {name}" / "metrics.jsonl").read_text().splitlines()]
        found[name] = next(line for line in lines if line["event"] == "eval")
    evaluated = {task: json.loads((tmp_path / f"{task}.json").read_text()) for task in ("zero_shot", "retrieval")}
    for key in ("loss", "zero_shot_accuracy", "recall_image_to_text@1", "recall_text_to_image@1"):
        assert found["ours"][key] == found["clip"][key], key
    assert found["ours"]["zero_shot_accuracy"] == pytest.approx(evaluated["zero_shot"]["accuracy"])
    assert found["ours"]["logit_scale"] == pytest.approx(1 / 0.07)
    with open_weights(tmp_path / "run ours", whole=True) as weights:
        save_weights(weights, tmp_path / "kept")
    kept, was = (read_manifest(newest(tmp_path / name)).config["contrastive"] for name in ("kept", "run ours"))
    without = {"passes", "teacher", *TAUGHT_BY}
    assert kept == {key: value for key, value in was.items() if key not in without}, "how it was trained is not lost"
    assert inspect([str(tmp_path / "ours")]) == 0
    cut = reshard(tmp_path / "ours", tmp_path / "cut", "tensor=2", (), lambda line: None)
    for whole in (False, True):
        with open_weights(tmp_path / "ours", whole=whole) as one, open_weights(cut, whole=whole) as other:
            assert one.description == other.description and one.tensors == other.tensors
            assert all(torch.equal(one.read(name), other.read(name)) for name in one.tensors)
    alone = command(tmp_path, run_dir=str(tmp_path / "alone"), checkpoint__load=str(tmp_path / "run ours"))
    alone += [
        "--model.pre_norm",
        "true",
        "--model.patch_bias",
        "false",
        "--model.patch_size",
        "2",
        "--model.depth",
        "2",
    ]
    with running(tmp_path / "t", 1, alone) as run:  # a supervised run takes the image tower
        assert run.codes() == [0], run.said()
        assert "taken: 31 tensor(s)" in run.said() and "new: 2 tensor(s): head.fc.weight" in run.said(), run.said()
