"""Whether maps say what a model goes by: on digits over textures relevance beats raw attention and chance."""

from __future__ import annotations

import torch
from torch import Tensor

from model.seeing.faithful import areas, points
from model.seeing.noted import MeanMap
from model.seeing.rollout import Maps, Trace, back_through
from tools.benchmark import faithful
from tools.benchmark.seeing import product


def test_areas_and_points_by_hand() -> None:
    """Of four patches of two pixels each, worth 0.4 to 0.1."""
    worth = torch.tensor([[[0.4, 0.3], [0.2, 0.1]], [[0.1, 0.2], [0.3, 0.4]]])
    images = worth.repeat_interleave(2, 2)[:, None] / 2

    def score(shown: Tensor) -> Tensor:
        return shown.sum((1, 2, 3))

    for at_once in (1, 16):
        found = areas(score, images, worth, at_once=at_once)
        assert torch.allclose(found.insertion, torch.full((2,), 0.625))
        assert torch.allclose(found.deletion, torch.full((2,), 0.375))
        found = areas(score, images, -worth, at_once=at_once)
        assert torch.allclose(found.insertion, torch.full((2,), 0.375))
    inside = torch.tensor([[[True, False], [False, False]]]).repeat(2, 1, 1)
    assert points(worth, inside).tolist() == [True, False]


def test_what_hooks_are_measured_on_is_the_same_rollout() -> None:
    layers = [torch.randn(2, 3, 7, 7).softmax(-1) for _ in range(3)]
    start = torch.eye(7)[:1].expand(2, -1)
    for steps in ([Maps(rows) for rows in layers], [MeanMap(rows.mean(1)) for rows in layers]):
        assert torch.allclose(back_through(Trace(steps, start), "rollout"), product(layers), atol=1e-6)


def test_composites_show_what_they_say() -> None:
    made, again = (faithful.Maker(held_out=True).make(40, seed) for seed in (3, 3))
    assert torch.equal(made.images, again.images)
    assert (made.labels[:, 0] != made.labels[:, 1]).all() and (made.quarters[:, 0] != made.quarters[:, 1]).all()
    for which in range(2):
        inside = made.inside(which)
        assert (inside.sum((1, 2)) == 4).all()
        cells = inside.repeat_interleave(4, 1).repeat_interleave(4, 2)
        ink = made.images[:, 0][cells].view(40, 64).amax(1)
        assert (ink > 1.5).all()  # of ink, which no crop has so much of
    empty = ~(made.inside(0) | made.inside(1)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert made.images[:, 0][empty].max() < 0.4


def test_relevance_beats_raw_attention_and_chance() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {row["way"]: row for row in faithful.scored(faithful.trained(250, width=48, depth=3), 128)}
    finally:
        torch.set_num_threads(threads)
    relevance, raw, chance = (rows[way] for way in ("relevance", "raw", "random"))
    assert relevance["both_named"] > 0.5, relevance
    for other, pointing, under in ((raw, 0.2, 0.05), (chance, 0.4, 0.1)):
        assert relevance["pointing"] > other["pointing"] + pointing, rows
        assert relevance["insertion"] > other["insertion"] + under, rows
        assert relevance["deletion"] < other["deletion"] - under, rows
