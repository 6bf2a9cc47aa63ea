"""`python -m tools.evaluate`: the same figures in every layout, those of the run itself among them; what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import DataConfig
from data.showing import showing_of
from engine.errors import ConfigError
from model import VisionTransformer
from model.formats.base import Preprocessing
from model.formats.shown import is_exact, shown_by
from parallel.process_group import World
from tests.engine.small import flags
from tests.tools.jobs import run_jobs
from tools.evaluate.__main__ import main
from tools.evaluate.options import parse_options
from tools.evaluate.source import sources_of
from tools.evaluate.stored import stored_keys

TRAINING, EVALUATION = "pretrain_vit", "tools.evaluate.__main__"
TRAIN = {
    "data__kind": "digits", "train__steps": "60", "train__global_batch_size": "64", "optimizer__lr": "0.003",
    "schedule__warmup_steps": "5", "model__patch_size": "2", "model__pool": "gap", "model__width": "32",
    "optimizer__ema_decay": "0.9", "model__drop_path": "0.1",
}  # fmt: skip
PAIRS = TRAIN | {
    "objective": "contrastive", "model__num_classes": "null", "text__width": "32", "text__depth": "2",
    "text__num_heads": "4", "text__context_length": "24", "contrastive__embedding": "24", "data__rotate": "20",
    "data__vary_held_out": "true", "train__steps": "120",
}  # fmt: skip
TASKS = {
    "supervised": [],
    "knn": ["--k", "1,20"],
    "probe": ["--l2-range", "1e-2,1e2", "--l2-count", "3", "--l2-finest", "1", "--lr", "0.1,1", "--weight-decay", "0",
              "--standardise"],
    "fewshot": ["--shots", "1,10", "--seeds", "0,1", "--l2", "1024"],
    "clustering": ["--starts", "5"],
    "zero_shot": [],
    "retrieval": [],
}  # fmt: skip
OF_IMAGES = ("supervised", "knn", "probe", "fewshot")
LAYOUTS = {
    "tensor x pipeline": ["--parallel.tensor_parallel_size", "2", "--parallel.pipeline_parallel_size", "2"],
    "data x context": ["--parallel.context_parallel_size", "2", "--parallel.zero_stage", "3"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The folder of a run of one process, and what each job has written as JSON."""
    folder = tmp_path_factory.mktemp("runs")
    jobs: dict[str, tuple[str, int, list[str]]] = {}
    for name, keys in (("run", TRAIN), ("pairs", PAIRS)):
        run = flags(run_dir=str(folder / name), **keys)
        i = run.index("--data.size")
        jobs[f"train {name}"] = TRAINING, 1, run[:i] + run[i + 2 :]

    def evaluate(name: str, size: int, task: str, *more: str, of: str = "run") -> None:
        argv = ["--checkpoint", str(folder / of), "--task", task, *TASKS[task], *more]
        jobs[name] = EVALUATION, size, [*argv, "--json", str(folder / f"{name}.json")]

    for task in OF_IMAGES:
        evaluate(task, 1, task)
    for task in ("supervised", "knn"):  # what is made of features is the same on any ranks, see engine/evaluation
        evaluate(f"{task} tensor x pipeline", 4, task, *LAYOUTS["tensor x pipeline"])
    evaluate("average", 1, "supervised", "--weights", "average")
    evaluate("knn data x context", 4, "knn", *LAYOUTS["data x context"], "--train.micro_batch_size", "10")
    evaluate("other images", 1, "knn", "--data.kind", "synthetic", "--data.size", "100")
    evaluate("zero_shot", 4, "zero_shot", *LAYOUTS["tensor x pipeline"], of="pairs")
    evaluate("retrieval", 1, "retrieval", of="pairs")
    evaluate("knn pairs, embedding", 2, "knn", "--features", "embedding", of="pairs")
    evaluate("knn pairs, pooled", 1, "knn", "--weights", "average", of="pairs")
    for size in (1, 2):
        evaluate(f"clustering {size}", size, "clustering", of="pairs")
    codes = run_jobs(folder, jobs, timeout=270)
    for name, of_ranks in codes.items():
        assert not any(of_ranks), (name, of_ranks, (folder / f"{name}.txt").read_text())
    written = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return written | {"folder": folder}


def line_of_run(folder: Path, run: str = "run") -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["event"] == "eval")


@pytest.mark.slow
def test_supervised_is_what_the_run_has_evaluated(found: dict[str, Any]) -> None:
    line = line_of_run(found["folder"])
    assert {key: found["supervised"][key] for key in ("loss", "accuracy", "images")} == {
        key: line[key] for key in ("loss", "accuracy", "images")
    }
    assert found["average"]["loss"] == line["ema_loss"] != line["loss"]
    assert found["average"]["accuracy"] == line["ema_accuracy"]
    layout = found["supervised tensor x pipeline"]
    assert layout["loss"] == pytest.approx(line["loss"], rel=1e-5)
    assert layout["accuracy"] == pytest.approx(line["accuracy"], abs=1.01 / line["images"])
    assert layout["layout"] == {"pipeline": 2, "data": 1, "context": 1, "tensor": 2} and layout["step"] == 60


@pytest.mark.slow
@pytest.mark.parametrize("task", OF_IMAGES)
def test_features_are_worth_something(found: dict[str, Any], task: str) -> None:
    one = found[task]
    assert one["images"] == 360 and one["train_images"] == 1437 and 0.4 < one["accuracy"] < 1.0
    if task == "probe":
        assert one["accuracy"] == one["lbfgs"]["accuracy"] and one["sgd"]["accuracy"] > 0.4
    if task == "fewshot":
        assert [fit["shots"] for fit in one["fits"]] == [1, 10] and len(one["fits"][0]["of_each_seed"]) == 2


@pytest.mark.slow
def test_neighbours_are_those_of_the_model_alone(found: dict[str, Any]) -> None:
    """Of features that the library's model makes of the digits, by plain products; on other ranks and batches, too."""
    from tools.evaluate.images import images_of
    from tools.evaluate.source import open_source, source_of

    path = found["folder"] / "run"
    weights = open_source(path, "weights", [])
    source = source_of(weights, [], World(), features=True)
    images = images_of(source.config, World(), None)
    weights.close()
    model = VisionTransformer.from_pretrained(path).eval()
    model.head.fc = None

    def features(dataset: Any) -> np.ndarray[Any, Any]:
        pixels = (dataset.read(np.arange(len(dataset))) - 0.5) / 0.5
        with torch.no_grad():
            out = model(pixels)
        return torch.nn.functional.normalize(out.double(), dim=1).numpy()

    nearest = (features(images.test) @ features(images.train).T).argmax(1)
    right = float((images.train.labels[nearest] == images.test.labels).mean())
    assert found["knn"]["votes"][0]["plain"] == pytest.approx(right, abs=1.01 / 360)
    for layout in LAYOUTS:  # features are others in their last bits: an image that is as near to two may turn over
        for ours, theirs in zip(found["knn"]["votes"], found[f"knn {layout}"]["votes"], strict=True):
            assert theirs == pytest.approx(ours, abs=1.01 / 360)
    other = found["other images"]
    assert (other["train_images"], other["images"], other["data"]) == (100, 25, "synthetic")


@pytest.mark.slow
def test_towers_by_themselves_do_what_the_run_has_seen(found: dict[str, Any]) -> None:
    """In other layouts; the run has embedded texts and images together, in one process."""
    line = line_of_run(found["folder"], "pairs")
    assert found["zero_shot"]["accuracy"] == pytest.approx(line["zero_shot_accuracy"], abs=1.01 / 360)
    recalls = found["retrieval"]
    for name in ("image_to_text", "text_to_image"):
        assert recalls[f"{name}_recall_at_1"] == pytest.approx(line[f"recall_{name}@1"], abs=1.01 / 360)
        assert recalls[f"{name}_recall_at_1"] < recalls[f"{name}_recall_at_5"] < recalls[f"{name}_recall_at_10"]
    assert recalls["different_texts"] > 10 and recalls["texts"] == 360
    for features in ("embedding", "pooled"):
        assert found[f"knn pairs, {features}"]["accuracy"] > 0.2  # of ten classes
    one, two = (found[f"clustering {size}"] for size in (1, 2))
    assert one["accuracy"] == pytest.approx(two["accuracy"], abs=2.01 / 360) and sorted(one["names"]) == [*range(10)]
    assert one["accuracy"] > 0.2 and one["starts"][one["best"]]["spread"] == min(s["spread"] for s in one["starts"])
    with pytest.raises(ConfigError, match="has no classifier: take --task knn or probe"):
        main(["--checkpoint", str(found["folder"] / "pairs"), "--task", "supervised"], World())


@pytest.mark.slow
def test_a_tower_is_described_as_it_is_stored(found: dict[str, Any]) -> None:
    """Flags make the model that runs, not the one whose weights are read: positions are resized, and it is told."""
    argv = ["--checkpoint", str(found["folder"] / "pairs"), "--task", "retrieval", "--model.image_size", "12"]
    sources = sources_of(*parse_options(argv), World())
    for source in sources.values():
        source.weights.close()
    image, text = sources["image"].plan, sources["text"].plan
    assert image.changes == "model.image_size 8 -> 12" and set(image.of("resized")) == {
        "embed.pos_row",
        "embed.pos_col",
    }
    assert not text.changed and not text.of("resized")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--text.pool", "last"], "--text.pool is last, but the text tower of .* was trained with eos: leave it out"),
        (["--text.context_length", "30"], "--text.context_length is 30, .* was trained with 24: leave it out"),
        (["--model.width", "64"], "--checkpoint: .* is of another model, .*model.width 32 -> 64"),
        (["--model.pool", "map"], r"\(other than there: model.pool gap -> map\): head.pool"),
    ],
)
def test_a_flag_of_another_tower_is_refused(found: dict[str, Any], given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--checkpoint", str(found["folder"] / "pairs"), "--task", "retrieval", *given], World())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--task", "knn", "--k", "5,1500"], "--k 1500 is more than the 1437 training images"),
        (["--task", "nearest"], "argument --task: invalid choice: 'nearest'"),
        (["--task", "zero_shot"], "--task zero_shot is for contrastive models, and .* has no text tower"),
        (["--task", "knn", "--features", "embedding"], "--features embedding is for contrastive models"),
        (["--task", "knn", "--shots", "5"], "--shots is of task fewshot, and --task is knn"),
        (["--task", "knn", "--optimizer.lr", "1"], "--optimizer.lr is no option of an evaluation"),
        (["--task", "knn", "--model.depth", "6"], r"has not the weights of this model \(other than there: model.depth"),
        (["--task", "knn", "--data.kind", "image_folder"], "data.path is not set"),
        (["--task", "probe", "--l2-range", "2,1"], "--l2-range 2,1 begins above its end"),
        (["--task", "probe", "--l2-count", "1"], "--l2-count is 1, but --l2-range 1e-06,1e[+]06 has two ends"),
        (["--task", "clustering", "--data.kind", "synthetic", "--data.size", "9"], "9 training images of 10 classes"),
        (["--task", "supervised", "--parallel.tensor_parallel_size", "2"], "1 rank cannot be shared"),
        (["--task", "fewshot", "--data.kind", "synthetic", "--data.size", "4"], "and no training image"),
        (["--task", "knn", "--data.kind", "synthetic", "--data.size", "4"], "held-out images of class .* no training"),
        (["--task", "knn", "--json", "/nowhere/x.json"], "argument --json: /nowhere/x.json: there is no folder"),
    ],
)
def test_what_cannot_be_is_refused_by_name(found: dict[str, Any], given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main(["--checkpoint", str(found["folder"] / "run"), *given], World())


def test_images_of_other_files_are_shown_as_the_run_s() -> None:
    how = {"mean": [0.4], "eval_transform": "timm", "crop_pct": 0.9}
    data = {"kind": "webdataset", "path": "x.tar", "flip": True} | how
    for kind, kept in (("image_folder", how), ("digits", {"mean": [0.4]})):
        assert stored_keys({"data": data}, None, None, {"data.kind": kind})["data"] == kept
    assert stored_keys({"data": data}, None, None, {"data.path": "y.tar"})["data"] == data
    assert "crop_pct" not in stored_keys({"data": data}, None, None, {"data.eval_transform": "centre"})["data"]


@pytest.mark.parametrize(
    ("how", "way", "part"),
    [
        (Preprocessing(interpolation="bilinear"), "centre", None),
        (Preprocessing(crop_fraction=0.9), "timm", 0.9),
        (Preprocessing(interpolation="box", crop_fraction=0.8), "big_vision", 0.8),
        (Preprocessing(interpolation="bilinear", squash=True, antialias=False), "big_vision_resize", None),
        (Preprocessing(interpolation="lanczos", crop_fraction=0.9), "timm", 0.9),  # nearly
        (Preprocessing(squash=True), "big_vision_resize", None),  # nearly
    ],
)
def test_images_are_shown_as_the_file_of_another_library_says(how: Preprocessing, way: str, part: float | None) -> None:
    data = stored_keys({}, None, how, {"data.kind": "image_folder"})["data"]
    assert data == {"mean": [0.5] * 3, "std": [0.5] * 3, "eval_transform": way, "crop_pct": part}
    config = DataConfig(kind="image_folder", path="photos", **data | {"mean": how.mean, "std": how.std})
    assert is_exact(how) == (shown_by(asdict(config)) == how)
    assert "eval_transform" not in stored_keys({}, None, how, {})["data"]  # digits
    ours = stored_keys({"data": {"kind": "image_folder", "eval_transform": "centre"}}, None, how, {})["data"]
    assert ours["eval_transform"] == "centre" and "crop_pct" not in ours
    usual = showing_of(DataConfig(kind="image_folder", path="photos", eval_transform="timm"))
    assert usual is not None and usual.crop_pct == shown_by({"eval_transform": "timm"}).crop_fraction


def test_labels_that_a_student_was_not_told_are_not_told_later() -> None:
    data = {"kind": "digits", "images_per_class": None, "labels_per_class": 3}
    kept = stored_keys({"objective": "distillation", "distillation": {}, "data": data}, None, None, {})
    assert "objective" not in kept and kept["data"] == data | {"images_per_class": 3, "labels_per_class": None}
    assert stored_keys({"data": data | {"labels_per_class": None}}, None, None, {})["data"]["images_per_class"] is None


def test_no_checkpoint_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--checkpoint: "):
        main(["--checkpoint", str(tmp_path), "--task", "knn"], World())
