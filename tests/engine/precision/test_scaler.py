"""The loss scaler's trace on scripted overflows, written out by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from engine.precision.scaler import MAX_LOSS_SCALE, LossScaler

Trace = list[tuple[float, int, int]]

# What happened at each step ("." clean, "X" overflow), and (scale, growth tracker, hysteresis left) after it.
TRACES: dict[str, tuple[dict[str, Any], str, Trace]] = {
    "clean steps, the window starts anew after growth": (
        {"initial_loss_scale": 8.0, "loss_scale_window": 3},
        "......",
        [(8, 1, 2), (8, 2, 2), (16, 0, 2), (16, 1, 2), (16, 2, 2), (32, 0, 2)],
    ),
    "an overflow starts the window anew; clean steps do not give hysteresis back, growth does": (
        {"initial_loss_scale": 8.0, "loss_scale_window": 3},
        "..X..X.X...X.X",
        [
            (8, 1, 2),
            (8, 2, 2),
            (8, 0, 1),  # the first overflow is borne
            (8, 1, 1),
            (8, 2, 1),
            (4, 0, 0),  # the second is not, though clean steps lie between (with apex's meaning: 8)
            (4, 1, 0),
            (2, 0, 0),  # nor is any other until the scale grows
            (2, 1, 0),
            (2, 2, 0),
            (4, 0, 2),  # whole again
            (4, 0, 1),
            (4, 1, 1),
            (2, 0, 0),
        ],
    ),
    "overflows in a row, down to the floor": (
        {"initial_loss_scale": 8.0, "loss_scale_window": 2, "min_loss_scale": 3.0},
        "XXXXX..",
        [(8, 0, 1), (4, 0, 0), (3, 0, 0), (3, 0, 0), (3, 0, 0), (3, 1, 0), (6, 0, 2)],
    ),
    "hysteresis 1: every overflow counts": (
        {"initial_loss_scale": 8.0, "loss_scale_window": 2, "hysteresis": 1},
        "X.X..X",
        [(4, 0, 0), (4, 1, 0), (2, 0, 0), (2, 1, 0), (4, 0, 1), (2, 0, 0)],
    ),
    "hysteresis 3": (
        {"initial_loss_scale": 8.0, "loss_scale_window": 9, "hysteresis": 3},
        "X.XXX",
        [(8, 0, 2), (8, 1, 2), (8, 0, 1), (4, 0, 0), (2, 0, 0)],
    ),
    "window 1 at the top": (
        {"initial_loss_scale": 2.0**31, "loss_scale_window": 1, "hysteresis": 1},
        "...X.",
        [(2**32, 0, 1), (2**32, 0, 1), (2**32, 0, 1), (2**31, 0, 0), (2**32, 0, 1)],
    ),
    "start at the floor": (
        {"initial_loss_scale": 1.0, "loss_scale_window": 2},
        "XX.X..",
        [(1, 0, 1), (1, 0, 0), (1, 1, 0), (1, 0, 0), (1, 1, 0), (2, 0, 2)],
    ),
}


def values(scaler: LossScaler) -> tuple[float, int, int]:
    return scaler.scale, scaler.growth_tracker, scaler.hysteresis_left


def run(scaler: LossScaler, script: str) -> Trace:
    trace = []
    for step in script:
        scaler.update(step == "X")
        trace.append(values(scaler))
    return trace


@pytest.mark.parametrize("name", TRACES)
def test_trace(name: str) -> None:
    keys, script, expected = TRACES[name]
    assert run(LossScaler(**keys), script) == expected


@pytest.mark.parametrize("name", TRACES)
def test_a_run_that_resumes_at_any_step_goes_on_as_if_it_had_not_stopped(name: str) -> None:
    keys, script, expected = TRACES[name]
    for cut in range(len(script) + 1):
        before, after = LossScaler(**keys), LossScaler(**keys)
        head = run(before, script[:cut])
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))  # plain numbers
        assert head + run(after, script[cut:]) == expected, cut


def test_defaults() -> None:
    scaler = LossScaler()
    assert values(scaler) == (2.0**16, 0, 2) and not scaler.at_minimum
    assert run(scaler, "." * 1000)[-2:] == [(2.0**16, 999, 2), (2.0**17, 0, 2)]
    run(scaler, "X" * 18)  # the first is borne
    assert values(scaler) == (1.0, 0, 0) and scaler.at_minimum
    run(scaler, "." * 1000)
    assert not scaler.at_minimum


def test_a_state_from_a_run_with_other_limits_is_brought_within_these() -> None:
    scaler = LossScaler(min_loss_scale=4.0, loss_scale_window=3, hysteresis=1)
    scaler.load_state_dict({"scale": 2.0, "growth_tracker": 7, "hysteresis_left": 2})
    assert values(scaler) == (4.0, 7, 1)
    assert run(scaler, ".") == [(8.0, 0, 1)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("initial_loss_scale", 0.0),
        ("initial_loss_scale", 0.5),
        ("initial_loss_scale", math.nan),
        ("initial_loss_scale", 2 * MAX_LOSS_SCALE),
        ("initial_loss_scale", math.inf),
        ("min_loss_scale", 0.0),
        ("min_loss_scale", 1e-45),
        ("min_loss_scale", -1.0),
        ("min_loss_scale", math.nan),
        ("min_loss_scale", math.inf),
        ("loss_scale_window", 0),
        ("hysteresis", 0),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^precision\.{key} is {value}: .*(must|usual)"):
        LossScaler(**{key: value})
