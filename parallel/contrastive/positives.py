"""Several true pairs for a row: supervised contrastive losses (Khosla et al. 2020), and two views of one image (Chen et
al. 2020, SimCLR's NT-Xent), over all ranks.

Of row i, P(i) are the rows that it belongs with and A(i) all that it is compared with; the loss of a row is

    out:  -1/|P| sum_P log (exp s_ip / sum_A exp s_ia)        in:  -log (1/|P| sum_P exp s_ip / sum_A exp s_ia)

`out` is what the paper recommends. Two sides (images and texts) are compared one with the other, both ways: four
products of n x N x E for each rank, as in `softmax`. Two views are one set of 2n rows, compared with each other but not
with themselves; there s is symmetric, so a rank makes row i's derivatives of both ways itself, from the sums of all
rows: three products, and no gradient travels. Labels go round with their rows, and a block of them is compared with a
rank's own.

Legend: n samples of this rank, N of all ranks, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from parallel.comm import Axis
from parallel.contrastive.logsums import LogSums, log_shares, log_sum, part_
from parallel.contrastive.pairs import Gradients, Sizes, agree
from parallel.contrastive.ring import Chunk, Homeward, Ring
from parallel.contrastive.tiles import ROWS, Tiles, diagonal, dot_of_rows

Form = Literal["out", "in"]


@torch.no_grad()
def supervised(
    left: Tensor, right: Tensor, labels: Tensor, scale: Tensor, axis: Axis, *, form: Form = "out", block: int = ROWS
) -> Gradients:
    """Left rows and right ones of the same label belong together; the mean of both ways. Collective.

    Args:
        left, right: [n, E], row i of both a pair; n may differ among ranks. labels: int64 [n], of both sides: the
            class, or the number of an image that has several captions. scale: [], the same on all ranks. axis: the
            ranks. form: see above. block: the most rows and columns of a block of logits.

    Raises:
        ValueError: shapes or types do not fit; no rank has a pair; there is no such form.
    """
    _check(labels, left, form)
    sizes = agree(left, right, scale, axis)
    task = _Task(left, right, labels, scale, axis, sizes, form=form, block=block, weight=0.5 / sum(sizes.left))
    loss, grad_left, grad_right = task.run()
    return task.gradients(loss, grad_left, grad_right, dot_of_rows(task.left, grad_left))


@torch.no_grad()
def supervised_views(
    first: Tensor, second: Tensor, labels: Tensor, scale: Tensor, axis: Axis, *, form: Form = "out", block: int = ROWS
) -> Gradients:
    """Two views of each sample: all views of its label, but for itself, belong with a view. Arguments and errors as
    `supervised`; the loss is a mean over 2N views.
    """
    _check(labels, first, form)
    return _of_views(first, second, labels, scale, axis, form=form, block=block)


@torch.no_grad()
def nt_xent(first: Tensor, second: Tensor, scale: Tensor, axis: Axis, *, block: int = ROWS) -> Gradients:
    """Two views of each sample: the other one belongs with a view, alone. Arguments and errors as `supervised`; the
    loss is a mean over 2N views.
    """
    return _of_views(first, second, None, scale, axis, form="out", block=block)


def _check(labels: Tensor, rows: Tensor, form: str) -> None:
    if form not in ("out", "in"):
        raise ValueError(f"the supervised contrastive loss has no form {form!r}: give out or in")
    if labels.dtype != torch.int64 or labels.shape != rows.shape[:1] or labels.device != rows.device:
        raise ValueError(
            f"labels are {labels.dtype} {list(labels.shape)} on {labels.device}: give one int64 for each of "
            f"{rows.shape[0]} rows, on {rows.device}"
        )


def _of_views(
    first: Tensor, second: Tensor, labels: Tensor | None, scale: Tensor, axis: Axis, *, form: Form, block: int
) -> Gradients:
    sizes = agree(first, second, scale, axis)
    views, count = torch.cat([first.detach(), second.detach()]), first.shape[0]
    numbers = torch.arange(count, device=first.device) if labels is None else labels  # views of one rank only meet
    twice = Sizes(left=tuple(2 * n for n in sizes.left), right=tuple(2 * n for n in sizes.right), bound=sizes.bound)
    task = _Task(
        views, None, torch.cat([numbers, numbers]), scale, axis, twice, form=form, block=block,
        weight=0.5 / sum(sizes.left), own_only=labels is None,
    )  # fmt: skip
    loss, grad, _ = task.run()
    by_scale = dot_of_rows(task.left, grad) / 2  # each product of two rows counts for both
    return task.gradients(loss, grad[:count], grad[count:], by_scale)


@dataclass(frozen=True)
class _Known:
    """What the second sweep needs of rows: log-sum-exp over A in two parts, [n, 2]; of P what its form needs: one over
    their number, [n], or the log-sum-exp, [n, 2].
    """

    everything: Tensor
    positives: Tensor

    def part(self, rows: slice) -> _Known:
        return _Known(self.everything[rows], self.positives[rows])


class _Task:
    """Two sweeps. `right` None: the left rows among themselves. own_only: labels are of this rank alone."""

    def __init__(
        self, left: Tensor, right: Tensor | None, labels: Tensor, scale: Tensor, axis: Axis, sizes: Sizes, *,
        form: Form, block: int, weight: float, own_only: bool = False,
    ) -> None:  # fmt: skip
        wide = torch.promote_types(left.dtype, torch.float32)
        self.left = left.detach().to(wide).contiguous()
        self.is_one_set = right is None
        self.right = self.left if right is None else right.detach().to(wide).contiguous()
        self.labels, self.form, self.weight, self.own_only = labels, form, weight, own_only
        self.ring = Ring(axis, sizes.right, block)
        columns = self.ring.spans(self.left.shape[1], self.left.itemsize)[0].stop
        self.tiles = Tiles(self.left, block, columns, scale)
        self.factor = scale.detach().to(wide).reshape(()) * weight

    def run(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(the loss; gradients of left and right rows, without the factors that all derivatives have)."""
        rows, columns = self._first_sweep()
        loss, known = self._close(rows)
        if columns is None:
            return loss, *self._second_sweep(known, known)
        more, of_columns = self._close(columns)
        return loss + more, *self._second_sweep(known, of_columns)

    def gradients(self, loss: Tensor, left: Tensor, right: Tensor | None, scale: Tensor) -> Gradients:
        """With these factors."""
        assert right is not None
        wide = self.left.dtype
        return Gradients(
            loss=loss.to(wide),
            left=left.mul_(self.factor),
            right=right.mul_(self.factor),
            scale=(scale * self.weight).to(wide),
        )

    def _tiles(self, *notes: Tensor) -> Iterator[tuple[Chunk, slice, Tensor, Tensor | None, bool]]:
        """(chunk, rows, logits, which of them belong together or None for none, whether the chunk is done with); once
        for a chunk without a logit, too. The chunk's notes are labels first, then those that are given.
        """
        for chunk in self.ring.chunks(self.right, [self.labels, *notes]):
            done = False
            for own, tile in self.tiles.of(self.left, chunk):
                match, done = None, own.stop == self.left.shape[0]
                if not self.own_only or chunk.hop == 0:
                    match = self.labels[own, None] == chunk.notes[0]
                if self.is_one_set and chunk.hop == 0:
                    assert match is not None
                    diagonal(tile, own, chunk.rows)[0].fill_(-torch.inf)
                    diagonal(match, own, chunk.rows)[0].fill_(False)
                yield chunk, own, tile, match, done
            if not done:
                yield chunk, slice(0, 0), self.left.new_empty(0, 0), None, True

    def _first_sweep(self) -> tuple[Tensor, Tensor | None]:
        """Sums of this rank's rows, and of its columns unless they are the same: [n, 5], see `_Series`."""
        rows = _Series(self.left.shape[0], self.left, self.form)
        block = behind = None
        if not self.is_one_set:
            block = _Series(self.ring.most, self.left, self.form)
            behind = Homeward(self.ring, _Series(self.ring.most, self.left, self.form).values)
        for chunk, own, tile, match, done in self._tiles():
            if tile.numel():
                room = self.tiles.room(tile)
                rows.add(own, tile, match, 1, room)
                if block is not None:
                    block.add(chunk.rows, tile, match, 0, room)
            if done and chunk.last and block is not None and behind is not None:
                behind.fold(block)
        return rows.values, None if behind is None else behind.home()

    def _close(self, sums: Tensor) -> tuple[Tensor, _Known]:
        """(the loss of these rows, what the second sweep needs of them)."""
        everything, of_positives, count = sums[:, :2], sums[:, 2:4], sums[:, 4]
        if self.form == "out":
            loss, positives = log_sum(everything) - of_positives[:, 0].double() / count, 1 / count
        else:
            loss = log_sum(everything) - log_sum(of_positives) + count.double().log()
            positives = part_(of_positives)
        return loss.sum() * self.weight, _Known(part_(everything), positives)

    def _second_sweep(self, rows: _Known, columns: _Known) -> tuple[Tensor, Tensor | None]:
        grad_left = torch.zeros_like(self.left)
        behind = None
        if not self.is_one_set:
            behind = Homeward(self.ring, self.left.new_zeros(self.ring.most, self.left.shape[1]))
        grad_right: Tensor | None = None
        for chunk, own, tile, match, done in self._tiles(columns.everything, columns.positives):
            if tile.numel():
                self._differentiate(tile, match, rows.part(own), _Known(*chunk.notes[1:]))
                grad_left[own].addmm_(tile, chunk.values)
            if behind is not None:
                grad_right = behind.take(chunk.span) if grad_right is None else grad_right
                if tile.numel():
                    grad_right[: tile.shape[1]].addmm_(tile.t(), self.left[own])
                if done:
                    behind.pass_on(chunk.span)
                    grad_right = None
        return grad_left, None if behind is None else behind.home()

    def _differentiate(self, tile: Tensor, match: Tensor | None, rows: _Known, columns: _Known) -> None:
        """Logits into derivatives, in place."""
        wanted = None
        if match is not None and self.form == "out":
            wanted = (rows.positives[:, None] + columns.positives).mul_(match)
        elif match is not None:
            wanted = _exponentials(tile, rows.positives, columns.positives, torch.empty_like(tile)).masked_fill_(
                ~match, 0.0
            )
        _exponentials(tile, rows.everything, columns.everything, tile)
        if wanted is not None:
            tile.sub_(wanted)


def _exponentials(tile: Tensor, rows: Tensor, columns: Tensor, out: Tensor) -> Tensor:
    """exp(s - row) + exp(s - column) into `out`, which may be the tile.

    Neither is above 1 where it counts; but of one set, what a column's sum was made of is s_ji, which is s_ij rounded
    in another way.
    """
    by_column = log_shares(tile, columns, 0, torch.empty_like(tile)).clamp_max_(0.0).exp_()
    return log_shares(tile, rows, 1, out).exp_().add_(by_column)


class _Series:
    """Sums of many rows or columns, [n, 5]: log-sum-exp of all logits as `LogSums` has it; of those that belong
    together the same in the form `in`, or their sum in the form `out`; and their number.
    """

    def __init__(self, count: int, like: Tensor, form: Form) -> None:
        self.values, self._form = like.new_empty(count, 5), form
        self._all, self._positive = (LogSums(self.values[:, start : start + 2]) for start in (0, 2))
        self.clear()

    def clear(self) -> None:
        """Of no logits."""
        self.values.zero_()
        self._all.clear()
        if self._form == "in":
            self._positive.clear()

    def add(self, place: slice, tile: Tensor, match: Tensor | None, dim: int, room: Tensor) -> None:
        """Logits along `dim`."""
        self._all.add(place, tile, dim, room)
        if match is None:
            return
        self.values[place, 4] += match.sum(dim)
        if self._form == "out":
            self.values[place, 2] += room.copy_(tile).masked_fill_(~match, 0.0).sum(dim)
        else:
            room.copy_(tile).masked_fill_(~match, -torch.inf)
            self._positive.add(place, room, dim, room)

    def merge(self, other: Tensor) -> None:
        """Sums [n, 5] of the same over other logits."""
        self._all.merge(other[:, :2])
        if self._form == "in":
            self._positive.merge(other[:, 2:4])
        else:
            self.values[:, 2] += other[:, 2]
        self.values[:, 4] += other[:, 4]
