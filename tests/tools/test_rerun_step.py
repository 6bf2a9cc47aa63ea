"""Saved steps that are run again give the same bits, and what does not is found and named."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from engine.run.rerun import compare_state, kept
from parallel.checkpoint.manifest import FILE, CheckpointError, checksum, read_manifest
from parallel.process_group import World
from tests.engine.checkpoint.test_layouts import Layout, assembled
from tests.engine.small import flags
from tests.tools.jobs import run_jobs
from tools.rerun_step import main

ROOT = Path(__file__).parents[2]
FLIPPED = "weights/blocks.2.attn.qkv.weight"
TRAINING, RERUN = "pretrain_vit", "tools.rerun_step"
TRAIN = {
    "train__steps": "5", "schedule__warmup_steps": "2", "schedule__cooldown_steps": "0", "log__interval": "2",
    "checkpoint__save_interval": "2", "checkpoint__keep": "null", "model__drop_path": "0.1",
    "optimizer__ema_decay": "0.9",
}  # fmt: skip
TWO = {
    "parallel__pipeline_parallel_size": "2", "parallel__schedule": "zb_v", "parallel__schedule_policy": "ready"
}  # fmt: skip
FOUR = {"parallel__tensor_parallel_size": "2", "parallel__zero_stage": "1", "precision__dtype": "bf16"}


@dataclass
class Runs:
    """What the jobs said, their exit codes, and the folder of the runs `one`, `two` and `four`."""

    folder: Path
    codes: dict[str, list[int]]

    def told(self, name: str) -> str:
        return (self.folder / f"{name}.txt").read_text()


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in found}


def flip(step: Path) -> None:
    """One bit of a weight, as a device may have got it wrong before it was saved: every checksum is right."""
    manifest = read_manifest(step)
    tensor = manifest.tensors[FLIPPED]
    piece = tensor.pieces[0]
    path = step / manifest.files[piece.file].name
    data = bytearray(path.read_bytes())
    data[piece.start + 4 * 3] ^= 1
    path.write_bytes(data)
    sums = (checksum(bytes(data[piece.start : piece.start + 4 * piece.box.numel])),)
    mended = replace(tensor, pieces=(piece._replace(checksums=sums), *tensor.pieces[1:]))
    (step / FILE).write_text(replace(manifest, tensors={**manifest.tensors, FLIPPED: mended}).to_json())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    train = {
        name: (TRAINING, size, flags(run_dir=str(folder / name), **TRAIN, **more))
        for name, size, more in (("one", 1, {}), ("two", 2, TWO), ("four", 4, FOUR))
    }
    codes = run_jobs(folder, train, timeout=150)
    assert codes == {"one": [0], "two": [0] * 2, "four": [0] * 4}, [
        (folder / f"{name}.txt").read_text() for name in codes
    ]
    for name in ("one", "four"):
        shutil.copytree(folder / name, folder / f"{name}, flipped")
        flip(folder / f"{name}, flipped" / "checkpoints" / "step-00000004")
    other_loss = folder / "four, flipped" / "metrics.jsonl"
    other_loss.write_text(re.sub(r'"loss": ([\d.]+)', r'"loss": 1\1', other_loss.read_text()))
    before, steps = files(folder), "checkpoints/step-0000000"
    given = {
        "newest": (RERUN, 1, [str(folder / "one")]),
        "from a step": (RERUN, 1, [str(folder / "one" / f"{steps}2")]),
        "far": (RERUN, 1, [str(folder / "one" / f"{steps}2"), "--against", str(folder / "one" / f"{steps}5")]),
        "tries": (RERUN, 1, [str(folder / "one" / f"{steps}2"), "--steps", "2", "--times", "3"]),
        "another seed": (RERUN, 1, [str(folder / "one" / f"{steps}2"), "--train.seed", "7"]),
        "by a V": (RERUN, 2, [str(folder / "two" / f"{steps}2")]),
        "on four": (RERUN, 4, [str(folder / "four" / f"{steps}2")]),
        "one, flipped, found": (RERUN, 1, [str(folder / "one, flipped" / f"{steps}2")]),
        "four, flipped, found": (RERUN, 4, [str(folder / "four, flipped" / f"{steps}2")]),
        "four on two": (RERUN, 2, [str(folder / "four")]),
        "damaged": (RERUN, 2, [str(folder / "none")]),
    }
    codes = run_jobs(folder, given, timeout=150)
    after = {name: file for name, file in files(folder).items() if Path(name).parent != folder}
    assert after == {name: file for name, file in before.items() if Path(name).parent != folder}  # nothing is written
    return Runs(folder, codes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "ranks", "steps", "metrics"),
    [
        ("newest", 1, "step 5", "step 5 with 1 line"),
        ("from a step", 1, "steps 3 to 4", "step 4 with 1 line"),
        ("far", 1, "steps 3 to 5", "steps 4 to 5 with 2 lines"),
        ("tries", 1, "steps 3 to 4", "step 4 with 1 line"),
        ("by a V", 2, "steps 3 to 4", "step 4 with 1 line"),
        ("on four", 4, "steps 3 to 4", "step 4 with 1 line"),
    ],
)
def test_the_same_bits(runs: Runs, job: str, ranks: int, steps: str, metrics: str) -> None:
    told = runs.told(job)
    assert runs.codes[job] == [0] * ranks and "warning" not in told, told
    assert f"run       {steps}\n" in told and f"gradient norm of {metrics} of " in told, told
    assert told.count("equal ") == (2 if job == "tries" else 1) and "DIFFERENT" not in told
    count = len(read_manifest(runs.folder / "one" / "checkpoints" / "step-00000005").tensors)
    assert f"{count} tensors" in told


@pytest.mark.slow
def test_a_bit_that_is_wrong_is_found_and_named(runs: Runs) -> None:
    for name, ranks in (("one", 1), ("four", 4)):
        told = runs.told(f"{name}, flipped, found")
        assert runs.codes[f"{name}, flipped, found"] == [1] * ranks, told
        assert told.count(FLIPPED) == 1 and f"  {FLIPPED}: 1 of " in told and "first [0, 3]" in told, told
        assert "DIFFERENT 1 tensor\n" in told
    assert re.search(r"DIFFERENT loss of step 4: [\d.]+ now, 1[\d.]+ in ", runs.told("four, flipped, found"))
    assert "DIFFERENT loss" not in runs.told("one, flipped, found")


@pytest.mark.slow
def test_other_settings_are_told_and_give_other_bits(runs: Runs) -> None:
    told = runs.told("another seed")
    assert runs.codes["another seed"] == [1] and "train.seed 0 -> 7" in told and "DIFFERENT" in told, told


@pytest.mark.slow
def test_what_cannot_be_is_refused(runs: Runs, tmp_path: Path) -> None:
    told, one = runs.told("four on two"), runs.folder / "one"
    assert runs.codes["four on two"] == [2, 2] and len(told.splitlines()) == 1, told
    assert "python -m tools.launch --nproc-per-node 4 -m tools.rerun_step " in told
    assert runs.codes["damaged"] == [2, 2] and len(runs.told("damaged").splitlines()) == 1
    newest = one / "checkpoints" / "step-00000005"
    for argv, problem in (
        ([], "PATH"),
        ([str(tmp_path)], "is no checkpoint"),
        ([str(newest)], "last step"),
        ([str(one), "--times", "1"], "--times is 1"),
        ([str(one), "--steps", "0"], "--steps"),
        ([str(one / "checkpoints" / "step-00000002"), "--steps", "4"], "beyond the 5"),
        ([str(one), "--times", "2", "--against", str(one)], "--against"),
        ([str(newest), "--against", str(one / "checkpoints" / "step-00000002")], "last step"),
        ([str(one / "checkpoints" / "step-00000002"), "--against", str(runs.folder / "two")], "one layout"),
        ([str(one), "--trian.steps", "2"], "train.steps"),
        ([str(one), "--parallel.tensor_parallel_size", "2"], "tensor"),
    ):
        with pytest.raises(ConfigError, match=re.escape(problem)):
            main(argv, World())
    shutil.copytree(newest.parent, tmp_path / "cut")
    file = tmp_path / "cut" / "step-00000004" / "rank-00000.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="step-00000004"):
        main([str(tmp_path / "cut")], World())


@pytest.mark.parametrize("kind", ["adamw, fp8", "adafactor, fp32"])
def test_every_kind_of_state_is_compared(kind: str) -> None:
    a = assembled(kind, Layout(1, {}), World())
    then = kept(a)
    compared = compare_state(a, then)
    assert not compared.apart and {"weights", "average"} < {name.partition("/")[0] for name in compared.names}
    master = a.store.buckets[0].master
    master.view(torch.int32)[5] ^= 1
    a.optimizer.steps += 1
    apart = compare_state(a, then).apart
    assert [tensor.found.count for tensor in apart] == [1, 1]
    assert apart[0].name.startswith("weights/") and apart[1].name == "optimizer.steps"
