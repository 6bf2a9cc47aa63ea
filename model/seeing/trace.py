"""A forward pass of a model with its attention noted, and, of a score, the gradients of what the heads give.

Legend: B images, S tokens of the last stage, P prefix tokens, h heads, K head dim, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from model.config import ModelConfig
from model.heads import AttentionPool
from model.image_text import ImageText
from model.inputs import MicroBatch
from model.seeing.capture import PROBE
from model.seeing.noted import MeanMap, Noting, can_note, noting
from model.seeing.rollout import Maps, Merging, Mixing, Trace
from model.seeing.rows import Seen, Sight
from model.taps import Tapped, tapped, tapped_by
from model.towers import IMAGE
from model.vit import VisionTransformer

Score = Callable[[Tensor], Tensor]
"""What the model gives [B, C] -> a number for each image [B], to be explained."""


class _Note:
    """Of one layer: what it attends with, and what its heads give."""

    def __init__(self, layer: Tapped) -> None:
        self.layer = layer
        self.out: Tensor | None = None

    def tap(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As Tap."""
        self.sight, self.q, self.k, self.v = Sight.of(self.layer), q.detach(), k.detach(), v.detach()
        return q, k, v

    def take(self, out: Tensor) -> None:
        """What the heads give."""
        self.out = out

    def seen(self, grad: Tensor | None) -> Seen:
        """What there is to know."""
        return Seen(self.sight, self.q, self.k, self.v, None if grad is None else grad.reshape(self.q.shape))


def listen(layer: Tapped, take: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `take` called with what the layer's heads give, [B, S, h, K] in whatever shape, until it is removed."""
    if isinstance(layer, AttentionPool):
        return layer.proj.register_forward_pre_hook(lambda _, given: take(given[0]))
    return layer.register_forward_hook(lambda _, __, out: take(out))


def trace(model: VisionTransformer | ImageText, images: Tensor, score: Score | None = None) -> tuple[Trace, Tensor]:
    """Run the model on images [B, C, H, W], as in evaluation, whatever mode it is in.

    Keeps q, k and v of every layer; with a score, autograd keeps what it keeps of a forward pass, too.

    Args:
        model: or two towers, whose image tower it is about. score: to be differentiated, or None.

    Returns:
        (what mixes tokens, what the model gives [B, C]; of an image tower, its embedding, not normalised).
    """
    (found,), outputs = traces(model, images, [score])
    return found, outputs


def traces(
    model: VisionTransformer | ImageText, images: Tensor, scores: Sequence[Score | None]
) -> tuple[list[Trace], Tensor]:
    """The same of several scores, in one forward pass."""
    config, places, run = _opened(model, images)
    notes = {name: _Note(place) for name, place in places.items()}
    grads: list[Sequence[Tensor | None]] = [(None,) * len(notes)] * len(scores)
    with ExitStack() as stack:
        for name, note in notes.items():
            stack.enter_context(tapped_by(places[name], note.tap))
        explains = [score for score in scores if score is not None]
        stack.enter_context(torch.set_grad_enabled(bool(explains)))
        if explains:
            images = images.detach().requires_grad_()
            for note in notes.values():
                stack.callback(listen(note.layer, note.take).remove)
        outputs = run(images)
        given = [note.out for note in notes.values() if note.out is not None]
        for number, score in enumerate(scores):
            if score is not None:
                again = number + 1 < len(scores)
                grads[number] = torch.autograd.grad(score(outputs).sum(), given, retain_graph=again)
    seen = [{name: note.seen(grad) for (name, note), grad in zip(notes.items(), of, strict=True)} for of in grads]
    return [traced(config, of) for of in seen], outputs.detach()


@torch.no_grad()
def mean_trace(model: VisionTransformer | ImageText, images: Tensor) -> tuple[Trace, Tensor]:
    """The same for what reads means over heads alone, rollout and flow: full attention notes them as it runs, so that
    nothing is computed again (model.seeing.noted)."""
    config, places, run = _opened(model, images)
    notes, maps = dict[str, _Note](), dict[str, Noting]()
    with ExitStack() as stack:
        for name, place in places.items():
            if can_note(place):
                maps[name] = stack.enter_context(noting(place))
            else:
                notes[name] = _Note(place)
                stack.enter_context(tapped_by(place, notes[name].tap))
        outputs = run(images)
    seen = {name: maps[name].map if name in maps else notes[name].seen(None) for name in places}
    return traced(config, seen), outputs


def _opened(
    model: VisionTransformer | ImageText, images: Tensor
) -> tuple[ModelConfig, dict[str, Tapped], Callable[[Tensor], Tensor]]:
    """What there is of images in it: its configuration, attention layers as a model by itself calls them, and how it
    is run."""
    if isinstance(model, ImageText):
        own = f"{IMAGE}."
        places = {name.removeprefix(own): of for name, of in tapped(model).items() if name.startswith(own)}
        return model.config, places, lambda images: model.tower(IMAGE, MicroBatch.of_images(images))
    geometry = model._geometry(MicroBatch.of_images(images))
    return geometry.config, tapped(geometry), lambda images: model(MicroBatch.of_images(images))


def traced(config: ModelConfig, seen: Mapping[str, Seen | Maps | MeanMap]) -> Trace:
    """Of all attention layers by name, in order, wherever their rows come from."""
    blocks = {name: of for name, of in seen.items() if name != PROBE}
    start = None
    if PROBE not in seen:
        last = next(reversed(blocks.values()))
        of = last.q if isinstance(last, Seen) else last.rows
        wide = torch.promote_types(of.dtype, torch.float32)  # that of rows
        start = pooled_tokens(config).expand(len(of), -1).to(of.device, wide)
    return Trace(_with_merges(config, list(blocks.values())), start, seen.get(PROBE))


def _with_merges(config: ModelConfig, blocks: Sequence[Mixing]) -> list[Mixing | Merging]:
    """The blocks, and the patch merges between stages."""
    merges, steps, done = mergings(config), list[Mixing | Merging](), 0
    for stage in config.sizes.stages:
        if (name := f"merges.{stage.index - 1}") in merges:
            steps.append(merges[name])
        steps += blocks[done : done + stage.depth]
        done += stage.depth
    return steps


def mergings(config: ModelConfig) -> dict[str, Merging]:
    """The layers that merge patches, by name."""
    sizes = config.sizes
    pairs = ((stage, sizes.stages[stage.index - 1]) for stage in sizes.stages if stage.merges)
    return {f"merges.{of.index - 1}": Merging(sizes.prefix, before.rows, before.cols) for of, before in pairs}


def pooled_tokens(config: ModelConfig, tokens: int | None = None) -> Tensor:
    """[S], the share of each token in what the head pools: class tokens, patches, or half of each; where a probe pools,
    patches.

    Args:
        tokens: S (default: that of the last stage).
    """
    sizes = config.sizes
    shares = torch.zeros(tokens or sizes.tokens_of(sizes.last.index))
    if config.pool in ("cls", "cls_gap"):
        shares[: sizes.class_tokens] = 1 / sizes.class_tokens
    if config.pool != "cls":
        shares[sizes.prefix :] = 1 / (len(shares) - sizes.prefix)
    return shares / shares.sum()


def map_of(config: ModelConfig, tokens: Tensor) -> Tensor:
    """[B, S] of the first stage's tokens -> [B, rows, cols] of its patches."""
    first = config.sizes.stages[0]
    return tokens[:, config.sizes.prefix :].unflatten(1, (first.rows, first.cols))
