"""What evaluation says of pairs, on two ranks that have unequal shares of them."""

from __future__ import annotations

import pytest
import torch

from engine.objectives.alike import PROMPT, Alike, text_numbers
from model import MicroBatch
from parallel.contrastive import info_nce
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import run_ranks

CPU = torch.device("cpu")


def a_look(world: World, counts: tuple[int, ...]) -> dict[str, float]:
    """Of six pairs in a plane, dealt unevenly, and of prompts of two classes."""
    grid = make_grid(GridShape(data=world.size), world)
    angles = torch.tensor([0.0, 0.1, 1.5, 1.6, 3.0, 3.1])
    left = torch.stack([angles.cos(), angles.sin()], 1)
    # the captions of the first two images are the same, and those of the last two have changed places
    right = left[[0, 0, 2, 3, 5, 4]]
    texts = torch.tensor([[1, 2], [1, 2], [3, 4], [5, 6], [7, 8], [9, 9]])
    labels = torch.tensor([0, 1, 0, 1, 1, 1])  # the second is not what it looks like
    look = Alike(
        lambda l, r, scale, bias, of, axis: info_nce(l, r, scale, axis), grid, CPU, by_label=False,
        sides=("image", "text"),
    )  # fmt: skip
    first = sum(counts[: world.rank])
    own = torch.arange(first, first + counts[world.rank])
    scale, bias = torch.tensor(10.0), torch.tensor(0.0)
    pad = 4 - len(own)
    index = torch.cat([own, own.new_zeros(pad)])
    ids, weights = torch.cat([own, own.new_full((pad,), -1)]), torch.cat([torch.ones(len(own)), torch.zeros(pad)])
    batch = MicroBatch(images=None, labels=labels[index], sample_ids=ids, weights=weights, texts=texts[index])
    look.add([look.look((left[index], right[index], scale, bias), batch)])
    towards = torch.tensor([0.5, 2.6])[world.rank :: world.size]  # of the classes
    prompts = torch.stack([towards.cos(), towards.sin()], 1)
    batch = MicroBatch(
        images=None, labels=torch.arange(2)[world.rank :: world.size], sample_ids=torch.full((len(prompts),), PROMPT),
        weights=torch.zeros(len(prompts)), texts=torch.zeros(len(prompts), 2, dtype=torch.int64),
    )  # fmt: skip
    look.add([look.look((torch.zeros_like(prompts), prompts, scale, bias), batch)])
    return look.figures(holds_loss=True)


def test_evaluation_finds_partners_and_classes() -> None:
    found = run_ranks(2, a_look, (2, 4))
    assert found[0] == found[1]
    figures = found[0]
    assert figures["recall_image_to_text@1"] == pytest.approx(4 / 6)
    assert figures["recall_text_to_image@1"] == pytest.approx(4 / 6)
    assert figures["zero_shot_accuracy"] == pytest.approx(5 / 6)
    assert figures["images"] == 6 and figures["logit_scale"] == 10.0


def test_texts_have_numbers_of_their_own() -> None:
    texts = torch.tensor([[1, 2, 0], [2, 1, 0], [1, 2, 0], [1, 2, 258], [0, 1, 2]])
    first, second, again, *others = text_numbers(texts).tolist()
    assert first == again and len({first, second, *others}) == 4
