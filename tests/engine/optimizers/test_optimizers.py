"""Each optimizer against its definition, on every way of dealing out the parameters."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod

import pytest
import torch
from torch import Tensor

from engine.optimizers import make_optimizer
from engine.optimizers.muon import orthogonalise
from model.kernels import Kernels
from parallel.comm import single_axis
from parallel.sharding.fragments import Fragments
from tests.distributed import run_ranks
from tests.engine.optimizers.fragmented import (
    CONFIG,
    SPECS,
    Layout,
    Run,
    Trained,
    build,
    logical,
    on_rank,
    options_of,
    run_here,
    set_gradients,
    single,
    whole,
    worst,
)
from tests.engine.optimizers.oracles import ORACLES, state_bytes, trained_by

NAMES = list(ORACLES)
LAYOUTS = {
    2: [Layout(data=2), Layout(tensor=2)],
    4: [Layout(data=4), Layout(data=2, tensor=2)],
}
SHARDED = [Run(name=name, layout=layout) for name in NAMES for layouts in LAYOUTS.values() for layout in layouts]


def name_of(run: Run) -> str:
    return f"{run.name}-data{run.layout.data}-tensor{run.layout.tensor}"


def staged(run: Run, stage: int) -> Run:
    return replace(run, layout=replace(run.layout, stage=stage))


@cache
def on_ranks(ranks: int) -> dict[Run, list[Trained]]:
    runs = [staged(run, stage) for run in SHARDED if run.layout.ranks == ranks for stage in (0, 1)]
    by_rank = run_ranks(ranks, on_rank, runs, timeout=120)
    return {run: [found[i] for found in by_rank] for i, run in enumerate(runs)}


def trained(run: Run) -> dict[str, Tensor]:
    return whole(run, on_ranks(run.layout.ranks)[run])


def assert_close(name: str, found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Differences relative to the largest movement of the parameter. One rounding of a weight is about 2e-6 of that:
    weights are some thirty times as large, and below 4.
    """
    if name == "adafactor":
        # A rounding error can move the momentum to the neighbouring bf16 number: 2^-8 of it, times the learning rate.
        differs = [
            (found[k] - v).abs() > tolerance * (v - logical(SPECS, 0)[k]).abs().max() for k, v in expected.items()
        ]
        assert sum(int(d.sum()) for d in differs) < 0.005 * sum(d.numel() for d in differs)
        tolerance = 2**-8
    assert worst(found, expected) < tolerance


@pytest.mark.parametrize("by_schedule", [False, True], ids=["decay-by-lr", "decay-by-schedule"])
@pytest.mark.parametrize("name", NAMES)
def test_one_process_follows_the_definition(name: str, by_schedule: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(name=name, decay_by_schedule=by_schedule)
    found = single(run)
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.double if name == "muon" else Tensor.bfloat16)
    assert_close(name, found, trained_by(ORACLES[name], by_schedule), 4e-5)


@pytest.mark.parametrize("run", SHARDED, ids=name_of)
def test_ranks_do_as_one_process(run: Run) -> None:
    found, expected = trained(staged(run, 1)), single(Run(name=run.name))
    if run.name in ("adamw", "muon"):  # nothing is summed over ranks
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    else:
        assert_close(run.name, found, expected, 1e-5)


@pytest.mark.parametrize("run", SHARDED, ids=name_of)
def test_stage_1_is_stage_0_bit_for_bit(run: Run) -> None:
    plain, sharded = trained(staged(run, 0)), trained(staged(run, 1))
    assert [name for name in plain if not torch.equal(plain[name], sharded[name])] == []


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_many_chunks_do_as_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = single(Run(name=name))
    monkeypatch.setattr("engine.optimizers.chunks._SIZE", {"cpu": 100})
    run = Run(name=name)
    assert_close(name, whole(run, [run_here(run)]), expected, 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_gets_the_rounded_weight(name: str) -> None:
    run = Run(name=name, mixed=True)
    found = run_here(run)
    for weight, model in ((weight, model) for _, _, weight, model in found.values()):
        assert model is not None and torch.equal(model, weight.bfloat16())
    expected = single(Run(name=name))
    masters = whole(run, [found])
    assert all(torch.equal(masters[name], value) for name, value in expected.items())


def test_plain_kernels_do_as_native_ones() -> None:
    for name in ("adamw", "muon"):
        assert worst(single(Run(name=name, kernels="reference")), single(Run(name=name))) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_state_exists_from_the_start_and_takes_what_it_should(name: str) -> None:
    states = [build(Run(name=name), device=device).state_tensors() for device in ("cpu", "meta")]
    for state in states:
        assert sum(t.nbytes for tensors in state.values() for t in tensors) == sum(state_bytes(name, s) for s in SPECS)
    assert {t.device.type for tensors in states[1].values() for t in tensors} == {"meta"}


def test_bytes_per_parameter_of_large_matrices() -> None:
    parameters = sum(prod(spec.shape) for spec in SPECS if spec.decay == "body" and spec.name != "small")
    used = {name: sum(state_bytes(name, s) for s in SPECS if s.decay == "body" and s.name != "small") for name in NAMES}
    assert {name: round(used[name] / parameters) for name in NAMES} == {
        "adamw": 8,
        "adafactor": 2,
        "lamb": 8,
        "muon": 4,
    }


@pytest.mark.parametrize("name", NAMES)
def test_state_belongs_to_arrays(name: str) -> None:
    optimizer = build(Run(name=name))
    for kind, tensors in optimizer.state_tensors().items():
        assert len(tensors) == len(optimizer.arrays)
        for tensor, array in zip(tensors, optimizer.arrays, strict=True):
            assert kind == "factors" or tensor.numel() in (0, array.weight.numel())


@pytest.mark.parametrize("name", NAMES)
def test_a_stage_of_frozen_layers_trains_nothing(name: str) -> None:
    nothing = Fragments(spans=[], fragments=[], axis=single_axis("all"), owned={}, trained={})
    config = type("Config", (), {**vars(CONFIG), "name": name})
    make_optimizer(config, nothing, Kernels("auto"), 2).update(lr=0.1, grad_factor=1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_at_rate_0_nothing_moves(name: str) -> None:
    optimizer = build(Run(name=name))
    set_gradients(optimizer.fragments, SPECS, 1)
    optimizer.update(lr=0.0, grad_factor=1.0, decay_factor=1.0)
    start = logical(SPECS, 0)
    assert all(torch.equal(f.weight.view(start[f.name].shape), start[f.name]) for f in optimizer.fragments.fragments)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_decay_only(name: str) -> None:
    optimizer = build(Run(name=name))
    optimizer.update(lr=0.1, grad_factor=1.0)
    assert optimizer.steps == 1
    start = logical(SPECS, 0)
    for fragment, spec in zip(optimizer.fragments.fragments, SPECS, strict=True):
        scale, decay = options_of(spec)
        # LAMB's step is as long as the weight, whatever the decay: lr times the weight itself
        keep = 1 - 0.1 * scale * (1.0 if name == "lamb" and decay else decay)
        torch.testing.assert_close(fragment.weight.view(spec.shape), start[spec.name] * keep)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_newton_schulz_is_that_of_torch(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    reference = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert torch.equal(orthogonalise(matrix.bfloat16()), reference)
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6 and values.max() < 1.3
