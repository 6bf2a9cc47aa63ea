"""`python -m tools.inspect_checkpoint`: what it shows, which damage it names, how it compares, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.checkpoint import examine
from engine.checkpoint.examine import Figures
from parallel.checkpoint.manifest import FILE
from tests.engine.checkpoint.making import make, tensors
from tools.inspect_checkpoint.__main__ import Refusal, main

ROOT = Path(__file__).parents[2]
FACTS: dict[str, Any] = {
    "progress": {"samples": 4096, "seconds": 12.5},
    "config": {"train": {"steps": 9, "seed": 1}, "run_dir": "runs/x"},
    "about": {"version": "0.1", "commit": "abc", "layout": {"pipeline": 2, "tensor": 1}},
    "evaluation": {"accuracy": 0.75},
}


@pytest.fixture(autouse=True)
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def inspected(path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code, and what is written as JSON."""
    output = path.parent / "found.json"
    code = main([str(path), *flags, "--json", str(output)])
    return code, json.loads(output.read_text(), parse_constant=pytest.fail)


# -- one ---------------------------------------------------------------------------------------------------------------


def test_what_is_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path, 3, tensors())
    make(tmp_path, 12, tensors(), **FACTS)
    code, found = inspected(tmp_path, "--pieces", "--config")
    assert code == 0 and not found["damage"] and found["step"] == 12
    assert {key: found[key] for key in FACTS} == FACTS
    assert {row["name"]: (row["dtype"], row["shape"]) for row in found["tensors"]} == {
        "weights/a": ("F32", [5, 6]), "optimizer.exp_avg/a": ("F32", [5, 6]), "weights/b": ("BF16", [5]),
        "optimizer.steps": ("F64", []),
    }  # fmt: skip
    assert found["tensors"][-1]["value"] == 3.0
    for row in found["tensors"]:  # what is said of the pieces is where they are
        for piece in row["pieces"]:
            assert piece["file"] in ("rank-00000.safetensors", "rank-00001.safetensors")
            if row["name"] == "weights/a":
                start = piece["start"]
                data = (tmp_path / "step-00000012" / piece["file"]).read_bytes()[start:]
                first = np.frombuffer(data[:4], np.float32)[0]
                assert first == tensors()["weights/a"][tuple(piece["offset"])]
    shown = capsys.readouterr().out
    for text in ("abc", "samples 4096", "accuracy 0.75", "pipeline 2", "train.seed", "[5, 6]", "steps", "= 3"):
        assert text in shown
    order = [
        "\nweights: 2 tensors, 35 elements, 130 bytes\n",
        "\noptimizer.exp_avg: ",
        "\nnumbers\n",
        "\nevery checksum",
    ]
    assert sorted(order, key=shown.index) == order


def test_names_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"weights/blocks.{number}.norm" for number in (0, 2, 9, 10, 100)]
    make(tmp_path, 1, {name: torch.ones(1) for name in reversed(names)}, files=1)
    assert [row["name"] for row in inspected(tmp_path)[1]["tensors"]] == names


def test_norms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = tensors()
    values["weights/c"] = torch.tensor([3.0, float("nan"), -4.0, float("inf"), float("-inf")])
    values["weights/d"] = torch.full((3,), float("nan"))
    values["weights/e"] = torch.tensor([1, 255, 0], dtype=torch.uint8)
    make(tmp_path, 1, values)
    code, found = inspected(tmp_path, "--norms")
    assert code == 0
    rows = {row["name"]: (row["norm"], row["min"], row["max"], row["not_finite"]) for row in found["tensors"][:-1]}
    a = values["weights/a"].double()
    assert rows["weights/a"] == (pytest.approx(float(a.norm()), rel=1e-12), 0, 29, 0)
    assert rows["weights/c"] == (5, -4, 3, 3)
    assert rows["weights/d"] == (0, None, None, 3)
    assert rows["weights/e"] == (pytest.approx(65026**0.5), 0, 255, 0)
    assert "3 NOT FINITE" in capsys.readouterr().out


def test_figures_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "_AT_ONCE", 7)
    values = torch.randn(100, dtype=torch.float32)
    found = Figures.of(values)
    assert found.norm == pytest.approx(float(values.double().norm()), rel=1e-12)
    assert (found.least, found.most) == (float(values.min()), float(values.max()))


def test_every_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All files and tensors of it, not the first alone."""
    step = make(tmp_path, 1, tensors(), files=6)
    held = {row["name"]: row["pieces"] for row in inspected(tmp_path, "--pieces")[1]["tensors"]}
    names = [f"rank-{number:05d}.safetensors" for number in range(6)]

    def change(number: int, at: int) -> None:
        with (step / names[number]).open("r+b") as file:
            file.seek(at)
            file.write(b"\xee")

    def start(name: str, number: int) -> int:
        return next(piece["start"] for piece in held[name] if piece["file"] == names[number])

    change(0, start("weights/a", 0))
    change(1, start("weights/a", 1))
    change(1, start("optimizer.exp_avg/a", 1) + 3)
    change(2, 20)  # of the header
    (step / names[3]).unlink()
    with (step / names[4]).open("r+b") as file:
        file.truncate(start("weights/a", 4) - 1)
    capsys.readouterr()
    code, found = inspected(tmp_path)
    damage = {name: {row["tensor"] for row in found["damage"] if row["file"] == name} for name in names}
    inside = {name: {t for t, pieces in held.items() if name in {piece["file"] for piece in pieces}} for name in names}
    assert code == 1
    assert damage[names[0]] == {"weights/a"}
    assert damage[names[1]] == {"weights/a", "optimizer.exp_avg/a"}
    assert damage[names[2]] == {None}
    assert damage[names[3]] == {None} | inside[names[3]]
    assert {None, "weights/a"} <= damage[names[4]] <= {None} | inside[names[4]]
    assert not damage[names[5]]
    assert {row["name"] for row in found["tensors"] if row["damaged"]} == set().union(*damage.values()) - {None}
    shown = capsys.readouterr().out
    assert all(f"DAMAGED: {name}" in shown for name in names[:5]) and "every checksum is right" not in shown


def test_without_a_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in a file is not read; that it is missing is seen."""
    step = make(tmp_path, 1, tensors())
    data = bytearray((step / "rank-00001.safetensors").read_bytes())
    data[-1] ^= 1
    (step / "rank-00001.safetensors").write_bytes(data)
    assert main([str(tmp_path)]) == 1
    capsys.readouterr()
    assert main([str(tmp_path), "--no-check"]) == 0
    assert "no checksum was compared" in capsys.readouterr().out
    (step / "rank-00001.safetensors").unlink()
    assert main([str(tmp_path), "--no-check"]) == 1


@pytest.mark.parametrize("what", ["missing", "cut off", "flipped"])
def test_a_damaged_manifest(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path, 1, tensors()) / FILE
    text = path.read_bytes()
    changed = {"cut off": text[:-9], "flipped": text.replace(b"[5, 6]", b"[6, 5]")}
    path.unlink()
    if what in changed:
        path.write_bytes(changed[what])
    for given in (path.parent, tmp_path):
        code, found = inspected(given)
        assert code == 1 and found["damage"][0]["file"] == FILE
    assert f"DAMAGED: {FILE}" in capsys.readouterr().out


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    other = tmp_path / "other"
    other.mkdir()
    (other / FILE).write_text('{"name": "an app"}')
    good = make(tmp_path / "run", 1, tensors())
    for path in ("empty", "file", "none", "other"):
        for argv in ([str(tmp_path / path)], [str(good), str(tmp_path / path)], [str(tmp_path / path), str(good)]):
            with pytest.raises(Refusal, match=path):
                main(argv)
    with pytest.raises(Refusal, match="--json"):
        main([str(good), "--json", str(tmp_path / "none/found.json")])
    for argv in ([], [str(good), str(good), "--compare", str(good)], [str(good), str(good), "--norms"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2


def test_as_a_command(tmp_path: Path) -> None:
    """Exit codes, one line for a mistake; and no traceback where nobody reads on."""
    make(tmp_path, 1, {f"weights/{'long' * 40}.{number}": torch.ones(1) for number in range(3000)}, files=1)
    command = f"{sys.executable} -m tools.inspect_checkpoint"
    script = f"{command} {tmp_path} | head -2; echo ${{PIPESTATUS[0]}}; {command} {tmp_path / 'none'}; echo $?"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("checkpoint") and lines[2:] == ["141", "2"]
    assert done.stderr.startswith("tools.inspect_checkpoint: error: ") and done.stderr.count("\n") == 1


# -- two ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [examine.BLOCK_BYTES, 32])
def test_equal_in_other_pieces(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "BLOCK_BYTES", block)
    values = tensors() | {"weights/n": torch.tensor([float("nan"), -0.0, 1.0])}
    one, other = make(tmp_path / "a", 1, values, files=1), make(tmp_path / "b", 2, values, files=3)
    code, found = inspected(one, str(other))
    assert code == 0 and found["equal"] == len(values) and not found["different"]


@pytest.mark.parametrize("block", [examine.BLOCK_BYTES, 32])
def test_what_differs(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(examine, "BLOCK_BYTES", block)
    monkeypatch.setattr(examine, "_AT_ONCE", 5)
    nan = float("nan")
    same: dict[str, Any] = {"weights/same": torch.ones(3)}
    one = same | {
        "weights/a": torch.arange(30.0).view(5, 6), "weights/gone": torch.ones(2), "weights/shape": torch.ones(2, 3),
        "weights/type": torch.ones(4), "weights/typed": torch.tensor([1.0, nan, 0.1]),
        "weights/zero": torch.zeros(2), "weights/nan": torch.tensor([nan, 1.0]), "steps": torch.tensor(1.0),
    }  # fmt: skip
    other = same | {
        "weights/a": one["weights/a"].clone(), "weights/new": torch.ones(2), "weights/shape": torch.ones(3, 2),
        "weights/type": torch.ones(4, dtype=torch.bfloat16), "weights/typed": one["weights/typed"].bfloat16(),
        "weights/zero": -torch.zeros(2), "weights/nan": torch.tensor([1.0, 1.0]), "steps": torch.tensor(2.5),
    }  # fmt: skip
    other["weights/a"][2, 3] += 4
    other["weights/a"][4, 1] -= 7
    facts = FACTS | {"config": {"train": {"steps": 9, "seed": 2, "more": None}}, "progress": {"samples": 8}}
    left, right = make(tmp_path / "a", 1, one, **FACTS), make(tmp_path / "b", 2, other, files=3, **facts)
    code, found = inspected(left, "--compare", str(right))
    assert code == 1 and not found["damage"] and found["equal"] == 1
    rows = {row.pop("name"): row for row in found["different"]}
    assert rows["weights/a"] == {
        "elements": 30, "differing": 2, "largest": 7.0, "first": [2, 3], "values": [15.0, 19.0]
    }  # fmt: skip
    assert rows["weights/gone"] == {"only_in": "one"} and rows["weights/new"] == {"only_in": "other"}
    assert rows["weights/shape"] == {"shapes": [[2, 3], [3, 2]]}
    assert rows["weights/type"] == {"dtypes": ["F32", "BF16"]}
    assert (rows["weights/typed"]["differing"], rows["weights/typed"]["first"]) == (1, [2])
    assert (rows["weights/zero"]["differing"], rows["weights/zero"]["largest"]) == (2, 0.0)
    assert (rows["weights/nan"]["differing"], rows["weights/nan"]["largest"]) == (1, None)
    assert rows["steps"]["first"] == [] and rows["steps"]["values"] == [1.0, 2.5]
    assert found["keys"]["config"] == {
        "train.seed": [1, 2], "train.more": ["none", None], "run_dir": ["runs/x", "none"]
    }  # fmt: skip
    assert found["keys"]["progress"] == {"samples": [4096, 8], "seconds": [12.5, "none"]}
    shown = capsys.readouterr().out
    assert "config train.seed: 1, 2" in shown and "weights/a: 2 of 30 elements differ, by at most 7" in shown


def test_what_is_damaged_is_not_called_equal(tmp_path: Path) -> None:
    left, right = make(tmp_path / "a", 1, tensors()), make(tmp_path / "b", 1, tensors(), files=1)
    (left / "rank-00001.safetensors").unlink()
    code, found = inspected(left, str(right))
    assert code == 1 and not found["different"]
    assert {row["tensor"] for row in found["damage"]} >= {"weights/a", "weights/b"}
    assert found["equal"] == len(tensors()) - len(found["damage"])
