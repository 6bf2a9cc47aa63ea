"""Recipes, the trace of delayed scaling over steps, one reduction per step, and checkpoints of scales."""

import math

import pytest
import torch
from torch import Tensor

from parallel.comm import single_axis
from parallel.fp8 import Fp8Recipe, Fp8Registry, Fp8State, NativeBackend
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import run_ranks

CPU, ALONE = torch.device("cpu"), single_axis("data+context+tensor")


def _registry(names: list[str], **recipe: object) -> Fp8Registry:
    return Fp8Registry(names, recipe=Fp8Recipe(**recipe), backend=NativeBackend(CPU), device=CPU)  # type: ignore[arg-type]


def _matrix(amax: float) -> Tensor:
    return torch.tensor([[amax, -amax / 2], [0.0, amax / 4]])


def _see(state: Fp8State, grad: float) -> float:
    """Cast a gradient of this amax; the scale that was used."""
    return round(1 / state.quantise("grad", _matrix(grad), None).factor.item(), 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaling": "late"}, "fp8 scaling is 'late': it must be delayed or current"),
        ({"format": "e5m2"}, "fp8 format is 'e5m2': it must be hybrid or e4m3"),
        ({"algorithm": "last"}, "fp8 algorithm is 'last'"),
        ({"history": 0}, "fp8 history is 0"),
        ({"margin": -1}, "fp8 margin is -1"),
    ],
)
def test_recipes_that_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fp8Recipe(**values)  # type: ignore[arg-type]


def test_formats_and_scales() -> None:
    hybrid, plain = Fp8Recipe(), Fp8Recipe(format="e4m3")
    assert [hybrid.dtype(role) for role in ("input", "weight", "grad")] == [  # type: ignore[arg-type]
        torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2
    ]  # fmt: skip
    assert hybrid.limits(CPU).tolist() == [448, 448, 57344] and plain.limits(CPU).tolist() == [448] * 3
    amax = torch.tensor([2.0, 0.0, math.inf, math.nan, 1e-40])
    scales = Fp8Recipe(margin=1).scale(amax, 448.0, torch.full((5,), 9.0))
    assert scales.tolist() == [112, 9, 9, 9, 2.0**126]
    assert (1 / scales).isfinite().all()


def test_delayed_scaling_step_by_step() -> None:
    registry = _registry(["a", "b"], history=3, margin=1)
    state, other = registry.states["a"], registry.states["b"]
    limit = 57344 / 2  # e5m2, halved by the margin
    used, seen = [], []
    # Two casts per step: the history gets the larger amax. An amax of 0 or one that is not finite leaves no trace.
    for amaxes in (
        [0.0, 0.0],
        [8.0, 4.0],
        [1.0, 2.0],
        [math.inf, 16.0],
        [0.5, 0.25],
        [0.5, 0.5],
        [1.0, 1.0],
        [0.0] * 2,
    ):
        used.append([_see(state, amax) for amax in amaxes])
        registry.finish_step(ALONE)
        seen.append(([row[2] for row in state.history.tolist()], state.scales[2].item()))
    assert seen == [
        ([0, 0, 0], 1),
        ([8, 0, 0], limit / 8),
        ([2, 8, 0], limit / 8),
        ([0, 2, 8], limit / 8),  # the infinity, and the 16 beside it, are not in the history
        ([0.5, 0, 2], limit / 2),  # 8 has left the history
        ([0.5, 0.5, 0], limit / 0.5),
        ([1, 0.5, 0.5], limit / 1),
        ([0, 1, 0.5], limit / 1),
    ]
    assert used[:3] == [
        [1, 1],  # nothing to scale
        [limit / 8, limit / 4],  # no history yet: each by its own amax
        [limit / 8, limit / 8],  # by the last step
    ]
    assert math.isnan(used[3][0]) and used[3][1] == limit / 8
    assert used[4:] == [[limit / 8] * 2, [limit / 2] * 2, [limit / 0.5] * 2, [limit] * 2]
    assert not other.history.any() and other.scales.tolist() == [1, 1, 1]
    assert not state.history[:, :2].any() and registry.known == [[False, False, True], [False] * 3]


def test_current_scaling_keeps_nothing() -> None:
    registry = _registry(["a"], scaling="current", format="e4m3")
    state = registry.states["a"]
    for amax in (3.0, 0.01, 500.0):
        assert _see(state, amax) == round(448 / amax, 1)
        registry.finish_step(ALONE)
    assert registry.state_dict() == {} and state.history.shape == (0, 3)
    registry.load_state_dict({})


def test_evaluation_leaves_no_trace() -> None:
    registry = _registry(["a"], history=4)
    state = registry.states["a"]
    state.quantise("input", _matrix(5.0), None, record=False)
    assert not registry.amaxes.any()
    state.quantise("input", _matrix(3.0), None)
    assert registry.amaxes.tolist() == [[3, 0, 0]]


def test_a_weight_is_cast_once_per_step() -> None:
    registry = _registry(["a"], history=4)
    state, weight = registry.states["a"], torch.nn.Parameter(_matrix(2.0))
    first = state.quantise_weight(weight, None)
    assert state.quantise_weight(weight, None) is first
    registry.finish_step(ALONE)
    assert state.quantise_weight(weight, None) is not first
    assert registry.amaxes[0, 1] == 2
    second = state.quantise_weight(weight, None)
    with torch.no_grad():
        weight.mul_(4)
    assert state.quantise_weight(weight, None) is not second
    assert registry.amaxes[0, 1] == 8


def _train(registry: Fp8Registry, steps: range) -> None:
    for step in steps:
        for index, state in enumerate(registry.states.values()):
            state.quantise("input", _matrix(1.0 + (step * 7 + index) % 5), None)
            _see(state, 2.0**-step)
        registry.finish_step(ALONE)


def test_a_resumed_run_has_the_same_scales() -> None:
    whole, first = _registry(["a", "b"], history=4), _registry(["a", "b"], history=4)
    _train(whole, range(6))
    _train(first, range(3))
    saved = first.state_dict()
    assert {name: t.shape for name, t in saved.items()} == {
        "a.amax_history": (4, 3), "a.scale": (3,), "b.amax_history": (4, 3), "b.scale": (3,)
    }  # fmt: skip
    second = _registry(["a", "b"], history=4)
    second.load_state_dict(saved)
    assert second.known == first.known == [[True, False, True]] * 2
    _train(second, range(3, 6))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], tensor), name


def test_loading_into_other_stages_and_lengths() -> None:
    registry = _registry(["a", "b"], history=4)
    _train(registry, range(4))
    saved = registry.state_dict()
    for length in (2, 9):
        stage = _registry(["b"], history=length)
        stage.load_state_dict(saved)
        kept = min(length, 4)
        assert torch.equal(stage.states["b"].history[:kept], saved["b.amax_history"][:kept])
        assert not stage.states["b"].history[kept:].any()
        assert torch.equal(stage.states["b"].scales, saved["b.scale"])
    with pytest.raises(ValueError, match="no FP8 scales of c: it was written without FP8"):
        _registry(["b", "c"]).load_state_dict(saved)


def _reduce(world: World) -> tuple[list[list[float]], list[list[float]], int]:
    """Two linears; rank r sees amaxes of its own. After one step: the newest history row, scales, collectives."""
    grid = make_grid(GridShape(data=2, tensor=2), world)
    axis = grid.along("data", "context", "tensor")
    registry = _registry(["a", "b"], history=4)
    for index, state in enumerate(registry.states.values()):
        state.quantise("input", _matrix([1.0, 2.0, 4.0, 3.0][world.rank] + index), None)
        if world.rank == 2:
            _see(state, 7.0)
        state.quantise("weight", _matrix(math.nan if world.rank == 1 else 5.0), None)
    grid.meter.reset()
    registry.finish_step(axis)
    return registry.history[0].tolist(), registry.scales.tolist(), sum(grid.meter.calls.values())


def test_one_reduction_per_step_makes_all_ranks_alike() -> None:
    for newest, scales, calls in run_ranks(4, _reduce):
        assert newest == [[4, 5, 7], [5, 5, 7]] and calls == 1
        assert scales == [[112, pytest.approx(89.6), 8192], [pytest.approx(89.6), pytest.approx(89.6), 8192]]
