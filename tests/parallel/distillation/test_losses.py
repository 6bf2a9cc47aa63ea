"""Losses of distillation against direct formulas in float64, on one rank and on three, and what a tile takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.live_bytes import LiveBytes
from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.distillation import (
    Moments,
    angle_difference,
    cosine_distance,
    distance_difference,
    end_step,
    gram_difference,
    likeliest,
    map_divergence,
    relation_divergence,
    resplit_heads,
    sparse_divergence,
    standard_logits,
    tokens_of_all,
)
from parallel.grid import GridShape, make_grid
from parallel.layout import split_range
from parallel.process_group import World
from tests.distributed import run_ranks

IMAGES, TOKENS, TILE = 4, 7, 40  # a tile of some queries; of 3 heads 21 products each
OWN, THEIRS = (3, 8), (6, 6)  # heads and head dims; 24 and 36 features
Term = Callable[[Tensor, Tensor, Axis], Tensor]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _kl(own: Tensor, theirs: Tensor) -> Tensor:
    """[B, H, N, N] twice -> [B]."""
    log_p, log_q = own.log_softmax(3), theirs.log_softmax(3)
    return (log_q.exp() * (log_q - log_p)).sum(3).mean((1, 2))


def _logits(x: Tensor, relations: int) -> Tensor:
    x = x.flatten(2).unflatten(2, (relations, -1)).transpose(1, 2)
    return x @ x.mT * x.shape[3] ** -0.5


def _part(x: Tensor, axis: Axis, dim: int) -> Tensor:
    start, stop = split_range(x.shape[dim], axis.size, axis.index)
    return x.narrow(dim, start, stop - start)


def _counts(axis: Axis) -> list[int]:
    return [stop - start for start, stop in (split_range(TOKENS, axis.size, i) for i in range(axis.size))]


def _maps(x: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
    """As many heads, each with itself, queries split: of a teacher with heads of another size."""
    keys = tokens_of_all(x, _counts(axis), axis)
    other = teacher.flatten(2).unflatten(2, (OWN[0], -1))
    theirs = tokens_of_all(other, _counts(axis), axis)
    return map_divergence(x, keys, other, theirs, TOKENS, OWN[0], tile=TILE)


def _whole_maps(x: Tensor, teacher: Tensor) -> Tensor:
    return _kl(_logits(x, OWN[0]), _logits(teacher, OWN[0]))


def _relations(x: Tensor, teacher: Tensor, axis: Axis, *, count: int) -> Tensor:
    own = resplit_heads(x, OWN[0], count, axis)
    return relation_divergence(own, resplit_heads(teacher, THEIRS[0], count, axis), count, tile=TILE)


def _whole_relations(x: Tensor, teacher: Tensor, *, count: int) -> Tensor:
    return _kl(_logits(x, count), _logits(teacher, count))


def _gram(x: Tensor, teacher: Tensor, axis: Axis) -> Tensor:
    x, teacher = x.flatten(2), teacher.flatten(2)
    keys, theirs = (tokens_of_all(of, _counts(axis), axis) for of in (x, teacher))
    return gram_difference(x, teacher, keys=keys, teacher_keys=theirs, tile=15)


def _whole_gram(x: Tensor, teacher: Tensor) -> Tensor:
    x, teacher = (F.normalize(of.flatten(2), dim=2) for of in (x, teacher))
    return (x @ x.mT - teacher @ teacher.mT).square().mean((1, 2))


def _check_relations(axis: Axis) -> None:
    terms: dict[str, tuple[Term, Callable[[Tensor, Tensor], Tensor], int]] = {
        "maps": (_maps, _whole_maps, 1), "gram": (_gram, _whole_gram, 1),
    }  # fmt: skip
    for count in (4, 2):  # on three ranks one has none of two
        formula = partial(_whole_relations, count=count)
        terms[f"{count} relations"] = (partial(_relations, count=count), formula, 2)
    weights = torch.linspace(0.0, 2, IMAGES, dtype=torch.float64)
    for name, (term, formula, dim) in terms.items():
        x, teacher = _random(IMAGES, TOKENS, *OWN, seed=1), _random(IMAGES, TOKENS, *THEIRS, seed=2)
        whole = x.clone().requires_grad_()
        expected = formula(whole, teacher)
        (expected * weights).sum().backward()
        assert whole.grad is not None
        own = _part(x, axis, dim).clone().requires_grad_()
        asked = _part(teacher, axis, dim).clone().requires_grad_()
        share = term(own, asked, axis)
        (share * weights).sum().backward()
        assert asked.grad is None and own.grad is not None
        summed = _sum(share.detach(), axis)
        torch.testing.assert_close(summed, expected.detach(), rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")
        grad = _part(whole.grad, axis, dim)
        torch.testing.assert_close(own.grad, grad, rtol=1e-10, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}")


def _sum(x: Tensor, axis: Axis) -> Tensor:
    return comm.all_reduce(x.clone(), axis)


def _whole_distances(x: Tensor, teacher: Tensor) -> Tensor:
    pairs = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    own, theirs = ((of[:, None] - of)[pairs].norm(dim=1) for of in (x, teacher))
    return F.smooth_l1_loss(own / own.mean(), theirs / theirs.mean())


def _whole_angles(x: Tensor, teacher: Tensor) -> Tensor:
    losses = []
    for j in range(len(x)):
        others = [i for i in range(len(x)) if i != j]
        own, theirs = (F.normalize(of[others] - of[j], dim=1) for of in (x, teacher))
        losses.append(F.smooth_l1_loss(own @ own.t(), theirs @ theirs.t(), reduction="sum"))
    return torch.stack(losses).sum() / (len(x) * (len(x) - 1) * (len(x) - 2))


def _check_batch(axis: Axis) -> None:
    x, teacher = _random(6, 5, seed=3), _random(6, 9, seed=4) * 7
    for term, formula in ((distance_difference, _whole_distances), (angle_difference, _whole_angles)):
        whole = x.clone().requires_grad_()
        expected = formula(whole, teacher)
        (expected * 3).backward()
        assert whole.grad is not None
        own = _part(x, axis, 0).clone().requires_grad_()
        share = term(own, _part(teacher, axis, 0), axis)
        (share * 3).backward()
        torch.testing.assert_close(_sum(share.detach(), axis), expected.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(own.grad, _part(whole.grad, axis, 0), rtol=1e-10, atol=1e-14)
    whole, theirs = _random(6, 7, seed=5).requires_grad_(), _random(6, 7, seed=6)
    expected = 1 - F.cosine_similarity(whole, theirs)
    expected.sum().backward()
    own = _part(whole.detach(), axis, 1).clone().requires_grad_()
    found = cosine_distance(own, _part(theirs, axis, 1), axis)
    found.sum().backward()
    assert whole.grad is not None
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own.grad, _part(whole.grad, axis, 1), rtol=1e-10, atol=1e-14)


def _check_moments(axis: Axis) -> None:
    moments, rows = Moments(5), _random(19, 5, seed=7) * 3 + 1e4
    assert not moments.standardise(rows).any()
    for some in (rows[:2], rows[2:10], rows[10:]):  # on three ranks one has none of the first
        here = _part(some, axis, 0)
        moments.note(here[:1])
        moments.note(here[1:])
        end_step([moments], axis, counts=True)
    moments.note(rows)
    end_step([moments], axis, counts=False)
    expected = (rows - rows.mean(0)) / rows.var(0, correction=0).mean().sqrt()
    torch.testing.assert_close(moments.standardise(rows), expected, rtol=1e-9, atol=1e-9)


def _check_standard(axis: Axis) -> None:
    """A loss that all ranks go on to compute alike, of which each has its own classes' part."""
    whole, asked = _random(5, 7, seed=11).requires_grad_(), _random(5, 7, seed=12)
    expected = (whole - whole.mean(1, keepdim=True)) / whole.std(1, correction=0, keepdim=True)
    (expected * asked).sum().backward()
    assert whole.grad is not None
    own = _part(whole.detach(), axis, 1).clone().requires_grad_()
    found = standard_logits(own, 7, axis)
    (found * _part(asked, axis, 1)).sum().backward()
    torch.testing.assert_close(found, _part(expected.detach(), axis, 1), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(own.grad, _part(whole.grad, axis, 1), rtol=1e-10, atol=1e-14)


def _check_sparse(axis: Axis) -> None:
    """k + 1 outcomes; of all classes there is no rest, and all of the divergence."""
    classes, heat = 7, 2.0
    logits, teacher = _random(5, classes, seed=8) * 3, _random(5, classes, seed=9) * 3
    log_q = (teacher / heat).log_softmax(1)
    for count in (1, 3, classes):
        found = likeliest(_part(teacher, axis, 1), count, classes, axis, heat)
        values, ids = log_q.topk(count, 1)
        assert torch.equal(found.ids, ids)
        torch.testing.assert_close(found.values, values)
        others = torch.ones_like(log_q).scatter(1, ids, 0) > 0
        torch.testing.assert_close(found.rest.exp(), (log_q.exp() * others).sum(1), rtol=1e-12, atol=1e-15)
        whole = logits.clone().requires_grad_()
        log_p = (whole / heat).log_softmax(1)
        expected = (values.exp() * (values - log_p.gather(1, ids))).sum(1)
        if count < classes:
            mass = (log_p.exp() * others).sum(1)
            expected = expected + found.rest.exp() * (found.rest - mass.log())
        (expected * heat**2).sum().backward()
        assert whole.grad is not None
        own = _part(logits, axis, 1).clone().requires_grad_()
        share = sparse_divergence(own, found, classes, axis, heat)
        share.sum().backward()
        torch.testing.assert_close(share, expected * heat**2, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(own.grad, _part(whole.grad, axis, 1), rtol=1e-10, atol=1e-13)


def _check_all(axis: Axis) -> None:
    _check_sparse(axis)
    _check_standard(axis)
    _check_relations(axis)
    _check_batch(axis)
    _check_moments(axis)


def _on_rank(world: World) -> None:
    _check_all(make_grid(GridShape(pipeline=1, data=1, context=1, tensor=world.size), world).tensor)


def test_on_one_rank() -> None:
    _check_all(single_axis("tensor"))


def test_on_three_ranks() -> None:
    run_ranks(3, _on_rank)


def test_low_precision_is_computed_in_fp32() -> None:
    x, teacher = (_random(2, 9, 2, 4, seed=i).bfloat16() for i in (1, 2))
    own = x.clone().requires_grad_()
    share = relation_divergence(own, teacher, 2)
    share.sum().backward()
    assert share.dtype == torch.float32 and own.grad is not None and own.grad.dtype == torch.bfloat16
    torch.testing.assert_close(share, _kl(_logits(x.float(), 2), _logits(teacher.float(), 2)))


def test_images_that_are_the_same_have_no_gradient_between_them() -> None:
    x, teacher = torch.ones(4, 3, requires_grad=True), _random(4, 3, seed=1).float()
    (
        distance_difference(x, teacher, single_axis("data")) + angle_difference(x, teacher, single_axis("data"))
    ).backward()
    assert x.grad is not None and not x.grad.any()


def test_tiles_are_what_is_held_of_maps() -> None:
    """Beside gradients, and copies of some images' rows, a few tiles; autograd would keep several maps."""
    images, tokens, heads, size = 4, 256, 4, 8
    x, teacher = (torch.randn(images, tokens, heads, size) for _ in range(2))
    x.requires_grad_()
    tile, rows = 1 << 14, images * tokens * heads * size
    with LiveBytes() as live:
        share = relation_divergence(x, teacher, heads, tile=tile)
        share.sum().backward()
    assert live.peak < 4 * (6 * tile + 4 * rows + 8 * rows // images) < images * heads * tokens**2 * 4


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        ((2, 5, 3, 4), (2, 5, 2, 4), "3 heads of queries here, the teacher 2: .*resplit_heads"),
        ((2, 5, 3, 4), (2, 6, 3, 4), "5 queries of 2 images, the teacher 6 of 2: resample"),
    ],
)
def test_what_cannot_be_matched(own: tuple[int, ...], theirs: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        relation_divergence(torch.zeros(own), torch.zeros(theirs), 3)


def test_what_cannot_be_cut_or_has_no_pairs() -> None:
    with pytest.raises(ValueError, match="24 features of all heads cannot be cut into 5 relation heads: take a number"):
        resplit_heads(torch.zeros(1, 2, *OWN), OWN[0], 5, single_axis("tensor"))
    with pytest.raises(ValueError, match=r"2 image\(s\) have no triplet: give a batch of at least 3"):
        angle_difference(torch.zeros(2, 3), torch.zeros(2, 3), single_axis("data"))
