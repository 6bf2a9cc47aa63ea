"""Losses on sharded logits against torch's on whole ones, in the easy and the extreme cases, and what they send."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel.comm import Axis, single_axis
from parallel.grid import GridShape, make_grid
from parallel.layout import split_range
from parallel.process_group import World
from parallel.tensor import LOSSES, Softening, top_class
from tests.distributed import run_ranks


def _softmax(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _sigmoid(logits: Tensor, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"softmax": _softmax, "sigmoid": _sigmoid}


def _cases(classes: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    usual = torch.randn(classes + 3, classes, generator=generator) * 3
    signs = torch.randint(0, 2, usual.shape, generator=generator) * 2.0 - 1
    one_hot = torch.full_like(usual, -1e4)
    one_hot[:, classes // 2] = 1e4
    return {"usual": usual, "extreme": signs * 1e4, "one winner": one_hot, "equal": torch.zeros_like(usual)}


def _naming(*what: object) -> Callable[[str], str]:
    return lambda message: f"{what}: {message}"


def _own(x: Tensor, axis: Axis) -> Tensor:
    start, stop = split_range(x.shape[1], axis.size, axis.index)
    return x[:, start:stop].clone()


def _check_losses(axis: Axis, classes: int) -> None:
    for name, logits in _cases(classes).items():
        labels = torch.arange(logits.shape[0]) % classes  # each class once at least
        weights = torch.linspace(0.5, 2, logits.shape[0], dtype=torch.float64)
        for kind, loss in LOSSES.items():
            whole = logits.double().requires_grad_()
            expected = REFERENCES[kind](whole, labels)
            (expected * weights).sum().backward()
            assert whole.grad is not None
            local = _own(logits, axis).requires_grad_()
            ours = loss(local, labels, classes, axis)
            (ours * weights.float()).sum().backward()
            assert local.grad is not None
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=2e-6, msg=_naming(kind, name))
            torch.testing.assert_close(
                local.grad.double(), _own(whole.grad, axis), rtol=1e-5, atol=1e-6, msg=_naming(kind, name)
            )
        found = top_class(_own(logits, axis), classes, axis)
        assert found.tolist() == np.argmax(logits.numpy(), 1).tolist(), name  # numpy's is the first of equals


def _check_softened(axis: Axis, classes: int) -> None:
    """Mixtures of two labels, smoothed: torch's losses of probabilities."""
    logits, images = _cases(classes)["usual"], torch.arange(classes + 3)
    labels, others = images % classes, (images * 2 + 1) % classes
    shares = torch.linspace(0, 1, len(images))
    for soft in (Softening(smoothing=0.2), Softening(others, shares), Softening(others, shares, 0.1)):
        hot = F.one_hot(labels, classes).double()
        if soft.others is not None:
            hot = shares.double()[:, None] * hot + (1 - shares.double())[:, None] * F.one_hot(others, classes)
        targets = (1 - soft.smoothing) * hot + soft.smoothing / classes
        for kind, loss in LOSSES.items():
            whole = logits.double().requires_grad_()
            expected = (
                F.cross_entropy(whole, targets, reduction="none")
                if kind == "softmax"
                else F.binary_cross_entropy_with_logits(whole, targets, reduction="none").sum(1)
            )
            expected.sum().backward()
            local = _own(logits, axis).requires_grad_()
            ours = loss(local, labels, classes, axis, soft)
            ours.sum().backward()
            assert local.grad is not None and whole.grad is not None
            torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=2e-6, msg=_naming(kind, soft))
            torch.testing.assert_close(
                local.grad.double(), _own(whole.grad, axis), rtol=1e-5, atol=1e-6, msg=_naming(kind, soft)
            )


def _check_ties(axis: Axis) -> None:
    """The largest logit twice, at every pair of classes: on one rank, and on two."""
    classes = 9
    pairs = [(a, b) for a in range(classes) for b in range(a + 1, classes)]
    logits = torch.zeros(len(pairs), classes)
    for row, (a, b) in enumerate(pairs):
        logits[row, [a, b]] = 2.5
    assert top_class(_own(logits, axis), classes, axis).tolist() == [a for a, _ in pairs]


def _check_low_precision(axis: Axis) -> None:
    logits, labels = torch.randn(6, 13, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.arange(6)
    for kind, loss in LOSSES.items():
        local = _own(logits, axis).requires_grad_()
        ours = loss(local, labels, 13, axis)
        torch.testing.assert_close(ours, REFERENCES[kind](logits.float(), labels))  # computed in fp32
        ours.sum().backward()
        assert local.grad is not None and local.grad.dtype == torch.bfloat16


def _check_traffic(axis: Axis) -> None:
    """A few numbers per image, however many classes; nothing in backward."""
    images, classes = 5, 4000
    local, labels = _own(torch.zeros(images, classes), axis).requires_grad_(), torch.arange(images)
    for loss in LOSSES.values():
        axis.meter.reset()
        ours = loss(local, labels, classes, axis).sum()
        sent = sum(axis.meter.bytes.values())
        assert 0 < sent <= 4 * 4 * images
        ours.backward()
        assert sum(axis.meter.bytes.values()) == sent
    axis.meter.reset()
    top_class(local, classes, axis)
    assert 0 < sum(axis.meter.bytes.values()) <= 4 * 4 * images


def _check_all(world: World) -> None:
    axis = make_grid(GridShape(tensor=world.size), world).tensor
    for classes in (world.size, 7, 10):  # one class on each rank, and uneven numbers
        _check_losses(axis, classes)
        _check_softened(axis, classes)
    _check_ties(axis)
    _check_low_precision(axis)
    _check_traffic(axis)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_sharded_losses(ranks: int) -> None:
    run_ranks(ranks, _check_all)


def test_on_one_rank() -> None:
    axis = single_axis("tensor")
    _check_losses(axis, 7)
    _check_softened(axis, 7)
    _check_ties(axis)
    _check_low_precision(axis)
    assert not axis.meter.calls
