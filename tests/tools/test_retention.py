"""Students and teachers trained for a few steps, once each, and the arithmetic of their table."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config.distillation import DistillationConfig
from engine.errors import ConfigError
from model import build_layers
from parallel.process_group import World
from tools.benchmark import retention, retention_runs
from tools.benchmark.retention_runs import LABELS, STUDENTS, SUBJECTS, WAYS, Run, Series, runs_of


def test_means_intervals_and_differences_of_the_same_seeds() -> None:
    kinds = [Run(seed=0), *(Run(seed=0, student="fifth", labels="few_labels", way=way) for way in ("scratch", "all"))]
    runs = [Run(seed=seed, student=of.student, labels=of.labels, way=of.way) for seed in (0, 1, 2) for of in kinds]
    accuracies = dict(zip(runs, [1.0, 0.5, 0.9, 0.8, 0.4, 0.6, 1.0, 0.6, 0.9], strict=True))
    teacher, scratch, student = retention.rows_of(runs, accuracies)
    assert teacher["accuracy_percent"] == pytest.approx(280 / 3) and teacher["retention_percent"] is None
    assert scratch["points_over_scratch"] is None and student["points_over_response"] is None
    assert student["retention_percent"] == pytest.approx((90 + 75 + 90) / 3)
    assert student["retention_percent_ci"] == pytest.approx(4.302653 * 75**0.5 / 3**0.5)
    assert student["points_over_scratch"] == pytest.approx((40 + 20 + 30) / 3)
    assert student["points_over_scratch_ci"] == pytest.approx(4.302653 * 10 / 3**0.5)
    del accuracies[runs[0]], accuracies[runs[5]]  # of seed 0 the teacher, of seed 1 the student
    teacher, scratch, student = retention.rows_of(runs, accuracies)
    assert (teacher["seeds"], scratch["seeds"], student["seeds"]) == (2, 3, 2)
    assert (student["retention_percent"], student["retention_percent_ci"]) == (pytest.approx(90), None)
    assert student["points_over_scratch"] == pytest.approx(35)


def test_what_each_student_is_to_match(tmp_path: Path) -> None:
    series = Series(tmp_path, flags=[
        "--distillation.features_weight", "1", "--distillation.relations", "queries, distances",
        "--distillation.relations_weight", "2", "--distillation.pairs", "even:1", "--distillation.relation_heads", "4",
        "--distillation.lift", "keep",
    ])  # fmt: skip
    found = {
        run: series.config_of(run)
        for run in runs_of([7], list(STUDENTS), list(LABELS), list(WAYS))
        if run.student != "teacher"
    }
    targets = {run.way: set(config.distillation.weights) for run, config in found.items()}
    assert targets["all"] == targets["features"] | targets["relations"]
    assert targets["features"] == {"response", "features", "labels"}
    assert targets["relations"] == {"response", "queries", "distances", "labels"}
    assert targets["response"] == {"response", "labels"}
    kept = {run.way for run, config in found.items() if config.distillation.lift == "keep"}
    assert kept == {"features", "all"}  # but for Gram matrices, relations have no projection
    for run, config in found.items():
        assert (config.train.seed, config.data.fold) == (7, 2)
        if run.way == "scratch":
            assert config.objective == "supervised" and config.distillation == DistillationConfig()
            assert config.data.labels_per_class is None
            assert config.data.images_per_class == (None if run.labels == "all" else 10)
        else:
            config.distillation.check()
            assert config.data.labels_per_class == (10 if run.labels == "few_labels" else None)
            assert config.data.images_per_class == (10 if run.labels == "few_images" else None)


def test_students_have_their_share_of_the_teachers_weights(tmp_path: Path) -> None:
    shares = {"fifth": 0.2, "twentieth": 0.05}
    for subject in SUBJECTS:
        series = Series(tmp_path, on=subject)
        models = {name: series.config_of(Run(seed=0, student=name)).model.resolve() for name in ("teacher", *STUDENTS)}
        counts = {name: sum(spec.parameters for spec in build_layers(model)) for name, model in models.items()}
        for student, share in shares.items():
            assert counts[student] / counts["teacher"] == pytest.approx(share, rel=0.05), (subject, counts)


def test_each_is_trained_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "here"
    asked = ["--out", str(here), "--students", "twentieth", "--labels", "few_labels", "--ways", "scratch", "all"]
    asked += ["--steps", "3", "--json", str(tmp_path / "rows.json")]
    assert retention.main([*asked, "--seeds", "3"], World()) == 0
    first = capsys.readouterr().out
    assert "| twentieth | few_labels | scratch | 1 |" in first and first.count("\n") == 5
    file = here / "runs.jsonl"
    file.write_bytes(file.read_bytes() + b'{"run": {"seed')  # cut off by the end of another attempt
    trained = list[int]()

    def pretrain(config: object, world: World) -> int:
        trained.append(config.train.seed)  # type: ignore[attr-defined]
        return 3

    monkeypatch.setattr(retention_runs, "pretrain", pretrain)
    assert retention.main([*asked, "--seeds", "3", "4"], World()) == 3 and trained == [4]
    same = ["--seeds", "3", "--labels", "few_images", "--ways", "scratch"]  # as with few labels
    assert retention.main([*asked, *same], World()) == 0 and trained == [4]
    capsys.readouterr()
    assert retention.main([*asked, "--seeds", "3", "4", "--only-show"], World()) == 0
    assert capsys.readouterr().out == first
    assert retention.main([*asked, "--seeds", "3", "--steps", "2", "--only-show"], World()) == 0
    assert capsys.readouterr().out == ""  # of other runs
    moved = here.rename(tmp_path / "moved")
    assert retention.main([*asked[2:-2], "--out", str(moved), "--seeds", "3"], World()) == 0 and trained == [4]
    file = moved / "runs.jsonl"
    file.write_text("{}\n{}\n")
    with pytest.raises(ConfigError, match=r"runs\.jsonl, line 1 is no run of this benchmark: give another --out"):
        Series(moved)
