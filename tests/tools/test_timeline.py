"""`python -m tools.timeline`: what is in the pictures, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from engine.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from engine.run.timeline import merge, part_of, write_part
from parallel.grid import GridShape
from parallel.pipeline import Costs, build_schedule, compute_order, simulate, to_csv
from parallel.pipeline.graph import data_dependencies
from parallel.pipeline.recording import Slice, StepRecord
from tools.timeline import __main__ as timeline
from tools.timeline import draw as drawing
from tools.timeline.picture import Panel

RANKS, MICRO_BATCHES, STEPS = 4, 6, (7, 8)
SHAPE = GridShape(pipeline=RANKS, data=2)
SCHEDULE = build_schedule("zb_h1", RANKS, MICRO_BATCHES)
SENDS = {
    data_dependencies(a, SCHEDULE)[0]: a for program in SCHEDULE.ranks for a in program if a.kind.is_send
}  # fmt: skip
UNIT = 1_000_000  # nanoseconds of a forward


def _record(rank: int, step: int, late: int) -> StepRecord:
    """A step as the simulator has it, which begins `late` units after the first, with what is around it."""
    start = (100 * step + late) * UNIT
    record = StepRecord(step)
    for i in simulate(SCHEDULE, Costs()).ranks[rank]:
        end = start + int(UNIT * i.end)
        record.computed.append(Slice(i.action, start + int(UNIT * i.start), end))
        if (send := SENDS.get(i.action)) is not None:
            record.messages.append(Slice(send, end, end + 10))
    first, last = record.computed[0], record.computed[-1]
    record.waits.append(Slice(first.what, start, first.start))
    end = last.end
    for what in ("finishing gradients", "adding up loss and norm", "optimizer"):
        record.phases.append(Slice(what, end, end + UNIT))
        end += UNIT
    record.phases.append(Slice("reading images of micro-batch 0", first.start, first.start + UNIT // 2))
    record.calls.append(Slice("wait all_reduce", first.start + UNIT // 2, first.end, None, "data"))
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, with the parts of all ranks and what they are together."""
    run = tmp_path_factory.mktemp("runs") / "one"
    profile = run / "profile"
    told = {"name": SCHEDULE.name, "policy": "static", "num_stages": RANKS, "stage_to_rank": SCHEDULE.stage_to_rank}
    told["forward_passes"] = 0
    for rank in range(SHAPE.world_size):
        header = {
            "rank": rank, "grid": {"pipeline": RANKS, "data": 2, "context": 1, "tensor": 1}, "replicas": 2,
            "steps": list(STEPS), "traced": [STEPS[1]], "clock_error": 0, "missing": 0,
            "schedule": told | ({"text": str(SCHEDULE)} if rank == 0 else {}),
        }  # fmt: skip
        records = [_record(rank // 2, step, late=rank % 2) for step in STEPS]
        write_part(part_of(profile, rank), records, header, SCHEDULE, {}, SHAPE, 0)
    merge([part_of(profile, rank) for rank in range(SHAPE.world_size)], profile / "timeline.json")
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Sequence[Panel], Figure]]:
    """What is drawn, and how."""
    kept: list[tuple[Sequence[Panel], Figure]] = []
    draw = drawing.draw

    def keeping(panels: Sequence[Panel], **more: str) -> Figure:
        kept.append((panels, draw(panels, **more)))
        return kept[-1][1]

    monkeypatch.setattr(drawing, "draw", keeping)
    return kept


def _counts(panel: Panel) -> Counter[str]:
    return Counter(box.kind for boxes in panel.lanes.values() for box in boxes)


def test_a_run_is_drawn_measured_and_simulated(
    folder: Path, drawn: list[tuple[Sequence[Panel], Figure]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert timeline.main([str(folder)]) == EXIT_DONE
    assert capsys.readouterr().out == f"{folder / 'timeline.png'}\n" and (folder / "timeline.png").stat().st_size > 5000
    (measured, simulated), figure = drawn[-1]
    expected = simulate(SCHEDULE, Costs())
    share = f"bubble {100 * expected.bubble_fraction:.1f} %"
    assert measured.title == f"measured: {share}" and simulated.title.endswith(share)
    computed = dict.fromkeys("FIW", RANKS * MICRO_BATCHES)
    around = dict.fromkeys(("wait", "reduction", "norm", "optimizer", "reading", "collective"), RANKS)
    assert _counts(simulated) == computed
    assert {k: n for k, n in _counts(measured).items() if k != "message"} == computed | around
    assert list(measured.lanes) == ["rank 0", "rank 2", "rank 4", "rank 6"]
    for panel in (measured, simulated):
        for boxes, intervals in zip(panel.lanes.values(), expected.ranks, strict=True):
            found = [box for box in boxes if box.label]
            assert [(b.kind, b.label) for b in found] == [
                (i.action.kind.value, str(i.action.micro_batch)) for i in intervals
            ]
            assert [b.start for b in found] == pytest.approx([i.start for i in intervals], abs=1e-3), "milliseconds"
    texts = Counter(text.get_text() for axes in figure.axes for text in axes.texts)
    assert texts == {str(m): 2 * 3 * RANKS for m in range(MICRO_BATCHES)}
    assert figure.get_suptitle().endswith("one, step 7: zb_h1; pipeline 4, data 2"), "the step that was not slowed"


def test_the_pipeline_and_the_step_can_be_chosen(
    folder: Path, drawn: list[tuple[Sequence[Panel], Figure]], tmp_path: Path
) -> None:
    out = tmp_path / "x.png"
    given = [str(folder / "profile" / "timeline.json"), "--rank", "5", "--step", "8", "--out", str(out)]
    assert timeline.main(given) == EXIT_DONE and out.exists()
    (measured, _), _ = drawn[-1]
    assert list(measured.lanes) == ["rank 1", "rank 3", "rank 5", "rank 7"]
    assert measured.lanes["rank 1"][0].start == pytest.approx(0), "time begins with the first action of this pipeline"
    assert "slowed by torch's profiler" in measured.note


def test_parts_alone_are_drawn(folder: Path, drawn: list[tuple[Sequence[Panel], Figure]], tmp_path: Path) -> None:
    (run := tmp_path / "profile").mkdir()
    for rank in (0, 2, 4, 6):
        (run / part_of(folder, rank).name).write_bytes(part_of(folder / "profile", rank).read_bytes())
    assert timeline.main([str(tmp_path)]) == EXIT_DONE
    assert _counts(drawn[-1][0][0])["W"] == RANKS * MICRO_BATCHES
    (kept := tmp_path / "kept.json").write_bytes((folder / "profile" / "timeline.json").read_bytes())
    assert timeline.main([str(kept)]) == EXIT_DONE, "under any name"
    with pytest.raises(ConfigError, match=r"--rank 1 is in a pipeline that was not recorded whole.* ranks 0, 2, 4, 6"):
        timeline.main([str(tmp_path), "--rank", "1"])
    part_of(run, 0).unlink()
    with pytest.raises(ConfigError, match=r"lacks timeline-rank0.jsonl"):
        timeline.main([str(tmp_path)])


def test_schedules_are_drawn_without_a_run(
    drawn: list[tuple[Sequence[Panel], Figure]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert timeline.main(["--schedule", "1f1b, zb_v", "--ranks", "2", "--micro-batches", "3", "--trace", "t.json"]) == 0
    assert capsys.readouterr().out == "t.json\n1f1b+zb_v-2x3.png\n" and Path("1f1b+zb_v-2x3.png").exists()
    first, second = drawn[-1][0]
    assert _counts(first) == dict.fromkeys("FB", 6) and _counts(second) == dict.fromkeys("FIW", 12)
    assert first.note.startswith("bubble 25.0 %, time 12,"), "(p - 1) (F + B) of m (F + B)"
    assert list(second.lanes) == ["rank 0: stages 0, 3", "rank 1: stages 1, 2"]
    whole = [sum(box.end - box.start for boxes in panel.lanes.values() for box in boxes) for panel in (first, second)]
    assert whole == pytest.approx([18, 18]), "the same work, whatever it is cut into"
    events = json.loads(Path("t.json").read_text())["traceEvents"]
    assert Counter(e["ph"] for e in events)["X"] == 12 + 36
    assert len({(e["pid"], e["ts"]) for e in events if e["ph"] == "X"}) == 12 + 36, "no two schedules share a process"


def test_a_file_alone_says_how_many_ranks_and_micro_batches(
    tmp_path: Path, drawn: list[tuple[Sequence[Panel], Figure]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("one.csv").write_text("0F0,0F1,0B0,0B1")
    assert timeline.main(["--schedule", "one.csv,zb_h1"]) == EXIT_DONE and Path("one+zb_h1-1x2.png").exists()
    first, second = drawn[-1][0]
    assert _counts(first) == {"F": 2, "B": 2} and _counts(second) == {"F": 2, "I": 2, "W": 2}
    assert drawn[-1][1].get_suptitle() == "one.csv, zb_h1: 1 rank, 2 micro-batches"


def test_virtual_stages_are_of_those_that_can_hold_any_number(drawn: list[tuple[Sequence[Panel], Figure]]) -> None:
    given = ["--schedule", "interleaved,zb_v", "--ranks", "2", "--virtual-stages", "3", "--text"]
    assert timeline.main(given) == EXIT_DONE


def test_a_schedule_is_written_as_a_file(tmp_path: Path) -> None:
    """As it is, and in the order in which ranks run it by what is ready."""
    file = tmp_path / "my.csv"
    given = ["--schedule", "v_half", "--ranks", "4", "--micro-batches", "8", "--text", "--csv", str(file)]
    assert timeline.main(given) == EXIT_DONE
    assert file.read_text() == to_csv(compute_order("v_half", 4, 8))
    assert timeline.main([*given, "--policy", "ready", "--input", "2"]) == EXIT_DONE
    costs = Costs(forward=0.5, backward_input=1.0, backward_weight=0.5)
    ran = simulate(build_schedule("v_half", 4, 8), costs, "ready").programs
    read = simulate(build_schedule(str(file), 4, 8), costs).programs
    assert list(map(list, read)) == list(map(list, ran))


def test_long_ones_go_on_below_and_text_is_enough_for_some(
    drawn: list[tuple[Sequence[Panel], Figure]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--schedule", "1f1b", "--ranks", "2", "--micro-batches", "70", "--out", str(tmp_path / "x.png")]
    assert timeline.main(given) == EXIT_DONE
    figure = drawn[-1][1]
    limits = [axes.get_xlim() for axes in figure.axes]
    assert len(limits) == 2 and limits[0][1] == limits[1][0] and limits[1][1] == pytest.approx(213)
    assert len({text.get_text() for axes in figure.axes for text in axes.texts}) == 70
    capsys.readouterr()
    assert timeline.main(["--schedule", "gpipe", "--ranks", "2", "--micro-batches", "2", "--text"]) == EXIT_DONE
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("rank 0 |F0 F1 ") and "bubble 33.3%" in shown[-1] and len(drawn) == 1
    ready = ["--schedule", "1f1b", "--text", "--policy", "ready", "--jitter", "0.3", "--latency", "0.1"]
    assert timeline.main(ready) == EXIT_DONE


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["nowhere"], "nowhere is no run"),
        (["{run}", "--step", "9"], "--step 9 was not recorded: there are 7, 8"),
        (["{run}", "--rank", "8"], "--rank 8 is none of the run's ranks"),
        (["{run}", "--out", "x.jpg"], "PNG"),
        (["{empty}"], "no step of it was recorded; train with --log.profile_steps"),
        (["{damaged}"], "timeline.json is no timeline of a run (it is no JSON, or cut off"),
        (["{damaged}/other.json"], "other.json is no timeline of a run (it is JSON, but no trace)"),
        (["{damaged}/rank0.json"], "it is a trace by torch's profiler"),
        (["{damaged}/trace.json"], "it is a trace by --trace or others"),
        (["{run}/profile/timeline-rank1.jsonl"], "it is the part of one rank"),
        (["--schedule", "2f2b"], "unknown pipeline schedule '2f2b': choose one of gpipe, 1f1b"),
        (["--schedule", "zb_v", "--virtual-stages", "3"], "--virtual-stages 3 has no effect on zb_v"),
        (["--schedule", "{empty}/../one.csv", "--ranks", "2"], "one.csv has 1 row, one per rank, but --ranks is 2"),
        (["--schedule", "my/schedule.txt"], "a file that ends in .csv"),
        (["--schedule", "1f1b", "--ranks", "100", "--micro-batches", "2000"], "at least 400000 actions"),
        (["--schedule", "1f1b", "--trace", "{empty}"], "is a folder"),
        (["--schedule", "1f1b", "--csv", "{empty}/no/x.csv"], "there is no folder"),
        (["--schedule", "1f1b", "--csv", "x.txt"], "files that end in .csv"),
    ],
)
def test_what_cannot_be_drawn_is_told_in_a_line(folder: Path, tmp_path: Path, given: list[str], reason: str) -> None:
    (empty := tmp_path / "empty").mkdir()
    (tmp_path / "one.csv").write_text("0F0,0B0")
    (damaged := tmp_path / "damaged").mkdir()
    for name, text in (
        ("timeline.json", '{"traceEvents": ['), ("other.json", "[]"), ("trace.json", '{"traceEvents": []}'),
        ("rank0.json", '{"schemaVersion": 1, "traceEvents": []}'),
    ):  # fmt: skip
        (damaged / name).write_text(text)
    with pytest.raises(ConfigError) as refusal:
        timeline.main([text.format(run=folder, empty=empty, damaged=damaged) for text in given])
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "given",
    [
        [], ["run", "--schedule", "1f1b"], ["run", "--ranks", "2"], ["--schedule", "1f1b", "--step", "1"],
        ["--schedule", "1f1b", "--ranks", "0"], ["--schedule", "1f1b", "--jitter", "-1"],
        ["--schedule", "1f1b", "--jitter", "1e200"], ["--schedule", "1f1b", "--forward", "1e308"],
        ["--schedule", "1f1b", "--text", "--out", "x.png"],
    ],
)  # fmt: skip
def test_usage(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        timeline.main(given)
    assert end.value.code == EXIT_USAGE and "error: " in capsys.readouterr().err
