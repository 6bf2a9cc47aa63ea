"""Multi-crop: local crops look for their images' global views, or the keys of these, and nobody looks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from data import DataConfig
from engine.config import TrainConfig
from engine.config.contrastive import ContrastiveConfig
from engine.errors import ConfigError
from engine.objectives.base import Keys
from engine.objectives.contrastive import Contrastive
from model import MicroBatch, TextConfig
from parallel.contrastive import KeyQueue
from parallel.grid import make_grid
from tests.engine.objectives.pairs import config_of

SIZES, CROPS, WIDTH = (3, 5), 3, 8  # of two micro-batches


def objective_of(**keys: Any) -> Contrastive:
    config = config_of(
        text=TextConfig(), contrastive=ContrastiveConfig(pairs="views", embedding=WIDTH, **keys),
        data=DataConfig(local_crops=CROPS), train=TrainConfig(steps=1, global_batch_size=8),
    )  # fmt: skip
    assert config.data.all_views == 5
    return Contrastive.of(config)


def unit(rows: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("keys", [{}, {"momentum": 0.9}, {"momentum": 0.9, "queue": 16}])
def test_loss_and_gradients_are_those_of_plain_pytorch(keys: dict[str, Any]) -> None:
    objective, grid = objective_of(**keys), make_grid(config_of().grid_shape(1))
    scale, bias = torch.tensor(5.0), torch.tensor(0.0)
    outputs = [
        (unit(n, 10 * m), unit(n, 10 * m + 1), scale, bias, unit(CROPS * n, 10 * m + 2)) for m, n in enumerate(SIZES)
    ]
    batches = [MicroBatch.of_images(torch.empty(5 * n, 1, 8, 8)) for n in SIZES]
    queue = KeyQueue(16, WIDTH, 0, grid.data, torch.device("cpu")) if "queue" in keys else None
    made = None
    if keys:
        made = Keys([(unit(n, 10 * m + 3), unit(n, 10 * m + 4)) for m, n in enumerate(SIZES)], queue)
    found = objective.joint_loss(outputs, batches, grid, made)

    own = [[x.double().requires_grad_() for x in given] for given in outputs]
    factor = own[0][2]
    sides = [torch.cat([given[side] for given in own]) for side in (0, 1)]
    wanted = sides if made is None else [torch.cat([k[side].double() for k in made.outputs]) for side in (0, 1)]

    def search(queries: Tensor, side: int) -> Tensor:
        of = wanted[side]
        if queue is None:
            return F.cross_entropy(factor * queries @ of.T, torch.arange(len(of)))
        logits = torch.cat([(queries * of).sum(1, keepdim=True), queries @ queue.keys.double().T], 1)
        return F.cross_entropy(factor * logits, torch.zeros(len(of), dtype=torch.int64))

    if made is None:
        views = torch.cat(sides)
        logits = (factor * views @ views.T).fill_diagonal_(-torch.inf)
        between = F.cross_entropy(logits, torch.arange(len(views)).roll(len(views) // 2))
    else:
        between = (search(sides[0], 1) + search(sides[1], 0)) / 2
    crops = [torch.cat([given[4].chunk(CROPS)[k] for given in own]) for k in range(CROPS)]
    loss = (2 * between + sum(search(crop, side) for crop in crops for side in (0, 1))) / (2 + 2 * CROPS)
    loss.backward()
    assert found.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert found.gradients[0][2].item() == pytest.approx(factor.grad.item(), rel=1e-4)  # type: ignore[union-attr]
    for ours, theirs in zip(found.gradients, own, strict=True):
        for at in (0, 1, 4):
            assert theirs[at].grad is not None
            torch.testing.assert_close(ours[at].double(), theirs[at].grad, rtol=1e-4, atol=1e-6)
    assert f"{CROPS} local crops" in objective.describe()


VIEWS = ContrastiveConfig(pairs="views", loss="supcon")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"contrastive": VIEWS}, r"data\.local_crops is 2, but contrastive\.loss supcon compares all views alike"),
        ({"contrastive": ContrastiveConfig()}, r"data\.local_crops.*contrastive\.pairs views"),
        ({"objective": "supervised", "num_classes": 10}, r"data\.local_crops.*objective contrastive"),
    ],
)
def test_what_has_no_local_crops(groups: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(text=TextConfig(), data=DataConfig(local_crops=2), **groups)
