"""What `--grid` takes, and which of its entries can be run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from tools.benchmark.bench import read_config
from tools.benchmark.sweep.grid import Layout, Place, layouts_of, read_grid, settings, to_yaml

FLAGS = ["--model.width", "16", "--model.depth", "2", "--model.num_heads", "2", "--model.image_size", "16"]
FLAGS += ["--model.num_classes", "4", "--train.global_batch_size", "16"]


def layouts(grid: str, ranks: int = 2, cores: int | None = 2, flags: list[str] | None = None) -> list[Layout]:
    place = Place(ranks=ranks, threads=None, cores=cores, device_type="cpu")
    return layouts_of(read_grid(grid), FLAGS if flags is None else flags, place)


def test_names_and_values() -> None:
    text = "tensor=1,2  sequence=true,false optimizer.name=adamw,muon model.image_size=[16,32],16"
    text += " optimizer.betas=[0.9,0.99] model.stages=[{depth: 2, width: 96, num_heads: 4}],null"
    assert read_grid(text) == {
        "tensor": [1, 2],
        "sequence": [True, False],
        "optimizer.name": ["adamw", "muon"],
        "model.image_size": [[16, 32], 16],
        "optimizer.betas": [[0.9, 0.99]],
        "model.stages": [[{"depth": 2, "width": 96, "num_heads": 4}], None],
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("tensor", "name=value"),
        ("=1", "name=value"),
        ("tensor=", "no values"),
        ("tensor=1,,2", "''"),
        ("tensor=1,2,", "''"),
        ("optimizer.name=,adamw", "''"),
        ("micro=010", "is 8 in YAML"),
        ("data.kind=digits", "nothing that a step"),
        ("train.steps=5,10", "nothing that a step"),
        ("model.stages=[{depth: 2, width: 96}]", "list of groups"),
        ("model.attention=[full,[window]]", r"'\[full,\[window\]\]'"),
        ("tensor=1,1", "twice"),
        ("tensor=1 tensor=2", "twice"),
        ("tensor=1 parallel.tensor_parallel_size=2", "short"),
        ("tensr=1,2", "did you mean tensor"),
        ("zero_stage=1", "did you mean parallel.zero_stage"),
        ("colour=red", "unknown name colour"),
        ("tensor=x", "'x'"),
        ("zero=7", "'7'.*0, 1, 2 or 3"),
        ("ranks=0", "ranks.*positive"),
        ("threads=1.5", "threads.*positive"),
        ("model.image_size=[16,32", "no YAML"),
        ("micro=" + ",".join(map(str, range(1, 70))) + " batch=" + ",".join(map(str, range(1, 70))), "4761 entries"),
    ],
)
def test_mistakes_in_a_grid(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        read_grid(text)
    assert "\n" not in str(caught.value)


def test_the_whole_product_in_order_and_what_does_not_fit() -> None:
    found = layouts("tensor=1,2 pipeline=1,2 micro=4,8 zero=0,3")
    assert [layout.entry["tensor"] for layout in found] == [1] * 8 + [2] * 8
    fit = [layout for layout in found if layout.why is None]
    assert [layout.shape for layout in fit] == ["1x2x1x1"] * 4 + ["2x1x1x1"] * 2 + ["1x1x1x2"] * 2
    assert len({layout.identity for layout in fit}) == 8
    for layout in found[12:]:
        assert layout.why is not None and "tensor 2 x pipeline 2" in layout.why and "\n" not in layout.why
    alike = found[5]  # ZeRO on one data rank
    assert alike.why is not None and alike.why.startswith(f"the same as {found[4].name}: parallel.zero_stage 3")


def test_ranks_and_threads_are_names_too() -> None:
    found = layouts("ranks=1,2,4 dtype=fp32,bf16")
    assert [(layout.ranks, layout.threads) for layout in found] == [(1, 2)] * 2 + [(2, 1)] * 2 + [(4, 1)] * 2
    assert [layout.threads for layout in layouts("threads=1,3")] == [1, 3]
    assert layouts("tensor=1", cores=None)[0].threads is None


def test_a_key_alone_is_the_first_of_its_kind_even_if_it_does_nothing() -> None:
    (only,) = layouts("zero=3", ranks=1)
    assert only.why is None


def test_where_nothing_fits() -> None:
    with pytest.raises(ConfigError, match=r"no entry can be; tensor=2 pipeline=2: 2 ranks"):
        layouts("tensor=2 pipeline=2")
    with pytest.raises(ConfigError, match=r"unknown key model\.wdth"):
        layouts("tensor=1", flags=["--model.wdth", "3"])
    for flags in (["--train.micro_batch_size", "16"], ["--train.micro_batch_size=16"]):
        with pytest.raises(ConfigError, match=r"--train\.micro_batch_size and micro"):
            layouts("micro=4,8", flags=[*FLAGS, *flags])


def test_what_hangs_on_no_step_changes_no_hash() -> None:
    def identity(*flags: str) -> str:
        return layouts("tensor=1", flags=[*FLAGS, *flags])[0].identity

    assert identity() == identity("--run_dir", "x") == identity("--log.interval", "3", "--schedule.name", "constant")
    assert identity() == identity("--train.micro_batch_size", "8")  # what it resolves to
    assert identity() != identity("--train.micro_batch_size", "4")


@pytest.mark.parametrize("flags", [["--config", "configs/digits_pyramid.yaml"], [*FLAGS, "--train.freeze", "embed"]])
def test_ranks_are_given_what_was_checked(flags: list[str], tmp_path: Path) -> None:
    (layout,) = layouts("optimizer.betas=[0.8,0.9]", flags=flags)
    keys, file = settings(layout.config), tmp_path / "config.yaml"
    assert keys["optimizer.betas"] == [0.8, 0.9] and "train.steps" not in keys
    file.write_text(to_yaml(keys))
    assert settings(read_config(["--config", str(file)])) == json.loads(json.dumps(keys)) == keys
