"""Losses over pairs on one, two and three ranks against plain autograd in float64 over the whole batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.live_bytes import LiveBytes
from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.contrastive import (
    Gradients,
    affinity,
    info_nce,
    momentum,
    nt_xent,
    queued,
    sigmoid,
    supervised,
    supervised_views,
)
from parallel.contrastive.positives import Form
from parallel.contrastive.tiles import working_bytes
from parallel.grid import GridShape, make_grid
from parallel.process_group import World
from tests.distributed import once, run_ranks

WIDTH = 5
ROWS, LARGE, BLOCK = 256, 128, 64  # where bytes are counted
COUNTS = {1: [(11,), (1,)], 2: [(7, 4), (0, 3), (4, 4)], 3: [(4, 0, 7), (3, 5, 1), (2, 2, 2)]}
Oracle = Callable[..., Tensor]


def embeddings(count: int, seed: int, width: int = WIDTH) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(rows, dim=1)


def clip(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits, labels = scale * left @ right.t(), torch.arange(len(left))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2 + 0 * bias


def one_way(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(scale * left @ right.t(), torch.arange(len(left))) + 0 * bias


def siglip(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(left), dtype=left.dtype) - 1
    return -F.logsigmoid(signs * (scale * left @ right.t() + bias)).sum() / len(left)


def labels_of(count: int) -> Tensor:
    return torch.arange(count) * 7 % 4


def supcon(logits: Tensor, match: Tensor, among: Tensor, form: str) -> Tensor:
    """A row at a time."""
    losses = []
    for row, (own, wanted, others) in enumerate(zip(logits, match, among, strict=True)):
        log = own[others].logsumexp(0)
        assert wanted.any(), row
        if form == "out":
            losses.append(log - own[wanted].mean())
        else:
            losses.append(log - own[wanted].logsumexp(0) + math.log(int(wanted.sum())))
    return torch.stack(losses).mean()


def two_sides(form: str) -> Oracle:
    def loss(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        labels, logits = labels_of(len(left)), scale * left @ right.t()
        match = labels[:, None] == labels
        everyone = torch.ones_like(match)
        return (supcon(logits, match, everyone, form) + supcon(logits.t(), match, everyone, form)) / 2 + 0 * bias

    return loss


def views(form: str, labels: Callable[[int], Tensor]) -> Oracle:
    def loss(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows, both = torch.cat([left, right]), labels(len(left)).repeat(2)
        others = ~torch.eye(len(rows), dtype=torch.bool)
        return supcon(scale * rows @ rows.t(), (both[:, None] == both) & others, others, form) + 0 * bias

    return loss


def moco_v3(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return one_way(left, right.detach(), scale, bias) + 0 * right.sum()


def moco(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    own = (left * right.detach()).sum(1, keepdim=True)
    logits = scale * torch.cat([own, left @ QUEUE.t()], 1)
    return F.cross_entropy(logits, torch.zeros(len(left), dtype=torch.int64)) + 0 * bias + 0 * right.sum()


def own_queue(axis: Axis, like: Tensor) -> Tensor:
    """Parts of 13 keys, the last rank's none where there are three."""
    start = {1: [0, 13], 2: [0, 4, 13], 3: [0, 6, 13, 13]}[axis.size]
    return QUEUE[start[axis.index] : start[axis.index + 1], : like.shape[-1]].to(like.dtype)


def teachers(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A teacher's rows of four features, the left ones times his scale, functions of the student's alone."""
    one, other = (
        F.normalize(x.detach() @ made[: x.shape[-1]].to(x.dtype), dim=-1)
        for x, made in zip((left, right), (embeddings(LARGE, 5, 4), embeddings(LARGE, 6, 4)), strict=True)
    )
    return 9 * one, other


def mimicking(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    ours, (a, b) = scale * left @ right.t(), teachers(left, right)
    theirs = a @ b.t()
    each = (
        F.kl_div(x.log_softmax(1), y.log_softmax(1), log_target=True, reduction="batchmean")
        for x, y in ((ours, theirs), (ours.t(), theirs.t()))
    )
    return sum(each, start=0 * bias) / 2


QUEUE = embeddings(13, 3)
# what each is held against, and itself: (left, right, scale, bias, labels, axis) -> loss
LOSSES: dict[str, tuple[Oracle, Callable[..., Gradients]]] = {
    "clip": (clip, lambda a, b, scale, bias, labels, axis, **more: info_nce(a, b, scale, axis, **more)),
    "one way": (
        one_way,
        lambda a, b, scale, bias, labels, axis, **more: info_nce(a, b, scale, axis, symmetric=False, **more),
    ),
    "siglip": (siglip, lambda a, b, scale, bias, labels, axis, **more: sigmoid(a, b, scale, bias, axis, **more)),
    "nt_xent": (
        views("out", torch.arange),
        lambda a, b, scale, bias, labels, axis, **more: nt_xent(a, b, scale, axis, **more),
    ),
    "affinity": (
        mimicking,
        lambda a, b, scale, bias, labels, axis, **more: affinity(a, b, scale, teachers(a, b), axis, **more),
    ),
    "momentum": (moco_v3, lambda a, b, scale, bias, labels, axis, **more: momentum(a, b, scale, axis, **more)),
    "queued": (
        moco,
        lambda a, b, scale, bias, labels, axis, **more: queued(a, b, own_queue(axis, a), scale, axis, **more),
    ),
}
FORMS: tuple[Form, ...] = ("out", "in")
for form in FORMS:
    LOSSES[f"supervised {form}"] = (
        two_sides(form),
        lambda a, b, scale, bias, labels, axis, form=form, **more: supervised(
            a, b, labels, scale, axis, form=form, **more
        ),
    )
    LOSSES[f"views {form}"] = (
        views(form, labels_of),
        lambda a, b, scale, bias, labels, axis, form=form, **more: supervised_views(
            a, b, labels, scale, axis, form=form, **more
        ),
    )


def expected(oracle: Oracle, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = oracle(*leaves)
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def shared(value: Tensor | None, axis: Axis) -> Tensor:
    assert value is not None
    return comm.all_reduce(value.clone(), axis)


def check(
    axis: Axis, name: str, counts: Sequence[int], scale: float, dtype: torch.dtype, tolerance: float, block: int
) -> None:
    oracle, ours = LOSSES[name]
    total, start = sum(counts), sum(counts[: axis.index])
    own = slice(start, start + counts[axis.index])
    left, right = embeddings(total, 1), embeddings(total, 2)
    left, right = (0.7 * left + 0.3 * right).to(dtype).double(), right.to(dtype).double()  # pairs that are alike
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (scale, -2.5)]
    loss, grads = expected(oracle, left, right, *numbers)
    given = [left[own].to(dtype), right[own].to(dtype), *(x.to(dtype) for x in numbers), labels_of(total)[own]]
    kept = [x.clone() for x in given]
    found = ours(*given, axis, block=block)
    again = ours(*given, axis, block=block) if scale == 100.0 else found
    what = f"{name}, {counts} rows, scale {scale:g}, {dtype}, block {block}, rank {axis.index}"
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True)), what
    results: list[tuple[str, Tensor, Tensor]] = [
        ("loss", shared(found.loss, axis), loss),
        ("left", found.left, grads[0][own]),  # type: ignore[list-item]
        ("scale", shared(found.scale, axis), grads[2]),
    ]
    assert (found.right is None) == (name in ("momentum", "queued")), what
    if found.right is not None:
        results.append(("right", found.right, grads[1][own]))
    if found.bias is not None:
        results.append(("bias", shared(found.bias, axis), grads[3]))
    # what rounding goes by where derivatives are small: a logit's derivative is a difference of numbers up to 1 / N
    sizes = {"left": scale / total, "right": scale / total}
    for part, value, wanted in results:
        assert value.dtype == dtype and value.shape == wanted.shape, (what, part)
        size = float(wanted.abs().max()) + sizes.get(part, 1.0) if wanted.numel() else 1.0
        torch.testing.assert_close(
            value.double() / size, wanted / size, rtol=0, atol=tolerance, msg=lambda m, p=part: f"{p} of {what}: {m}"
        )
    for field in ("loss", "left", "right", "scale", "bias"):
        first, second = getattr(found, field), getattr(again, field)
        assert (first is None and second is None) or torch.equal(first, second), (what, field)


def _check_all(axis: Axis) -> None:
    uneven = COUNTS[axis.size][0]
    for name in LOSSES:
        for counts in COUNTS[axis.size]:
            check(axis, name, counts, 1.5, torch.float64, 1e-12, block=3)
            check(axis, name, counts, 20.0, torch.float32, 5e-6, block=3)
        check(axis, name, uneven, 100.0, torch.float64, 1e-11, block=3)
        check(axis, name, uneven, 1e5, torch.float64, 1e-8, block=3)  # 1e-16 * 1e5 in an exponent
        check(axis, name, uneven, 100.0, torch.float32, 5e-5, block=1024)


def _peaks(axis: Axis) -> dict[str, int]:
    """The most bytes that each loss makes, beside the embeddings that it is given: some large numbers of rows here."""
    peaks, labels = {}, labels_of(ROWS)
    for name, (_, ours) in LOSSES.items():
        if name == "queued":  # of keys that are as wide as those that numbers are compared of
            continue
        given = [embeddings(ROWS, seed, LARGE).float() for seed in (1, 2)]
        for scale in (1.0, 100.0):
            with LiveBytes() as live:
                found = ours(*given, torch.tensor(scale), torch.tensor(-10.0), labels, axis, block=BLOCK)
            assert found.left is not None and live.now >= found.left.nbytes
            peaks[f"{name}, scale {scale:g}"] = live.peak
    return peaks


def _on_ranks(world: World) -> dict[str, int]:
    between_hosts = make_grid(GridShape(data=world.size), world, shared_memory=False).data
    for name in LOSSES:
        check(between_hosts, name, COUNTS[world.size][0], 1.5, torch.float64, 1e-12, block=3)
    axis = make_grid(GridShape(data=world.size), world).data
    _check_all(axis)
    return _peaks(axis)


@once
def launched(ranks: int) -> list[dict[str, int]]:
    return run_ranks(ranks, _on_ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_have_the_gradients_of_the_whole_batch(ranks: int) -> None:
    launched(ranks)


def test_one_process_has_them() -> None:
    axis = single_axis("data")
    _check_all(axis)
    assert not axis.meter.calls


def test_memory_is_that_of_embeddings_and_two_blocks_however_many_ranks_there_are() -> None:
    side, tile = ROWS * LARGE * 4, BLOCK * BLOCK * 4
    few, many, alone = launched(2)[0], launched(3)[2], _peaks(single_axis("data"))
    for name, most in many.items():
        rows, gradients, more = ROWS, 2 * side, 0
        if name.startswith(("views", "nt_xent")):  # one set of both sides
            rows, more = 2 * ROWS, 2 * side
        if name.startswith("momentum"):
            gradients = side
        if name.startswith(("supervised", "views", "nt_xent")):  # what belongs together
            more += 3 * tile
        if name.startswith("affinity"):  # both models' rows go round as one; what both directions ask of a block
            more += side + 36 * ROWS * 4 + 7 * tile
        beside, beside_alone = (working_bytes(rows, LARGE, ranks, block=BLOCK) for ranks in (3, 1))
        assert rows * LARGE * 4 + gradients / 2 < most <= gradients + more + beside, name
        # of notes on rows (a label, the two parts of a sum, a number of partners), some are here and some on their way
        assert abs(most - few[name]) <= (40 if name.startswith("affinity") else 20) * rows, name
        assert alone[name] <= gradients + more + beside_alone, name


@pytest.mark.parametrize(("scale", "rows"), [(50.0, 12), (100.0, 32)])  # without maxima, and with them
@pytest.mark.parametrize("name", ["clip", "one way", "momentum", "queued"])
def test_what_is_left_of_a_gradient_has_its_digits(name: str, scale: float, rows: int) -> None:
    """Of pairs that are found nearly all of p is on one logit, and the gradient is the little that is not: log-sum-exp
    as one number of fp32 would put it off by 2e-3."""
    left = embeddings(rows, 1)
    right = F.normalize(left + 0.02 * embeddings(rows, 2), dim=1)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (scale, -2.5)]
    given = [x.float() for x in (left, right, *numbers)]
    oracle, ours = LOSSES[name]
    _, (wanted, *_) = expected(oracle, *(x.double() for x in given))
    found = ours(*given, labels_of(rows), single_axis("data"))
    assert found.left is not None and wanted.norm() < 0.02
    assert (found.left.double() - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("scale", [1e4, 1e30])
@pytest.mark.parametrize("name", LOSSES)
def test_huge_scales_do_not_overflow(name: str, scale: float) -> None:
    left, right = embeddings(9, 1).float(), embeddings(9, 2).float()
    found = LOSSES[name][1](left, right, torch.tensor(scale), torch.tensor(-1.0), labels_of(9), single_axis("data"))
    for value in (found.loss, found.left, found.right, found.scale):
        assert value is None or torch.isfinite(value).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_number_that_is_none_is_not_hidden(name: str) -> None:
    left, right = embeddings(9, 1).float(), embeddings(9, 2).float()
    left[3, 1] = torch.nan
    found = LOSSES[name][1](left, right, torch.tensor(3.0), torch.tensor(-1.0), labels_of(9), single_axis("data"))
    assert found.loss.isnan()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("left", "right", "scale", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 5), torch.tensor(1.0), r"\[3, 4\] and \[3, 5\]|a key for each query"),
        (torch.zeros(3), torch.zeros(3), torch.tensor(1.0), r"\[rows, width\]"),
        (torch.zeros(3, 4), torch.zeros(2, 4), torch.tensor(1.0), "3 left rows and 2 right rows|a key for each query"),
        (torch.zeros(3, 4), torch.zeros(3, 4).double(), torch.tensor(1.0), "float64"),
        (torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2), r"scale is \[2\]"),
        (torch.zeros(0, 4), torch.zeros(0, 4), torch.tensor(1.0), "without a single row"),
    ],
)
def test_what_is_no_pair_is_refused(name: str, left: Tensor, right: Tensor, scale: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LOSSES[name][1](left, right, scale, torch.tensor(0.0), labels_of(len(left)), single_axis("data"))
