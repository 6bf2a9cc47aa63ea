"""The benchmark against FSDP2 and DeepSpeed: that every program does the same mathematics, and says all it should."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import Config, TrainConfig
from engine.errors import ConfigError
from model import ModelConfig, VisionTransformer
from parallel.process_group import World
from tools.benchmark import peer_limit, peers
from tools.benchmark.eager_vit import EagerSizes, EagerViT, name_in_vitruvius, parameter_groups
from tools.benchmark.peer_coordinator import PEERS, check_plain
from tools.benchmark.peer_pipeline import Piece
from tools.benchmark.peer_programs import Task
from tools.benchmark.turns import Program, ProgramFailedError, started

ROOT = Path(__file__).parents[2]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
MODEL = {
    "width": 64, "depth": 2, "num_heads": 2, "mlp_dim": 128, "image_size": 32, "num_classes": 10,
    "block": "sequential", "position": "learned_1d", "pool": "cls", "bias": True, "qk_norm": False,
}  # fmt: skip
FLAGS = [f"--model.{name}={str(value).lower()}" for name, value in MODEL.items()]
PIPELINE = [
    "--parallel.pipeline_parallel_size", "2", "--parallel.schedule", "zb_v", "--train.global_batch_size", "8",
]  # fmt: skip
FIELDS = {
    "model", "program", "ranks", "threads_per_rank", "global_batch", "dtype", "matmul", "step_time_ms",
    "images_per_second", "time_over_vitruvius", "peak_memory_MiB_per_rank", "imports_MiB_per_rank",
    "above_imports_MiB_per_rank", "cpu_share_while_waiting", "largest_loss_difference",
}  # fmt: skip


def small(**changes: object) -> Config:
    return Config(model=ModelConfig(**(MODEL | changes)), train=TrainConfig(steps=1)).resolve(1)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("against", ["fsdp2,fsdp2_keep,fsdp2_recompute", "deepspeed,deepspeed_recompute"])
def test_all_programs_do_the_same_mathematics(against: str, tmp_path: Path) -> None:
    if against.startswith("deepspeed") and not PEERS_PYTHON.exists():
        pytest.skip("needs DeepSpeed's environment: make peers")
    command = [sys.executable, "-m", "tools.benchmark", "peers", "--against", against, "--rounds", "2", *FLAGS]
    more = ["--parallel.zero_stage", "1", "--train.global_batch_size", "8", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["program"] for row in rows] == ["vitruvius (ZeRO-1)", "eager", *against.split(",")]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["largest_loss_difference"] < 1e-4
        assert row["peak_memory_MiB_per_rank"] > row["imports_MiB_per_rank"] > 50
        assert row["step_time_ms"] > 0 and row["time_over_vitruvius"] > 0
        assert row["cpu_share_while_waiting"] < 0.5  # blocked, not spinning
    losses = [line.split()[1:] for line in done.stdout.splitlines()[2:6]]
    assert all(len(step) == len(rows) for step in losses)
    assert len({step[0] for step in losses}) == 4, "the weights change from step to step"


@pytest.mark.slow
def test_the_pipeline_of_torch_does_the_same_mathematics(tmp_path: Path) -> None:
    flags = ["--against", "torch_pipeline", "--rounds", "2", *FLAGS, "--model.depth", "3", *PIPELINE]
    peers.main([*flags, "--train.micro_batch_size", "2", "--json", str(tmp_path / "rows.json")], World())
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["program"] for row in rows] == ["vitruvius (zb_v)", "torch_pipeline"]
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["largest_loss_difference"] < 1e-4


def test_the_pieces_of_a_pipeline_are_the_eager_model() -> None:
    sizes = EagerSizes.of(small().model.sizes)
    whole, pieces = EagerViT(sizes), [Piece(sizes, range(*cut)) for cut in ((0, 1), (1, 2), (2, 4))]
    weights = whole.state_dict()
    for piece in pieces:
        piece.load_state_dict({name: weights[name] for name in piece.state_dict()})
    assert sum(len(piece.state_dict()) for piece in pieces) == len(weights)
    x = images = torch.randn(2, 3, 32, 32)
    for piece in pieces:
        x = piece(x)
    assert torch.equal(x, whole(images))


def test_the_eager_model_is_ours() -> None:
    config = small()
    ours, plain = VisionTransformer(config.model), EagerViT(EagerSizes.of(config.model.sizes))
    weights = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights.pop(name_in_vitruvius(name)).view_as(parameter))
    assert not weights
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(plain(images), ours.logits(images), atol=1e-5, rtol=1e-5)


def test_what_decays() -> None:
    model = EagerViT(EagerSizes.of(small().model.sizes))
    decay, rest = (group["params"] for group in parameter_groups(model.named_parameters(), 0.1))
    assert {p.dim() for p in decay} == {2, 4}
    assert {p.dim() for p in rest} == {1, 3}


@pytest.mark.parametrize("change", [{"registers": 1}, {"pool": "gap"}, {"norm": "rmsnorm"}, {"drop_path": 0.1}])
def test_other_models_are_refused(change: dict[str, object]) -> None:
    check_plain(small())
    with pytest.raises(ConfigError, match=f"model.{next(iter(change))}"):
        check_plain(small(**change))


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        (["--against", "fsdp3"], World(), "fsdp3.*" + ".*".join(PEERS)),
        (["--against", "fsdp2"], World(rank=0, size=2, local_rank=0, local_size=2), "without a launcher"),
        (["--against", "fsdp2", "--rounds", "1"], World(), "at least 2"),
        (["--against", "fsdp2", "--memory-only"], World(), "--memory-limit"),
        (["--against", "fsdp2", "--parallel.pipeline_parallel_size", "2", *FLAGS], World(), "data parallelism"),
        (["--against", "torch_pipeline", *FLAGS], World(), "--parallel.pipeline_parallel_size 2"),
        (["--against", "torch_pipeline,fsdp2", *PIPELINE, *FLAGS], World(), "alone"),
        (["--against", "torch_pipeline", *PIPELINE[:2], "--parallel.schedule", "zb_h1", *FLAGS], World(), "zb_v"),
        (["--against", "torch_pipeline", *PIPELINE, "--precision.dtype", "bf16", *FLAGS], World(), "fp32"),
        (["--against", "deepspeed", "--peers-python", "nowhere/python", *FLAGS], World(), "make peers"),
    ],
)
def test_mistakes_are_told_before_anything_starts(options: list[str], world: World, message: str) -> None:
    flags = ["--parallel.zero_stage", "1", "--train.global_batch_size", "8"]
    with pytest.raises(ConfigError, match=message):
        peers.main([*options, *flags], world)


def test_a_program_that_ends_says_why(tmp_path: Path) -> None:
    program = Program(
        name="broken", interpreter=sys.executable, module="json.tool", ranks=2, threads=1, task={}, environment={}
    )  # fmt: skip
    with pytest.raises(ProgramFailedError, match=r"broken: rank \d ended with code [12]"), started([program], tmp_path):
        raise AssertionError("it cannot have started")


def test_programs_of_other_environments_count_memory_without_our_libraries() -> None:
    code = "import sys, tools.benchmark.resident as r; r.resident_bytes(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert not {"torch", "model"} & set(loaded)


def test_a_program_over_the_limit_does_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    def row(program: str, memory: float) -> dict[str, object]:
        return {
            "program": program, "above_imports_MiB_per_rank": memory, "time_over_vitruvius": 1.5,
            "lower_quartile": 1.4, "upper_quartile": 1.6,
        }  # fmt: skip

    rows = peer_limit.judge([row("vitruvius", 90), row("fsdp2", 101), row("fsdp2_recompute", 100)], 100 * 2**20)
    assert [one["within_limit"] for one in rows] == [True, False, True]
    assert [one["time_over_vitruvius"] for one in rows] == [1.5, None, 1.5]
    assert "fsdp2 takes 101 MiB" in capsys.readouterr().out
    assert not any(one["time_over_vitruvius"] for one in peer_limit.judge([row("vitruvius", 102)], 101 * 2**20))


def test_the_limit_and_the_budget_that_keeps_it() -> None:
    task = Task(
        program="", sizes={}, dtype="fp32", matmul="mkl", lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
        weights="", batches="", shares=2, distinct=1, flags=[], settings={},
    )  # fmt: skip
    taken = {"fsdp2": 200 * 2**20, "fsdp2_recompute": 100 * 2**20}

    def peak(name: str, tried: Task, *, system_malloc: bool = False) -> int:
        holes = (name == "fsdp2" and not system_malloc) * 50 * 2**20
        return holes + taken.get(name, 0) or 20 * 2**20 + int(1.2 * int(tried.flags[-1]))

    limit, fitted = peer_limit.apply("auto", task, peak)
    assert limit == 150 * 2**20
    assert fitted.flags[:3] == ["--recompute.policy", "auto", "--recompute.memory_budget"]
    assert 0.8 * limit < peak("vitruvius", fitted) <= limit
    again = peer_limit.found(limit, fitted)
    assert again[:2] == ["--memory-limit", str(limit)] and again[2:] == fitted.flags
    by_hand = replace(task, flags=["--recompute.policy", "full"])
    assert peer_limit.apply("1GiB", by_hand, peak) == (2**30, by_hand)
    for wanted, why in (("much", "no amount"), ("10MiB", "every budget")):
        with pytest.raises(ConfigError, match=why):
            peer_limit.apply(wanted, task, peak)
    taken["fsdp2"] = taken["fsdp2_recompute"]
    with pytest.raises(ConfigError, match="saves FSDP2 nothing"):
        peer_limit.apply("auto", task, peak)
