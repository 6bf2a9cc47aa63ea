"""A checkpoint that is cut for another layout is what ranks of that layout would have saved, byte for byte."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine.checkpoint.config import CheckpointConfig
from engine.checkpoint.examine import compare
from engine.checkpoint.saver import Saver
from engine.checkpoint.states import restore
from engine.config import plain
from engine.errors import ConfigError
from engine.run.step import Stepper
from model.formats.base import ConversionError
from parallel.checkpoint.manifest import FILE, read_manifest
from parallel.checkpoint.read import Reader
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.checkpoint.test_layouts import KINDS, LAYOUTS, Layout, assembled
from tests.engine.precision.test_scaled import batches_of
from tests.engine.run.forked import running
from tests.engine.small import flags
from tools.convert.__main__ import main
from tools.convert.reshard import reshard

STEP = "step-00000001"
# By the layouts of the other test: how they are stated here.
STATED = {
    "data, copies": "data=4 zero=0",
    "data, sharded weights": "data=4, zero=3",
    "tensor of 4": "tensor=4 zero=0",
    "tensor x data, stage 2": "tensor=2 data=2 zero=2",
    "context x tensor, stage 3": "tensor=2 context=2 zero=3",
    "pipeline x data, stage 2": "pipeline=2 data=2 zero=2",
    "stages as a V x data, stage 3": "pipeline=2 data=2 zero=3",
}


def save(world: World, kind: str, layout: Layout, folder: Path, source: Path | None) -> None:
    """Of two steps from initial weights, or as it is in another checkpoint."""
    a = assembled(kind, layout, world, seed=0 if source is None else 1)
    if source is None:
        stepper = Stepper(a)
        for step in range(2):
            stepper.train_step(batches_of(stepper, step), 1e-3)
    else:
        with Reader(source / STEP) as reader:
            restore(a, reader)
            a.store.loaded()
    about = {"layout": asdict(a.grid.shape)}
    facts = {"config": plain(asdict(a.config)), "about": about}
    Saver(a, folder, CheckpointConfig(), facts).save(1, {"samples": 16, "step": 1}, {"loss": 1.0})
    a.grid.close()


def on_ranks(world: World, jobs: list[tuple[str, Layout, Path, Path]]) -> None:
    for kind, layout, source, to in jobs:
        save(world, kind, layout, to, source)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reshard")
    for number, kind in enumerate(KINDS):
        save(World(), kind, LAYOUTS["one"], path / f"{number}", None)
    return path


def keys(layout: Layout) -> list[str]:
    """Those that the statement has no word for."""
    words = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size", "zero_stage")
    return [part for k, v in layout.keys.items() if k not in words for part in (f"--parallel.{k}", str(v))]


def test_the_files_are_those_that_ranks_would_write(folder: Path) -> None:
    """Then back to one process, from files of several."""
    jobs = []
    for i, (name, stated) in enumerate(STATED.items()):
        number = i % len(KINDS)
        source, at = folder / f"{number}", folder / f"{number} {i}"
        reshard(source, at, stated, keys(LAYOUTS[name]), lambda line: None)
        if i % 2:
            reshard(at, folder / f"{at.name} back/{STEP}", "", ["--parallel.zero_stage", "0"], lambda line: None)
        jobs.append((list(KINDS)[number], LAYOUTS[name], source, folder / f"{at.name} saved"))
    run_ranks(4, on_ranks, jobs, timeout=120)
    for _, _, source, saved in jobs:
        there = saved.with_name(saved.name.removesuffix(" saved"))
        assert files_of(saved) == files_of(there)
        back = Path(f"{there} back")
        assert not back.exists() or files_of(source) == files_of(back)
        one, other = read_manifest(saved / STEP), read_manifest(there / STEP)
        same = replace(other, about={k: v for k, v in other.about.items() if k != "resharded"})
        assert {**vars(same), "config": 0, "about": 0} == {**vars(one), "config": 0, "about": 0}
        before = read_manifest(source / STEP)
        assert same.config == before.config and same.about == before.about
        with Reader(source / STEP) as first, Reader(there / STEP) as second:
            assert first.manifest.tensors.keys() == second.manifest.tensors.keys()
            assert all(not compare(first, second, name).differing for name in first.manifest.tensors)


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (path / STEP).iterdir() if file.name != FILE}


def test_what_no_rank_has_is_kept(folder: Path, tmp_path: Path) -> None:
    """Here the average, which a flag leaves out, and scales of 8-bit products."""
    said: list[str] = []
    path = reshard(
        folder / "4", tmp_path / "a", "data=2 zero=1", ["--optimizer.ema_decay", "null", "--precision.dtype", "bf16"],
        said.append,
    )  # fmt: skip
    with Reader(folder / "4" / STEP) as first, Reader(path) as second:
        assert first.manifest.tensors.keys() == second.manifest.tensors.keys()
        assert second.manifest.files[-1].name == "others.safetensors"
        assert all(not compare(first, second, name).differing for name in first.manifest.tensors)
    assert said[1].endswith("pipeline 1 x data 2 x context 1 x tensor 1, zero_stage 1: 2 ranks")


def test_a_run_goes_on_the_same_from_either(tmp_path: Path) -> None:
    given = {"train__steps": "4", "optimizer__ema_decay": "0.9", "model__drop_path": "0.1"}
    with running(tmp_path / "t", 1, flags(**given, train__stop_step="2", run_dir=str(tmp_path / "one"))) as run:
        assert run.codes() == [3], run.said()
    reshard(tmp_path / "one", tmp_path / "cut", "tensor=2", ["--parallel.zero_stage", "0"], lambda line: None)
    shutil.copytree(tmp_path / "one/checkpoints", tmp_path / "whole")
    two = given | {"parallel__tensor_parallel_size": "2", "checkpoint__resume": "must"}
    for name in ("whole", "cut"):
        argv = flags(**two, run_dir=str(tmp_path / f"run {name}"), checkpoint__dir=str(tmp_path / name))
        with running(tmp_path / name[0], 2, argv) as run:
            assert run.codes() == [0, 0], run.said()
            assert "saved by pipeline 1 x data 1 x context 1 x tensor 1" in run.said()
    with Reader(tmp_path / "whole/step-00000004") as one, Reader(tmp_path / "cut/step-00000004") as other:
        assert one.manifest.tensors.keys() == other.manifest.tensors.keys()
        assert all(not compare(one, other, name).differing for name in one.manifest.tensors)


REFUSED = {
    "tensor=3 data=": "none of tensor=N",
    "tensor=0": "none of tensor=N",
    "ranks=4": "none of tensor=N",
    "data=2 data=2": "says data twice",
    "zero=4": "parallel.zero_stage is 4",
    "tensor=16": "model.num_heads",
    "pipeline=9": "parallel.pipeline_parallel_size 9 is more than the 6 layers",
    "data=3": "train.global_batch_size 8 cannot be dealt to 3",
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_do_not_fit(layout: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[layout].replace(".", r"\.")):
        reshard(folder / "0", tmp_path / "a", layout)
    assert not list(tmp_path.iterdir())


def test_places_and_sources_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    def refused(source: Path, to: Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConversionError) as error:
            reshard(source, to, "data=2 zero=1", (), lambda line: None)
        assert sorted(tmp_path.rglob("*")) == before
        return str(error.value)

    (tmp_path / "taken").mkdir()
    assert "taken exists" in refused(folder / "0", tmp_path / "taken")
    assert "is of step 1" in refused(folder / "0", tmp_path / "step-00000007")
    assert "is no checkpoint" in refused(tmp_path / "taken", tmp_path / "a")
    at = Path(shutil.copytree(folder / "0" / STEP, tmp_path / STEP))
    data = bytearray((at / "rank-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (at / "rank-00000.safetensors").write_bytes(data)
    assert "the checksum of" in refused(at, tmp_path / "a")
    assert "the checksum of" in refused(at, tmp_path / f"a/{STEP}")


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--reshard", "data=2 zero=1", str(folder / "0"), str(tmp_path / "a"), "--parallel.bucket_mib", "1"]) == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["from", "for", "to", "reading"]
    with pytest.raises(ConversionError, match="--dtype"):
        main(["--reshard", "data=2", str(folder / "0"), str(tmp_path / "b"), "--dtype", "bf16"])
