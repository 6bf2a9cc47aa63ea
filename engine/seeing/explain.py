"""What a model in whatever layout owes its outputs to: tokens, by attention and its gradients, and pixels.

The gradient of a score flows back through the pipeline as in training. From it, and from queries, keys and values, each
rank makes the relevance of its layers, heads and tokens (model.seeing.rollout); from stage to stage, and between ranks
that share a layer, only the row goes that is asked for, S numbers of each image.

Legend: N images, B of them on this data rank, C outputs, S tokens, h heads and c tokens on this rank, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.assembly import Assembly
from engine.seeing.capture import dealt, look
from model import MicroBatch
from model.seeing.capture import PROBE
from model.seeing.rollout import Method, from_probe, through
from model.seeing.rows import Seen, Sight
from model.seeing.trace import listen, mergings, pooled_tokens
from model.taps import Tapped, tapped
from parallel import comm
from parallel.tensor import gather_features

Score = Callable[[Tensor, Tensor], Tensor]
"""What the model gives of images, fp32 [b, C], and their numbers [b] (of padding any) -> a number for each [b]."""


def outputs_of(assembly: Assembly, images: Tensor) -> Tensor:
    """What the model gives of images [N, channels, H, W], which are the same on all ranks. Collective, as all here.

    Returns:
        fp32 [N, C], the same on all ranks.
    """
    batches, found = dealt(assembly, images), _Outputs(assembly, len(images))
    assembly.forwards(len(batches)).run(batches, found.head)
    return found.everywhere()


def owed(assembly: Assembly, images: Tensor, method: Method, score: Score | None) -> tuple[Tensor, Tensor]:
    """What an image's score owes to each token of the first layer, by model.seeing.rollout.

    Args:
        images: as of `outputs_of`. score: to be differentiated; None: of rollout, which needs none.

    Returns:
        (fp32 [N, S], what the model gives [N, C]), the same on all ranks.
    """
    taps = {name: _Noted(place) for stage in assembly.stages.values() for name, place in tapped(stage).items()}
    found = _Outputs(assembly, len(images), score)
    if score is None:
        batches = dealt(assembly, images)
        look(assembly, assembly.forwards(len(batches)), batches, taps, found.head)
    else:
        batches = dealt(assembly, images, assembly.config.pipeline(assembly.grid.shape).pieces)
        _differentiate(assembly, batches, taps, found)
    order = [int(batch.sample_ids[0]) for batch in batches]
    seen = {name: tap.seen(order, assembly.grid.tensor) for name, tap in taps.items()}
    numbers = torch.cat([batch.sample_ids for batch in batches])
    grid = assembly.grid
    speaks = grid.pipeline.index == grid.tensor.index == grid.context.index == 0
    with torch.no_grad():
        r = _back(assembly, seen, method, len(numbers))
        return _everywhere(assembly, r, numbers, len(images), speaks=speaks), found.everywhere()


def pixel_gradients(assembly: Assembly, images: Tensor, score: Score) -> Tensor:
    """Of each image's score by its pixels: fp32 [N, channels, H, W], the same on all ranks. As of `owed`."""
    a = assembly
    batches = dealt(a, images, a.config.pipeline(a.grid.shape).pieces)
    for batch in batches:
        if batch.images is not None:
            batch.images.requires_grad_()
    _differentiate(a, batches, {}, _Outputs(a, len(images), score))
    numbers = torch.cat([batch.sample_ids for batch in batches])
    found = images.new_zeros(len(numbers), *images.shape[1:], device=a.device)
    here = [batch.images.grad for batch in batches if batch.images is not None and batch.images.grad is not None]
    if here:
        torch.cat(here, out=found)
    # context ranks, and tensor ranks that split rows, have the gradient of their own tokens' pixels, others all of it
    speaks = bool(here) and (a.build.tp.splits_rows or a.grid.tensor.index == 0)
    return _everywhere(a, found, numbers, len(images), speaks=speaks)


@dataclass(kw_only=True)
class _Pass:
    """What a layer has attended with in the forward pass of one micro-batch, whose first image has this number."""

    first: int
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor | None = None

    def keep(self, grad: Tensor) -> None:
        """Of what the heads give."""
        self.grad = grad.reshape(self.q.shape)


class _Noted:
    """Notes what a layer attends with.

    Attributes:
        images: numbers of those that run now, to be set.
    """

    images: Tensor | None = None

    def __init__(self, place: Tapped) -> None:
        self.place, self._passes = place, list[_Pass]()
        self._sight: Sight | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Tap."""
        assert self.images is not None
        self._sight = self._sight or Sight.of(self.place)
        self._passes.append(_Pass(first=int(self.images[0]), q=q.detach(), k=k.detach(), v=v.detach()))
        return q, k, v

    def take(self, out: Tensor) -> None:
        """What the heads of the same pass give."""
        out.register_hook(self._passes[-1].keep)

    def seen(self, order: Sequence[int], tensor: comm.Axis) -> Seen:
        """Of all micro-batches, by the numbers of their first images in order."""
        assert self._sight is not None
        by_first = {one.first: one for one in self._passes}
        passes = [by_first[first] for first in order]
        q, k, v = (torch.cat([getattr(one, name) for one in passes]) for name in ("q", "k", "v"))
        grads = [one.grad for one in passes if one.grad is not None]
        return Seen(self._sight, q, k, v, torch.cat(grads) if grads else None, tensor)


class _Outputs:
    """What the last layer gives, and, of training schedules, the score that is differentiated."""

    def __init__(self, assembly: Assembly, images: int, score: Score | None = None) -> None:
        self._assembly, self._score = assembly, score
        self._found = torch.zeros(images, assembly.layers[-1].output[1], device=assembly.device)

    def head(self, outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        """As of the executor."""
        a, last, numbers = self._assembly, self._assembly.layers[-1], batch.sample_ids
        whole = outputs[0]
        if last.gives == "shares":
            whole = gather_features(whole, a.build.tp, last.output[1])
        whole, real = whole.float(), numbers >= 0
        self._found[numbers[real]] = whole.detach()[real]
        if self._score is None:
            return whole
        scores = self._score(whole, numbers.clamp(min=0))
        return torch.where(real, scores, 0).sum() / a.grid.context.size  # of ranks that all compute it

    def everywhere(self) -> Tensor:
        """[N, C], on all ranks."""
        a = self._assembly
        if not (a.holds_loss and a.grid.tensor.index == a.grid.context.index == 0):
            self._found.zero_()
        return comm.all_reduce(self._found, a.grid.world)


def _differentiate(
    assembly: Assembly, batches: Sequence[MicroBatch], taps: Mapping[str, _Noted], outputs: _Outputs
) -> None:
    """Forward and backward of all micro-batches by the schedule of training."""
    a, pipeline = assembly, assembly.config.pipeline(assembly.grid.shape)
    size = pipeline.micro_batches or len(batches)  # a schedule from a file is for so many alone
    executor = a.executor(pipeline.schedule(size))
    with ExitStack() as stack:
        for tap in taps.values():
            stack.callback(listen(tap.place, tap.take).remove)
        for start in range(0, len(batches), size):
            a.store.gradients.start(size)
            look(a, executor, batches[start : start + size], taps, outputs.head)
            a.store.gradients.finish()


def _back(assembly: Assembly, seen: Mapping[str, Seen], method: Method, images: int) -> Tensor:
    """[B, S] of the first layer's tokens, from this rank's layers and what others send; the same on all ranks of the
    model replica."""
    a = assembly
    config = a.build.of(a.layers[-1]).config
    merges = mergings(config)
    r = pooled_tokens(config).to(a.device).repeat(images, 1)
    for stage, rank in reversed(list(enumerate(a.placement.ranks))):
        for name in (a.layers[place].name for place in reversed(a.placement.layers[stage])):
            if name in merges:
                r = merges[name].back(r)  # also where it is not yet known, for its shape
            elif name == PROBE and name in seen:
                r = from_probe(seen[name], method)
            elif name in seen:
                r = through(r, seen[name], method)
        r = comm.broadcast(r.contiguous(), a.grid.pipeline, rank)
    return r


def _everywhere(assembly: Assembly, rows: Tensor, numbers: Tensor, images: int, *, speaks: bool) -> Tensor:
    """[B, ...] of images with these numbers -> [N, ...] on all ranks: the sum of what those have that speak."""
    found, real = rows.new_zeros(images, *rows.shape[1:]), numbers >= 0
    if speaks:
        found[numbers[real]] = rows[real]
    return comm.all_reduce(found, assembly.grid.world)
