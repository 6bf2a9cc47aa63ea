"""Runs on images of which some are bad: the same in every layout, and after a stop."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data import BadSampleError, TooManyBadError
from engine.config.cli import parse
from engine.run.trainer import pretrain
from parallel import process_group
from parallel.comm import PeerLostError
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.small import flags

BAD = ("a/2.png", "b/5.png", "a/9.png", "b/11.png")
GIVEN = {"data__kind": "image_folder", "train__steps": "4", "data__max_bad_share": "0.4", "model__num_classes": "2"}
GIVEN |= {"data__flip": "true", "parallel__timeout": "60", "train__eval_interval": "2", "train__micro_batch_size": "2"}
GIVEN |= {"checkpoint__save_interval": "2"}

# What two ranks do; the last goes on from where the one before it stopped, in another layout.
LAYOUTS: dict[str, dict[str, str]] = {
    "pipeline": {"parallel__pipeline_parallel_size": "2"},
    "both ends": {"parallel__pipeline_parallel_size": "2", "parallel__schedule": "zb_v"},
    "tensor": {"parallel__tensor_parallel_size": "2", "data__share_decoding": "never"},
    "tensor, each a part": {"parallel__tensor_parallel_size": "2"},
    "data": {},
    "stopped": {"parallel__pipeline_parallel_size": "2", "train__stop_step": "2"},
    "resumed": {},
}


def trained(world: World, folder: str, layouts: Mapping[str, Mapping[str, str]]) -> None:
    for name, changes in layouts.items():
        run_dir = {"run_dir": f"{folder}/{'stopped' if name == 'resumed' else name}", "data__path": f"{folder}/photos"}
        argv = flags(**GIVEN | run_dir | changes)
        size = argv.index("--data.size")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process_group, "start", lambda *_: None)  # it is there, and stays
            patch.setattr(process_group, "stop", lambda: None)
            pretrain(parse(argv[:size] + argv[size + 2 :])[0], world)


def on_two_ranks(world: World, folder: str) -> str:
    """All layouts, and then how a run ends for a rank where no sample may be bad, and one of the two finds one."""
    trained(world, folder, LAYOUTS)
    try:
        trained(world, folder, {"strict": LAYOUTS["tensor, each a part"] | {"data__max_bad_share": "0"}})
    except (BadSampleError, PeerLostError) as error:
        return type(error).__name__
    return "well"


def test_bad_samples_are_the_same_in_every_layout_and_after_a_stop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, number in ((name, number) for name in "ab" for number in range(12)):
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, size=(8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    for file in BAD:
        (tmp_path / "photos" / file).write_bytes(b"no image")
    trained(World(), str(tmp_path), {"alone": {}})
    assert sorted(run_ranks(2, on_two_ranks, str(tmp_path))) == ["BadSampleError", "PeerLostError"]
    expected = told(tmp_path / "alone")
    assert {file for file in BAD for line in expected["bad_samples"] if file in line["cause"]} == set(BAD)
    assert {line["event"] for line in expected["bad_samples"]} == {"train", "eval"}
    parts, alone = told(tmp_path / "tensor, each a part"), told(tmp_path / "tensor")
    for name in ("loss", "grad_norm", "accuracy", "bad_samples", "images"):
        assert [line.get(name) for line in parts["metrics"]] == [line.get(name) for line in alone["metrics"]], name
    for name in ("pipeline", "both ends", "tensor", "tensor, each a part", "data", "stopped"):
        found = told(tmp_path / name)
        assert found["bad_samples"] == expected["bad_samples"], name
        for one, other in zip(found["metrics"], expected["metrics"], strict=True):
            assert one["event"] == other["event"] and one["step"] == other["step"]
            for key in {"bad_samples", "images", "loss", "grad_norm", "accuracy"} & other.keys():
                assert one[key] == pytest.approx(other[key], rel=1e-4), (name, key, one["step"])


def test_pairs_that_are_all_bad_are_too_many(tmp_path: Path) -> None:
    """Before there are figures of none."""
    for part, number in (("photos", 0), ("photos", 1), ("held_out", 2)):
        for name in "ab":
            file = tmp_path / part / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(file)
            if part == "held_out":
                file.write_bytes(b"no image")
    keys = {"data__val_path": f"{tmp_path}/held_out", "train__steps": "1", "train__global_batch_size": "2"}
    keys |= {"objective": "contrastive", "contrastive__pairs": "views", "model__num_classes": "0"}
    with pytest.raises(TooManyBadError, match=r"^2 of 2 held-out samples are bad so far, .* allows 1: mend"):
        trained(World(), str(tmp_path), {"alone": keys})


def told(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """What the files of a run say of steps and evaluations, without times."""
    found = {}
    for name in ("bad_samples", "metrics"):
        lines = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
        lines = [line for line in lines if line["event"] in ("train", "eval")]
        found[name] = [{key: value for key, value in line.items() if key != "wall_time"} for line in lines]
    return found
