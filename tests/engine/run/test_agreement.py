"""Ranks that were started differently are told what differs, before the first step and whatever it is."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from engine.config.cli import parse
from engine.errors import ConfigError
from engine.run import agreement
from engine.run.agreement import check_agreement, code_version
from engine.run.trainer import pretrain
from parallel import process_group
from parallel.grid import world_axis
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import flags

# what rank 1 is given, and what must be named; None: the ranks agree
STARTS: dict[str, tuple[dict[str, str], str | None]] = {
    "alike": ({}, None),
    "width": ({"model__width": "32"}, "model.width differs between ranks: 16 on rank 0, 32 on rank 1"),
    "rate": ({"optimizer__lr": "0.5"}, "optimizer.lr differs between ranks: 0.001 on rank 0, 0.5 on rank 1"),
    "seed": ({"train__seed": "7"}, "train.seed differs between ranks: 0 on rank 0, 7 on rank 1"),
    "batch": ({"train__global_batch_size": "16"}, "train.global_batch_size differs between ranks: 8 on rank 0, 16"),
    "type": ({"precision__dtype": "bf16"}, "precision.dtype differs between ranks: 'fp32' on rank 0, 'bf16' on rank 1"),
    "steps": ({"train__steps": "2"}, "train.steps differs between ranks: 1 on rank 0, 2 on rank 1"),
    "grid": ({"parallel__tensor_parallel_size": "2"}, "parallel.tensor_parallel_size differs between ranks: 1 on"),
    "timeout": ({"parallel__timeout": "9"}, "parallel.timeout differs between ranks: 60.0 on rank 0, 9.0 on rank 1"),
    "path": ({"data__path": "two"}, None),  # the same images in another place
    "files": ({}, "list of training images differs between ranks: 16 of "),
    "code": ({}, "version of this code differs between ranks: {} on rank 0, other on rank 1"),
}


def started(world: World, folder: str) -> dict[str, str]:
    """How each of STARTS ends."""
    ended = {}
    for name, (given, _) in STARTS.items():
        argv = flags(**{"run_dir": f"{folder}/run {name}", "parallel__timeout": "60"} | (given if world.rank else {}))
        if name in ("path", "files"):
            argv = ["--data.kind", "image_folder", "--data.path", "one", *argv]  # of two flags the latter wins
            for unwanted in ("--data.kind", "--data.size"):
                place = len(argv) - 1 - argv[::-1].index(unwanted)
                del argv[place : place + 2]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process_group, "start", lambda *_: None)  # it is there, and stays
            patch.setattr(process_group, "stop", lambda: None)
            patch.chdir(f"{folder}/{world.rank}")  # as on hosts with disks of their own
            if name == "code" and world.rank:
                patch.setattr(agreement, "code_version", lambda: "other")
            try:
                config, _ = parse(argv)
                pretrain(config, world)
                ended[name] = "trained"
            except ConfigError as error:
                ended[name] = str(error)
    return ended


def test_what_differs_is_named_on_every_rank(tmp_path: Path) -> None:
    for name, image in product(("0/one/a", "0/one/b", "1/one/a", "1/one/b", "1/two/a", "1/two/b"), range(10)):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name / f"{image}.png")
    (tmp_path / "1" / "one" / "a" / "0.png").rename(tmp_path / "1" / "one" / "a" / "x.png")
    first, second = run_ranks(2, started, str(tmp_path))
    assert first == second
    for name, (_, expected) in STARTS.items():
        if expected is None:
            assert first[name] == "trained"
        else:
            assert first[name].startswith(expected.replace("{}", code_version())), first[name]


def facts(world: World) -> list[str]:
    found = []
    for own in ({}, {"b": "2"}, {"b": "2", "c": "3"}):
        mine: dict[str, str] = {"a": "1", "b": "1", **(own if world.rank == 1 else {})}
        try:
            check_agreement(mine, world_axis(world))
            found.append("alike")
        except ConfigError as error:
            found.append(str(error).partition(";")[0])
    return found


def test_ranks_are_named_by_what_they_have() -> None:
    assert (
        run_ranks(3, facts)
        == [
            [
                "alike",
                "b differs between ranks: 1 on ranks 0, 2, 2 on rank 1",
                "b differs between ranks: 1 on ranks 0, 2, 2 on rank 1 (so do c)",
            ]
        ]
        * 3
    )
    check_agreement({"a": "1"}, world_axis(World()))
