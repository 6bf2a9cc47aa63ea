"""Training on images of several sizes, against the plain model that is given one image after the other."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from data import TrainStream
from engine.run.step import Stepper
from model import VisionTransformer
from parallel.process_group import World
from tests.parity.cases import PACKED, Case
from tests.parity.climb import climb, digits
from tests.parity.test_ladder import LOSS, NORM, TENSOR, relative


@pytest.mark.parametrize("model", PACKED)
def test_a_step_is_that_of_images_one_by_one(model: str) -> None:
    """The first step's loss and all gradients: each image through the plain model at its own size."""
    config = Case(model).config()
    config = replace(config, model=replace(config.model, drop_path=0.0))
    weights: dict[str, Tensor] = {}

    def keep(stepper: Stepper) -> None:
        weights.update({name: p.detach().clone() for name, p in stepper.assembly.parameters().items()})

    ours = climb(World(), config, before_training=keep, steps=1)
    plain = VisionTransformer(config.model, dynamic_image_size=True)
    plain.load(weights)
    stream = TrainStream(
        digits(config.model, None, None, config.data.variable_resolution)[0], config=config.data, global_batch_size=16,
        micro_batch_size=4, data_rank=0, data_size=1, seed=config.train.seed,
    )  # fmt: skip
    losses, sizes = list[Tensor](), set[tuple[int, int]]()
    for step in islice(stream.steps(0), 1):
        for batch in step:
            assert batch.images is not None and batch.maps is not None
            counts = [rows * cols for rows, cols in batch.maps]
            parts = batch.images.split([*counts, len(batch.images) - sum(counts)])
            for (rows, cols), patches, label in zip(batch.maps, parts, batch.labels, strict=False):
                image = patches.view(rows, cols, 1, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, 1, 2 * rows, 2 * cols)
                losses.append(torch.nn.functional.cross_entropy(plain.logits(image), label[None]))
                sizes.add((rows, cols))
    assert len(losses) == 16 and len(sizes) > 3
    loss = torch.stack(losses).mean()
    loss.backward()
    assert ours.losses == [pytest.approx(loss.item(), rel=LOSS)]
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    assert ours.grad_norms == [pytest.approx(norm.item(), rel=NORM)]
    for name, p in plain.named_parameters():
        assert p.grad is not None and relative(ours.first_grads[name], p.grad) <= TENSOR, name
