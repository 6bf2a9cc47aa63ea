"""The pipeline of a configuration: the schedule that it builds, what a schedule's file asks of it, and one rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import build_datasets
from engine.config import Config, TrainConfig
from engine.config.cli import parse
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.run.agreement import facts_of
from engine.run.elastic import fit
from parallel.config import ParallelConfig
from parallel.pipeline import Schedule, compute_order, to_csv
from parallel.process_group import World
from tests.engine.small import small

CPU = torch.device("cpu")


def config_of(schedule: str, *, ranks: int = 2, batch: int = 16, micro: int | None = None, depth: int = 4) -> Config:
    return small(
        depth=depth,
        parallel=ParallelConfig(pipeline_parallel_size=ranks, schedule=schedule, elastic=True),
        train=TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro),
    )


def schedule_of(config: Config, world: int) -> Schedule:
    config = config.resolve(world)
    shape = config.grid_shape(world)
    return config.pipeline(shape).schedule(config.num_micro_batches(shape))


@pytest.fixture
def written(tmp_path: Path) -> str:
    """ZB-V of two ranks and eight micro-batches, as a file."""
    path = tmp_path / "written.csv"
    path.write_text(to_csv(compute_order("zb_v", 2, 8)))
    return str(path)


def test_a_file_says_how_many_micro_batches_and_stages_there_are(written: str) -> None:
    for world, size in ((2, 2), (4, 1)):
        assert config_of(written).resolve(world).train.micro_batch_size == size
        read, named = schedule_of(config_of(written), world), schedule_of(config_of("zb_v", micro=size), world)
        assert (read.ranks, read.stage_to_rank, read.num_micro_batches) == (named.ranks, named.stage_to_rank, 8)


@pytest.mark.parametrize(
    ("changes", "world", "parts"),
    [
        ({"micro": 4}, 2, ["is for 8 micro-batches", "global_batch_size 16", "is 4 of", "leave that out", "32"]),
        ({"batch": 12}, 2, ["global_batch_size 12", "8 micro-batches, that", "is for", "8 or 16"]),
        ({"ranks": 4}, 4, ["2 rows", "pipeline_parallel_size is 4"]),
        ({"depth": 1}, 2, ["is for 4 stages", "3 layers", "a file of at most 3 stages", "deeper model"]),
    ],
)
def test_a_file_that_does_not_fit(changes: dict[str, int], world: int, parts: list[str], written: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(written, **changes).resolve(world)
    for part in (written, *parts):
        assert part in str(caught.value)


def test_a_file_whose_micro_batches_leap_is_refused_at_once(tmp_path: Path) -> None:
    (path := tmp_path / "leaps.csv").write_text("0F0,0F99999999999999,0B0\n1F0,1B0\n")
    with pytest.raises(ConfigError, match=r"rank 0, cell 2: .*99999999999999"):
        config_of(str(path)).resolve(2)


def test_one_rank_has_nothing_to_schedule(written: str) -> None:
    for name in ("interleaved", "zb_v", "gpipe", written):
        config = config_of(name, ranks=1, micro=4)
        assert schedule_of(config, 1) == schedule_of(config_of("1f1b", ranks=1, micro=4), 1)
        assert [line.split(":")[0] for line in without_effect(config.resolve(1), config.grid_shape(1), "cpu", 1)] == [
            f"parallel.schedule {name}"
        ]
    for key, value in (("virtual_stages", 2), ("schedule_policy", "ready")):
        config = replace(config, parallel=replace(config.parallel, schedule="zb_v", **{key: value}))
        told = without_effect(config.resolve(1), config.grid_shape(1), "cpu", 1)
        assert any(f"parallel.{key} {value}" in line for line in told)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, ranks: int) -> None:
    (binary := tmp_path / "binary.csv").write_bytes(b"0F0\xff")
    for path in (tmp_path / "none.csv", tmp_path / ".csv", binary, Path("interleaved.csv")):
        with pytest.raises(ConfigError, match=f"parallel.schedule {path} (cannot be read|is no text)"):
            config_of(str(path), ranks=ranks).resolve(ranks)


def test_an_elastic_run_takes_as_many_ranks_as_its_file_can_be_dealt_to(
    written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for name, ranks in ((written, 4), ("1f1b", 8)):
        fitted, world, _ = fit(config_of(name), World(rank=0, size=8, local_rank=0, local_size=8))
        assert world.size == ranks
        assert schedule_of(fitted, world.size).num_micro_batches == (8 if name == written else 2)
    config = config_of(written, micro=4, batch=64)  # of the size that was given on two data ranks
    for size, micro in ((2, 8), (4, 4), (8, 2)):
        fitted, world, notes = fit(config, World(rank=0, size=size, local_rank=0, local_size=size))
        assert schedule_of(fitted, world.size).num_micro_batches == 8
        assert fitted.train.micro_batch_size == micro
        assert [f"train.micro_batch_size {micro}, not 4," in note for note in notes] == [True] * (micro != 4)


def test_ranks_compare_what_the_file_says(written: str) -> None:
    sets = build_datasets(small().data, image_size=(8, 8), channels=1, num_classes=10, seed=0)

    def fact(schedule: str, ranks: int = 2) -> str:
        return facts_of(config_of(schedule, ranks=ranks).resolve(ranks), CPU, *sets)["what parallel.schedule says"]

    before = fact(written)
    other = Path(written).with_name("other.csv")
    other.write_text(Path(written).read_text())
    assert fact(str(other)) == before
    Path(written).write_text(to_csv(compute_order("1f1b", 2, 8)))
    assert len({before, fact(written), fact("1f1b")}) == 3
    assert fact(str(other), ranks=1) == fact("1f1b", ranks=1)


def test_a_file_is_named_in_the_configuration_that_is_written(written: str) -> None:
    config = replace(config_of(written), run_dir="x")
    path = Path(written).with_name("config.yaml")
    path.write_text(config.resolve(2).to_yaml(config))
    assert parse(["--config", str(path)])[0].resolve(4).parallel.schedule == written
