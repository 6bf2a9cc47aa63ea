"""Learning-rate schedules against their closed forms, written here anew and in 1-based update numbers."""

from __future__ import annotations

import math

import pytest

from engine.config import ScheduleConfig, TrainConfig
from engine.optimizers.schedules import factor
from engine.run.trainer import total_steps
from tests.engine.small import small

STEPS = 50


def factors(name: str, steps: int = STEPS, **keys: float) -> list[float]:
    config = ScheduleConfig(name=name, **keys)  # type: ignore[arg-type]
    return [factor(config, step, steps) for step in range(steps)]


def test_constant() -> None:
    assert factors("constant") == [1.0] * STEPS
    assert factors("constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("cooldown", [0, 1, 10])
@pytest.mark.parametrize("timescale", [3.0, 10_000.0])
def test_rsqrt(warmup: int, cooldown: int, timescale: float) -> None:
    """base * min(1, t/warmup) * min(1, (T-t)/cooldown) / sqrt(1 + max(0, t-warmup)/timescale), where the last update,
    t = T, still moves: cool-down reaches 0 one update after the end.
    """
    got = factors("rsqrt", warmup_steps=warmup, cooldown_steps=cooldown, timescale=timescale)
    for t, value in enumerate(got, 1):
        warm = min(1, t / warmup) if warmup else 1
        cool = min(1, (STEPS + 1 - t) / (cooldown + 1))
        assert value == pytest.approx(warm * cool / math.sqrt(1 + max(0, t - warmup) / timescale), rel=1e-12)
    assert all(0 < value <= 1 for value in got)


def test_rsqrt_halves_its_square_after_the_timescale() -> None:
    got = factors("rsqrt", steps=200, warmup_steps=20, timescale=100.0)
    assert got[19] == 1.0 and got[119] == pytest.approx(1 / math.sqrt(2))


@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_cosine(warmup: int) -> None:
    """As in big_vision, (updates done - warm-up) / (total - warm-up) of the way down: 0 is one update after the end."""
    got = factors("cosine", warmup_steps=warmup)
    for t, value in enumerate(got, 1):
        half = 0.5 * (1 + math.cos(math.pi * (t - 1 - warmup) / (STEPS - warmup)))
        assert value == pytest.approx(t / warmup if t <= warmup else half, rel=1e-12)
    assert max(got) <= 1 and got[-1] > 1e-4
    assert factors("cosine", steps=4, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0]  # nothing but warm-up


def test_warm_up_stable_decay() -> None:
    got = factors("wsd", steps=12, warmup_steps=4, cooldown_steps=3)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert factors("wsd", steps=5, warmup_steps=2, cooldown_steps=3) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("name", ["rsqrt", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_update_moves(name: str, steps: int) -> None:
    for warmup in range(steps + 1):
        for cooldown in range(steps + 1 - warmup) if name in ("rsqrt", "wsd") else [0]:
            got = factors(name, steps=steps, warmup_steps=warmup, cooldown_steps=cooldown)
            assert all(0 < value <= 1 for value in got), (warmup, cooldown, got)
    assert factors(name, steps=1) == pytest.approx([1.0], rel=1e-4)


@pytest.mark.parametrize(
    ("epochs", "images", "batch", "steps"),
    [
        (1.1, 50_000, 100, 550),  # in binary 1.1 is a little more, and was 551
        (0.1, 30, 1, 3), (2.3, 100, 1, 230), (0.07, 100, 7, 1), (1e-9, 10, 10, 1), (3.0, 1281167, 1024, 3754),
        (300, 1797, 128, 4212), (1e3, 10, 3, 3334),
    ],
)  # fmt: skip
def test_epochs_are_the_decimal_number_that_was_written(epochs: float, images: int, batch: int, steps: int) -> None:
    config = small(train=TrainConfig(epochs=epochs, global_batch_size=batch))
    assert total_steps(config, images) == steps
