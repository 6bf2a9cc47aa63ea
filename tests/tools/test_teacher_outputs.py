"""`python -m tools.teacher_outputs`: rows of every draw, in any layout and number of goes; a student of them."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data import Dataset, TrainStream, build_datasets
from engine.config import Config
from engine.config.cli import parse
from engine.config.distillation import DistillationConfig, TeacherConfig
from engine.config.stored import check_rows
from engine.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from engine.plan import peaks, planned
from engine.run.report import _model_lines
from engine.run.trainer import pretrain
from engine.teacher_outputs.meta import read_meta
from engine.teacher_outputs.shards import StoredOutputs, begin, stored_at, write_rows
from model import ModelConfig, VisionTransformer
from parallel.comm import single_axis
from parallel.distillation import likeliest
from parallel.grid import GridShape
from parallel.process_group import World
from tests.engine.small import MODEL, flags
from tests.tools.jobs import run_jobs
from tools.teacher_outputs.__main__ import _joined, main

TOOL, TRAINING = "tools.teacher_outputs.__main__", "pretrain_vit"
DRAWN = {"objective": "distillation", "data__rotate": "20", "train__steps": "3", "train__global_batch_size": "16"}
PLAIN = {
    "objective": "distillation", "train__steps": "6", "train__global_batch_size": "16", "log__interval": "1",
    "distillation__embeddings_weight": "1", "distillation__relations": "distances",
    "distillation__relations_weight": "2", "data__labels_per_class": "1",
    "distillation__features_weight": "3", "distillation__pairs": "[[1, 0], [3, 2]]",
}  # fmt: skip
DRAWS, IMAGES, HELD_OUT, KEPT = 48, 32, 8, 3


def teacher_of(path: Path) -> VisionTransformer:
    """With opinions."""
    model = VisionTransformer(ModelConfig(**MODEL | {"width": 24, "depth": 3, "patch_size": 2}), seed=7)
    with torch.no_grad():
        model.get_parameter("head.fc.weight").mul_(20)
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a teacher, its outputs and runs of students."""
    folder = tmp_path_factory.mktemp("outputs")
    teacher_of(folder / "teacher")
    drawn, plain = (partial(flags, **keys, distillation__teacher=str(folder / "teacher")) for keys in (DRAWN, PLAIN))
    two, few, images = ([*("--out", str(folder / name)), "--rows-per-file", "20"] for name in ("two", "few", "images"))
    split = ["--parallel.tensor_parallel_size", "2", "--parallel.pipeline_parallel_size", "2"]
    stored = flags(**PLAIN, distillation__teacher=str(folder / "images"), run_dir=str(folder / "stored"))
    jobs = {
        "two data ranks": (TOOL, 2, [*drawn(), "--train.steps", "1", *two]),
        "a longer run, in another layout": (TOOL, 4, [*drawn(), *split, "--train.micro_batch_size", "4", *two]),
        "few": (TOOL, 1, [*drawn(), *few, "--top-k", str(KEPT), "--number-format", "fp16"]),
        "images": (TOOL, 1, [*plain(), *images, "--features", "--blocks", "2", "0"]),
        "online": (TRAINING, 1, plain(run_dir=str(folder / "online"))),
        "stored": (TRAINING, 2, [*stored, *split[:2]]),
    }
    codes = run_jobs(folder, jobs, timeout=120)
    for name, found in codes.items():
        assert not any(found), (folder / f"{name}.txt").read_text()
    return folder


@pytest.fixture
def opened(made: Path) -> Path:
    stored_at.cache_clear()
    return made


def config_of(**keys: str) -> Config:
    return parse(flags(**keys), "test")[0]


def sets_of(config: Config) -> tuple[Dataset, Dataset]:
    return build_datasets(config.data, image_size=8, channels=1, num_classes=10, seed=config.train.seed)


def expected(folder: Path) -> Tensor:
    """Logits of all draws, by the teacher alone."""
    config = config_of(**DRAWN)
    stream = TrainStream(
        sets_of(config)[0], config=config.data, global_batch_size=16, micro_batch_size=16, data_rank=0, data_size=1,
        seed=config.train.seed,
    )  # fmt: skip
    teacher = VisionTransformer.from_pretrained(folder / "teacher")
    with torch.no_grad():
        images = [batch.images for batch in islice(chain.from_iterable(stream.steps(0)), 3)]
        return torch.cat([teacher(shown) for shown in images if shown is not None])


def test_rows_are_those_of_the_draws_in_any_layout(made: Path) -> None:
    whole = expected(made)
    two = StoredOutputs(made / "two")
    assert (two.meta.key, two.meta.rows, two.meta.kept) == ("draw", DRAWS, 10)
    torch.testing.assert_close(two.read("training", np.arange(DRAWS))["logits"], whole, rtol=1e-5, atol=1e-5)
    order = np.array([47, 3, 21, 3])
    torch.testing.assert_close(two.read("training", order)["logits"], whole[order], rtol=1e-5, atol=1e-5)
    assert two.read("held_out", np.array([0, HELD_OUT - 1, -1]))["logits"].shape == (3, 10)
    firsts = sorted(path.name[:35] for path in (made / "two").glob("training-*"))
    assert firsts == [f"training-{a:012d}-{b:012d}-"[:35] for a, b in ((0, 20), (20, 40), (40, 48))]


def test_the_likeliest_few_and_the_mass_of_the_rest(made: Path) -> None:
    whole, few = expected(made), StoredOutputs(made / "few")
    rows = few.read("training", np.arange(DRAWS))
    usual = config_of(**DRAWN).distillation.temperature
    kept = likeliest(whole, KEPT, 10, single_axis("tensor"), usual)
    assert torch.equal(rows["ids"], kept.ids)
    assert torch.equal(few.read("training", np.array([1]))["logits"], rows["logits"][1:2])  # one image
    torch.testing.assert_close(rows["logits"], whole.gather(1, kept.ids), rtol=1e-3, atol=1e-3)
    others = (whole / usual).scatter(1, kept.ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(rows["rest"], others, rtol=1e-4, atol=1e-4)


def test_a_student_of_outputs_learns_what_it_learns_beside_its_teacher(made: Path) -> None:
    """Unaugmented: rows are of images, however long the run; on two ranks, and evaluated alike."""
    assert StoredOutputs(made / "images").meta.key == "image"
    lines = [
        [json.loads(line) for line in (made / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("online", "stored")
    ]
    told = (
        "loss",
        "loss_response",
        "loss_embeddings",
        "loss_features",
        "loss_distances",
        "loss_labels",
        "grad_norm",
        "accuracy",
        "teacher_accuracy",
    )
    for name in told:
        online, stored = ([line[name] for line in of if name in line] for of in lines)
        assert online and stored == pytest.approx(online, rel=1e-5), name


def test_a_run_goes_on_with_outputs_and_needs_more_of_them_to_be_longer(opened: Path, tmp_path: Path) -> None:
    def run(**keys: str) -> int:
        stored = flags(**DRAWN | keys, distillation__teacher=str(opened / "two"), run_dir=str(tmp_path))
        stored += ["--recompute.policy", "full"]  # of which a plan is told
        return pretrain(parse([*stored, "--log.interval", "1"], "test")[0], World())

    assert run(train__stop_step="1") == EXIT_STOPPED and run() == EXIT_DONE
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3]
    with pytest.raises(ConfigError, match=r"has outputs of 48 draws, and the run needs 64"):
        run(train__steps="4")


def test_what_is_there_is_kept_and_what_is_missing_written(opened: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = opened / "two"
    files = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    gone = next(path for path in files if path.name.startswith("training-000000000020"))
    gone.unlink()
    config = config_of(**DRAWN, distillation__teacher=str(folder))
    with pytest.raises(
        ConfigError, match=r"has outputs of 20 draws, and the run needs 48: python -m tools\.teacher_out"
    ):
        check_rows(config, *sets_of(config), DRAWS)
    given = flags(**DRAWN, distillation__teacher=str(opened / "teacher"))
    assert main([*given, "--out", str(folder)], World()) == 0
    assert "1 file(s) to be written" in capsys.readouterr().out
    now = {path: path.stat().st_mtime_ns for path in folder.glob("*.npy")}
    assert [path for path in files if now.get(path) != files[path]] in ([], [gone])
    check_rows(config, *sets_of(config), DRAWS)
    with pytest.raises(ConfigError, match=r"has outputs of 48 draws, and the run needs 64"):
        check_rows(config, *sets_of(config), 64)
    with pytest.raises(ConfigError, match=r"--out .* has outputs of something else: data\.rotate 5\.0, not 20\.0"):
        main([*given, "--data.rotate", "5", "--out", str(folder)], World())


def test_files_that_come_and_go(opened: Path, tmp_path: Path) -> None:
    """A longer file takes the place of a shorter one beneath a run; rows of who knows what are nobody's."""
    meta = replace(read_meta(opened / "two"), rows=6, rows_per_file=4, held_out_rows=0)
    begin(tmp_path, meta)
    for first, count in ((0, 4), (4, 2)):
        write_rows(tmp_path, "training", first, np.zeros(count, meta.row))
    read = StoredOutputs(tmp_path)
    assert not read.read("training", np.array([0]))["logits"].any()
    begin(tmp_path, replace(meta, rows=8))  # as far as a command got that was to write more
    StoredOutputs(tmp_path).check(6)
    with pytest.raises(ConfigError, match=r"has outputs of 6 draws, and the run needs 7"):
        StoredOutputs(tmp_path).check(7)
    write_rows(tmp_path, "training", 4, np.ones(4, meta.row))
    assert read.read("training", np.array([5]))["logits"].all()
    (tmp_path / "meta.json").unlink()
    with pytest.raises(ConfigError, match=r"has rows, and no meta\.json that says of what: give another, or delete"):
        main([*flags(**DRAWN, distillation__teacher=str(opened / "teacher")), "--out", str(tmp_path)], World())


@pytest.mark.parametrize(
    ("folder", "keys"),
    [("images", {"train__micro_batch_size": "1", "distillation__relations": "distances, angles"}), ("few", {})],
)
def test_a_student_of_outputs_is_planned(opened: Path, folder: str, keys: dict[str, str]) -> None:
    usual = PLAIN if folder == "images" else DRAWN
    config = config_of(**usual | keys, recompute__policy="selective", distillation__teacher=str(opened / folder))
    (peak,) = peaks(config.resolve(1), GridShape(), 1e9)
    shown = "\n".join(_model_lines(planned(config.resolve(1), GridShape(), 0, 1e9)))  # of the start-up report
    assert ("teacher: no layers but features, which" in shown) == (folder == "images")
    assert "taught by" not in shown and "teacher tower" not in shown
    beside = config_of(**usual | keys, recompute__policy="selective", distillation__teacher=str(opened / "teacher"))
    assert 0 < peak < peaks(beside.resolve(1), GridShape(), 1e9)[0]


def test_the_first_of_several_teachers_gives_weights_though_another_is_stored(opened: Path) -> None:
    teachers = TeacherConfig(path=str(opened / "teacher")), TeacherConfig(path=str(opened / "two"))
    config = config_of(**DRAWN, distillation__teacher="x")
    keys = DistillationConfig(teachers=teachers, start_from=(0, 0, 1, 2))
    replace(config, distillation=keys).resolve(1)
    with pytest.raises(ConfigError, match=r"start_from is \(0, 0, 1, 2\), but the teacher .*two is stored outputs"):
        replace(config, distillation=replace(keys, teachers=teachers[::-1])).resolve(1)


def test_damage_is_found(opened: Path) -> None:
    path = next((opened / "few").glob("training-000000000040*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    few = StoredOutputs(opened / "few")
    assert len(few.read("training", np.arange(40))["ids"]) == 40
    with pytest.raises(ConfigError, match=r"training-000000000040.* is damaged: delete it, and python -m tools"):
        few.read("training", np.array([41]))
    path.unlink()


@pytest.mark.parametrize(
    ("folder", "keys", "message"),
    [
        ("two", {"data__rotate": "5"}, r"of other images: data\.rotate is 5\.0, there 20\.0\. Train as they were"),
        ("two", {"train__seed": "1"}, r"of other images: train\.seed is 1, there 0"),
        ("images", {"data__flip": "true"}, r"of other images: .*data\.flip is True, there False"),
        ("two", {"model__image_size": "12"}, r"of other images: the images' rows and columns is \[12, 12\], there \[8"),
        ("two", {"model__num_classes": "7"}, r"has outputs of 10 classes and the student 7: set model\.num_classes"),
        ("two", {"distillation__teacher_dtype": "bf16"}, r"is stored outputs, so its dtype bf16 comes too late"),
        ("two", {"distillation__features_weight": "1"}, r"blocks \[0, 1, 2\] .* has no features of blocks: write"),
        ("images", {"distillation__pairs": "[[0, 1]]"}, r"blocks \[1\] .* has those of \[0, 2\] alone: .* 1, in an"),
        ("images", {"distillation__relations": "values"}, r"relations is \['values'\], but .* neither layers nor"),
        ("two", {"distillation__start_from": "even"}, r"start_from is even, but the teacher .* is stored outputs"),
        ("two", {"distillation__embeddings_weight": "1"}, r"asks for pooled features .* has logits alone: write both"),
        ("few", {"distillation__response": "sigmoid"}, r"response is sigmoid, .* the likeliest 3 of 10 classes: write"),
        ("few", {"distillation__standardise": "logits"}, r"standardise has logits, .* the likeliest 3 of 10 classes"),
        ("few", {"distillation__temperature": "4"}, r"temperature is 4\.0, but .* at temperature 2\.0: use that, or"),
    ],
)  # fmt: skip
def test_outputs_of_something_else_are_refused(opened: Path, folder: str, keys: dict[str, str], message: str) -> None:
    usual = PLAIN if folder == "images" else DRAWN
    config_of(**usual, distillation__teacher=str(opened / folder)).resolve(1)
    with pytest.raises(ConfigError, match=message):
        config_of(**usual | keys, distillation__teacher=str(opened / folder)).resolve(1)


@pytest.mark.parametrize(("folder", "usual"), [("two", DRAWN), ("images", PLAIN)])
def test_outputs_of_before_there_was_a_key_are_known(
    opened: Path, tmp_path: Path, folder: str, usual: dict[str, str]
) -> None:
    """What it means where nobody gives it, they had; the file stays as it is, and so does its fingerprint."""
    copied = tmp_path / "outputs"
    copytree(opened / folder, copied)
    said = json.loads((copied / "meta.json").read_text())
    del said["images"]["data.erase"], said["images"]["data.mean"]
    (copied / "meta.json").write_text(json.dumps(said))
    before = read_meta(copied)
    config_of(**usual, distillation__teacher=str(copied)).resolve(1)
    with pytest.raises(ConfigError, match=r"of other images: data\.mean is \[0\.3\], there \[0\.5\]\. Train"):
        config_of(**usual | {"data__mean": "[0.3]"}, distillation__teacher=str(copied)).resolve(1)
    now = replace(before, images=read_meta(opened / folder).images)
    assert _joined(now, copied) == before


def test_other_images_under_the_same_keys_are_refused(opened: Path) -> None:
    config = config_of(**DRAWN, distillation__teacher=str(opened / "two"))
    train, held_out = sets_of(config)
    train.labels = np.roll(train.labels, 1)
    with pytest.raises(ConfigError, match=r"has outputs of other training images: 32 of .* there, 32 of .* here"):
        check_rows(config, train, held_out, DRAWS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--objective", "supervised"], r"objective is supervised: give the configuration of a run with"),
        (["--top-k", "11"], r"--top-k is 11, and the teacher has 10 classes"),
        (["--teacher", "1"], r"--teacher is 1: give 0 to 0"),
        (["--blocks", "1", "3"], r"--blocks has 3, and the teacher .* has blocks 0 to 2"),
        (["--distillation.teacher", "two"], r"the teacher .*two is stored outputs already: give a checkpoint or"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(opened: Path, more: list[str], message: str) -> None:
    of = {} if "supervised" in more else {"distillation__teacher": str(opened / "teacher")}
    given, more = flags(**DRAWN, **of), [str(opened / "two") if word == "two" else word for word in more]
    with pytest.raises(ConfigError, match=message):
        main([*given, "--out", str(opened / "none"), *more], World())
    assert not (opened / "none").exists()


def test_what_a_folder_is_of_says_nothing_of_how_much_there_is(opened: Path) -> None:
    """So that a run goes on once more is written."""
    meta: Any = read_meta(opened / "two")
    assert replace(meta, rows=5).fingerprint == meta.fingerprint != replace(meta, classes=11).fingerprint
