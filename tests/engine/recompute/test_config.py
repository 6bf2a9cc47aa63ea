"""The group `recompute`: every form of a policy and a budget, what comes of it, and each mistake in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.assemble import assemble
from engine.config import Config, RecomputeConfig, TrainConfig
from engine.config.cli import parse
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.frozen import frozen_of
from engine.objectives import make_objective
from engine.plan import META
from engine.recompute import SAVE_SETS
from engine.recompute.assignment import assignment
from model.regions import Keep
from parallel.config import ParallelConfig
from parallel.grid import GridShape, planned_grid
from tests.engine.config.test_config import pyramid
from tests.engine.small import flags, small

DEPTH = 4  # of the small model
BUDGET = "recompute.memory_budget is "
UNITS = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
CURES = ("a whole number of bytes", "800MiB", "0.7", "auto")


def keeping(policy: str | Sequence[str], **changes: Any) -> Config:
    policy = policy if isinstance(policy, str) else tuple(policy)
    return small(recompute=RecomputeConfig(policy=policy), **changes)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("none", ["all"] * 4),
        (" full ", ["input+gather"] * 4),
        ("selective", ["qk_norm"] * 4),
        ("qkv", ["qkv"] * 4),  # one save set for all blocks
        ("input+gather", ["input+gather"] * 4),
        ("qk_norm-attention", ["qk_norm-attention"] * 4),
        ("all+offload, qkv, input+gather+offload * 2", ["all+offload", "qkv", *["input+gather+offload"] * 2]),
        ("[norm-fc1+gather, all] * 2", ["norm-fc1+gather", "all"] * 2),
        ("input*2, all*2", ["input", "input", "all", "all"]),
        ("[norm, attention] * 2", ["norm", "attention"] * 2),
        ("[input, norm+gather] * 2", ["input", "norm+gather"] * 2),
        (["input", "all", "fc1", "all"], ["input", "all", "fc1", "all"]),
        (["input * 3", "all+gather"], ["input"] * 3 + ["all+gather"]),
    ],
)
def test_a_policy_is_a_save_set_per_block(tmp_path: Path, policy: str | list[str], expected: list[str]) -> None:
    config = keeping(policy)
    assert [of.name for of in config.recompute.sets(DEPTH)] == expected
    assert config.resolve(1).recompute == config.recompute
    (tmp_path / "given.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "given.yaml")])[0] == config
    if isinstance(policy, str):
        assert parse([*flags(), "--recompute.policy", policy])[0].recompute == config.recompute


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("ful", ["recompute.policy 'ful' is none of none, full, selective and auto", "all, norm, qk_norm, fc1"]),
        ("", ["recompute.policy names 0 blocks", "there are 4", "'input * 2, all * 2'"]),
        ([], ["recompute.policy names 0 blocks", "there are 4"]),
        ("input, full", ["recompute.policy: no save set is called 'full'", "all, norm, qk_norm"]),
        (["none"] * 4, ["recompute.policy: no save set is called 'none'", "take one of all, "]),
        (
            "input * 3",
            ["names 3 blocks", "there are 4", "one save set for all", "'input * 2, all * 2'"],
        ),
        ("norm-fc3", ["none, full, selective and auto", "'fc3' is nothing that can go", "norm, activation, qk_norm"]),
        ("input *", ["recompute.policy 'input *' is not a pattern", "'input * 6, all * 6'"]),
        ("input * 100000", ["recompute.policy 'input * 100000' names more than 10000 blocks"]),
    ],
)
def test_a_policy_that_cannot_be_is_refused(policy: str | list[str], parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        keeping(policy).resolve(1)
    for part in parts:
        assert part in str(caught.value)


def test_a_cure_for_any_depth() -> None:
    with pytest.raises(ValueError, match=r"'input \* 3, all \* 4'$"):
        RecomputeConfig(policy="input * 9").sets(7)
    with pytest.raises(ValueError, match=r"there is 1: give one save set for all, or 1 of them$"):
        RecomputeConfig(policy="input * 9").sets(1)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("auto", 900), (0.7, 700), ("0.7", 700), (1.0, 1000), (".5", 500), (8_000_000_000, 8_000_000_000), (1, 1),
        ("8_000", 8000), ("800MiB", 800 * 2**20), ("12GB", 12 * 10**9), ("1.5 gib", 3 * 2**29), ("1e3kB", 10**6),
        ("0.25TiB", 2**38), ("100B", 100), (" 2 KiB ", 2048), (1e-9, 1),
    ],
)  # fmt: skip
def test_budgets(tmp_path: Path, budget: str | int | float, expected: int) -> None:
    config = small(recompute=RecomputeConfig(policy="auto", memory_budget=budget))
    assert config.recompute.budget(1000) == expected
    (tmp_path / "given.yaml").write_text(config.to_yaml())
    assert parse(["--config", str(tmp_path / "given.yaml")])[0] == config
    given = parse([*flags(), "--recompute.policy=auto", f"--recompute.memory_budget={budget}"])[0]
    assert given.recompute.budget(1000) == expected


@pytest.mark.parametrize(
    ("budget", "cause"),
    [
        *((value, "must be positive") for value in (0, -5, 0.0, "-0.5", "0GB", "-3GiB")),
        *((value, "more than all of it") for value in (1.5, "70.0", 1e9)),
        *((value, f"whose unit is none of {UNITS}") for value in ("3GX", "1 apple", "5e")),
        *((value, "no amount of memory") for value in (float("nan"), "nan", "inf", "much", "", "true", "GB", "70%")),
        *((value, "no amount of memory") for value in ("1__0", "1_")),
        ("1" * 999, "no amount of memory"),
        ("0.1B", "less than a byte"),
        *((value, "more than 64 bits can count") for value in ("1e12TB", "9" * 30)),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget: str | float, cause: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        RecomputeConfig(policy="auto", memory_budget=budget)
    for part in (f"{BUDGET}{budget}", cause, *CURES):
        assert part in str(caught.value)


@pytest.mark.parametrize("policy", ["none", "full", "selective", "qkv", ("input * 2", "all * 2")])
def test_a_budget_of_another_policy_than_auto_is_refused(policy: str | tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"memory_budget 12GB has no effect with recompute.policy .*use policy auto"):
        RecomputeConfig(policy=policy, memory_budget="12GB")


def test_offloading_without_anybody_who_chooses_is_refused_and_on_a_cpu_it_is_told() -> None:
    with pytest.raises(
        ValueError, match=r"recompute.offload auto has no effect with recompute.policy full, .*\+offload"
    ):
        RecomputeConfig(policy="full", offload="auto")
    for recompute in (RecomputeConfig(policy="auto", offload="auto"), RecomputeConfig(policy="all * 3, qkv+offload")):
        for device, told in (("cpu", 1), ("cuda", 0)):
            lines = without_effect(small(recompute=recompute).resolve(1), GridShape(), device, 1)
            assert sum("host memory is the device's own" in line for line in lines) == told


@pytest.mark.parametrize("text", ["true", "[1]", "{a: 1}", "null"])
def test_a_budget_of_a_wrong_type_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "given.yaml").write_text(f"recompute: {{policy: auto, memory_budget: {text}}}\n")
    with pytest.raises(ConfigError, match=r"recompute.memory_budget is .*: it must be a text, an integer or a number$"):
        parse(["--config", str(tmp_path / "given.yaml")])


def test_gathering_again_where_nothing_is_gathered_is_told() -> None:
    told = "recompute.policy ...+gather: no rows are gathered"
    for config, shape, has_effect in (
        (keeping("norm+gather", parallel=ParallelConfig(tensor_parallel_size=2)), GridShape(tensor=2), True),
        (keeping("norm+gather"), GridShape(), False),
        (
            keeping("norm+gather", parallel=ParallelConfig(tensor_parallel_size=2, sequence_parallel=False)),
            GridShape(tensor=2),
            False,
        ),
        (keeping("norm"), GridShape(), True),
    ):
        lines = without_effect(config.resolve(shape.world_size), shape, "cpu", 1)
        assert any(line.startswith(told) for line in lines) != has_effect


def test_a_patch_merge_goes_with_the_block_before_it_and_a_frozen_front_keeps_nothing() -> None:
    def names(policy: str, *freeze: str) -> dict[str, str]:
        config = pyramid(
            recompute=RecomputeConfig(policy=policy),
            train=TrainConfig(steps=1, global_batch_size=8, freeze=freeze),
        ).resolve(1)
        layers = make_objective(config).layers
        passes = frozen_of(config, layers).passes
        return {name: of.name for name, of in assignment(config.recompute, layers, passes).items()}

    blocks = [f"blocks.{i}" for i in range(4)]
    for policy, merge in (("all, input, all, all", "input"), ("all, attention, input * 2", "all"), ("input", "input")):
        found = names(policy)
        assert list(found) == [*blocks[:2], "merges.0", *blocks[2:]]
        assert found["merges.0"] == merge
        assert [found[name] for name in blocks] == [of.name for of in RecomputeConfig(policy=policy).sets(4)]
    assert names("input", "embed", "blocks.[01]") == dict.fromkeys(["merges.0", *blocks[2:]], "input")
    assert names("input", "blocks.[01]") == names("input")  # gradients pass through these


def test_each_rank_recomputes_what_its_own_blocks_drop() -> None:
    config = keeping(
        "input, norm, all * 2", parallel=ParallelConfig(pipeline_parallel_size=2), train=TrainConfig(steps=1)
    ).resolve(2)
    first, second = (
        assemble(config, planned_grid(GridShape(pipeline=2), rank), META, device_memory=1e9) for rank in (0, 1)
    )
    assert first.recompute is not None
    assert first.recompute.sets == {"blocks.0": SAVE_SETS["input"], "blocks.1": SAVE_SETS["norm"]}
    assert second.recompute is None and isinstance(second.build.policy, Keep)
    assert first.sets == second.sets and list(first.sets) == [f"blocks.{i}" for i in range(4)]
    none = assemble(replace(config, recompute=RecomputeConfig()), planned_grid(GridShape(pipeline=2), 0), META)
    assert none.recompute is None
