"""Methods by name: from a model and images to maps of patches.

Legend: B images, S tokens, h heads, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import ConfigError
from model import VisionTransformer
from model.seeing.capture import PROBE
from model.seeing.features import POSITIONAL, clusters, components, outliers
from model.seeing.flow import attention_flow
from model.seeing.lens import patch_logits
from model.seeing.measures import distances, entropy
from model.seeing.perturb import Score, occlusion, rise
from model.seeing.rollout import Merging, Method, Mixing, Trace, back_through
from model.seeing.rows import Seen
from model.seeing.trace import map_of, pooled_tokens, trace
from model.sizes import Sizes

_WITHOUT_CLASSES = "take --method heads, mean, rollout, flow, pca or clusters (of two towers, or --text)"
_TOKENS = 8192  # that RISE and occlusion run at once, unless the images alone have more


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the command line says.

    Attributes:
        layers: numbers of blocks; None: all. heads: numbers, or None. query: row and column of a patch of the first
            stage; None: what is pooled. target: the class to be explained; None: that of the largest logit. masks,
            clusters: how many.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    query: tuple[int, int] | None = None
    target: int | None = None
    masks: int = 1000
    clusters: int = 5


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What there is to draw, and to store.

    Attributes:
        maps: [B, rows, cols] by names of a line and a column of a sheet. colors: [B, rows, cols, 3] in 0..1, likewise.
        arrays: anything else to be stored, by name. says: lines to print. smooth: whether there is anything between the
            centres of patches; not of what has no order.
    """

    maps: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    colors: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    arrays: dict[str, Tensor] = field(default_factory=dict)
    says: list[str] = field(default_factory=list)
    smooth: bool = True


def heads(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """What each head takes of each patch, and how spread and how far it looks."""
    noted, _ = trace(model, images)
    shown, arrays = dict[tuple[str, str], Tensor](), dict[str, Tensor]()
    for name, layer in _layers(noted, asked):
        row, spread, far = _row(layer, asked, model)
        arrays |= {f"{name}.entropy": spread, f"{name}.distance": far}
        for head in asked.heads or range(row.shape[1]):
            if not 0 <= head < row.shape[1]:
                raise ConfigError(f"--heads {head}: {name} has heads 0 to {row.shape[1] - 1}")
            shown[name, f"head {head}"] = _patches(row[:, head], layer)
    return Shown(maps=shown, arrays=arrays)


def of_heads(shown: Shown) -> list[str]:
    """Lines: how spread each head looks, and how far, on average over images; `-` where no patch takes of patches."""
    found = []
    for name in (name.removesuffix(".entropy") for name in shown.arrays if name.endswith(".entropy")):
        spread, far = (shown.arrays[f"{name}.{what}"].nanmean(0) for what in ("entropy", "distance"))
        for head, (nats, patches) in enumerate(zip(spread.tolist(), far.tolist(), strict=True)):
            distance = "     -" if math.isnan(patches) else f"{patches:6.2f}"
            found.append(f"{name:<10} head {head:<3} entropy {nats:6.3f} nats, distance {distance} patches")
    return found


def mean(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """The mean over heads, layer by layer."""
    noted, _ = trace(model, images)
    rows = {name: _patches(_row(layer, asked, model)[0].mean(1), layer) for name, layer in _layers(noted, asked)}
    return Shown(maps={(name, "mean of heads"): row for name, row in rows.items()})


def _layers(noted: Trace, asked: Asked) -> list[tuple[str, Seen]]:
    """Names and blocks that are asked for; the probe where all are."""
    blocks = [step for step in noted.steps if isinstance(step, Seen)]
    if wrong := [n for n in asked.layers or () if not 0 <= n < len(blocks)]:
        raise ConfigError(f"--layers {wrong[0]}: there are blocks 0 to {len(blocks) - 1}")
    found = [(f"blocks.{n}", blocks[n]) for n in (range(len(blocks)) if asked.layers is None else asked.layers)]
    if isinstance(noted.probe, Seen) and asked.layers is None:
        found.append((PROBE, noted.probe))
    return found


def _row(layer: Seen, asked: Asked, model: VisionTransformer) -> tuple[Tensor, Tensor, Tensor]:
    """What each head takes of each token for what is asked for [B, h, S]; its entropy and distance, NaN where there is
    none, over all queries [B, h]."""
    site, count = layer.sight.site, layer.q.shape[1]
    weights = torch.ones(count) / count
    if site.kind != "probe":
        weights = _query(layer, asked, model)
    row, spread, far, patches = (torch.zeros(()) for _ in range(4))
    for part, rows in layer.chunks():
        row = row + torch.einsum("q,bhqs->bhs", weights[part], rows)
        tokens = torch.tensor([-1]) if site.kind == "probe" else torch.arange(part.start, part.stop)
        apart, counted = distances(rows, tokens, (site.here.rows, site.here.cols), site.tokens.prefix)
        far, patches, spread = far + apart, patches + counted, spread + entropy(rows) * len(tokens)
    return row, spread / count, far / patches


def _query(layer: Seen, asked: Asked, model: VisionTransformer) -> Tensor:
    """Shares of queries [S]: one patch, or what the head pools."""
    site, first = layer.sight.site, model.sizes.stages[0]
    if asked.query is None:
        return pooled_tokens(model.config, layer.sight.total)
    if not (0 <= asked.query[0] < first.rows and 0 <= asked.query[1] < first.cols):
        raise ConfigError(f"--query {asked.query}: there are {first.rows} rows and {first.cols} columns of patches")
    weights, stride = torch.zeros(layer.sight.total), site.here.stride // first.stride
    weights[site.tokens.prefix + asked.query[0] // stride * site.here.cols + asked.query[1] // stride] = 1
    return weights


def _patches(row: Tensor, layer: Seen) -> Tensor:
    """[B, S] -> [B, rows, cols] of the layer's own stage."""
    here = layer.sight.site.here
    return row[:, layer.sight.site.tokens.prefix :].unflatten(1, (here.rows, here.cols))


def _back(name: Method, title: str) -> Callable[[VisionTransformer, Tensor, Asked], Shown]:
    def found(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
        target = _chooser(model, asked)
        noted, outputs = trace(model, images, lambda outputs: outputs.gather(1, target(outputs)[:, None])[:, 0])
        tokens = back_through(noted, name)
        arrays = {"target": target(outputs), "tokens": tokens}
        return Shown(maps={(title, ""): map_of(model.config, tokens)}, arrays=arrays)

    return found


def rollout(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """Attention rollout."""
    tokens = back_through(trace(model, images)[0], "rollout")
    return Shown(maps={("rollout", ""): map_of(model.config, tokens)}, arrays={"tokens": tokens})


def flow(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """Attention flow."""
    noted, _ = trace(model, images)
    if any(isinstance(step, Merging) for step in noted.steps):
        raise ConfigError("--method flow is for models whose tokens are the same in all layers: take rollout")
    maps = [_mean_map(step) for step in noted.steps if not isinstance(step, Merging)]
    start = noted.start if noted.probe is None else _mean_map(noted.probe)[:, 0]
    assert start is not None
    found = [attention_flow([rows[image] for rows in maps], start[image].cpu()) for image in range(len(images))]
    return Shown(maps={("attention flow", ""): map_of(model.config, torch.stack(found))})


def _mean_map(layer: Mixing) -> Tensor:
    """[B, Q, S], meaned over heads."""
    return torch.cat([rows.mean(1) for _, rows in layer.chunks()], 1).cpu()


def _chooser(model: VisionTransformer, asked: Asked) -> Callable[[Tensor], Tensor]:
    """Of what the model gives [B, C], the class of each image that is explained [B].

    Raises:
        ConfigError: there is none.
    """
    classes = model.sizes.classes
    if not classes:
        raise ConfigError(f"this model has no classes, and so no score to be explained: {_WITHOUT_CLASSES}")
    if model.embeds:
        raise ConfigError(
            f"this model gives {classes} features of an embedding, of which none is a class to be explained: "
            f"{_WITHOUT_CLASSES}, or train a classifier on it (checkpoint.load)"
        )
    given = asked.target
    if given is None:
        return lambda outputs: outputs.argmax(1)
    if not 0 <= given < classes:
        raise ConfigError(f"--target {given}: there are classes 0 to {classes - 1}")
    return lambda outputs: torch.full((len(outputs),), given)


def _targets(model: VisionTransformer, images: Tensor, asked: Asked) -> Tensor:
    """The same, of images that are not run anyway."""
    choose = _chooser(model, asked)
    with torch.no_grad():
        return choose(model.logits(images))


def _hidden(model: VisionTransformer, images: Tensor, asked: Asked, how: str) -> Shown:
    target = _targets(model, images, asked)

    def score(shown: Tensor) -> Tensor:
        return model.logits(shown).softmax(1).gather(1, target.repeat(len(shown) // len(target))[:, None])[:, 0]

    return Shown(maps={(how, ""): hidden(how, score, model.sizes, images, asked)}, arrays={"target": target})


def hidden(how: str, score: Score, sizes: Sizes, images: Tensor, asked: Asked) -> Tensor:
    """What a score of images loses where they are hidden, by `occlusion` or `rise` [B, H, W]."""
    patch, at_once = sizes.patch, max(1, _TOKENS // (sizes.tokens * len(images)))
    if how == "occlusion":
        return occlusion(score, images, 2 * patch, patch, at_once=at_once)
    cells = min(7, *(side // patch for side in images.shape[2:]))
    return rise(score, images, masks=asked.masks, cells=cells, at_once=at_once)


def _features(model: VisionTransformer, images: Tensor) -> Tensor:
    """Of the last stage's patches, after the last block [B, rows, cols, D]."""
    with torch.no_grad():
        return model.features(images)[-1][0].permute(0, 2, 3, 1)


def pca(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """Three principal components of patches as red, green and blue; what is artefact is told."""
    features = _features(model, images)
    grid, flat = features.shape[1:3], features.flatten(1, 2)
    strange = outliers(flat)
    found = components(torch.where(strange[..., None], flat[~strange].mean(0), flat))
    low, high = found.values.flatten(0, 1).quantile(0.01, 0), found.values.flatten(0, 1).quantile(0.99, 0)
    colors = ((found.values - low) / (high - low)).clamp(0, 1).unflatten(1, grid)
    says = [
        f"component {i}: {share:.1%} of the variance"
        + (f", {place:.0%} of it by the place alone" if not math.isnan(place) else "")
        + (", which shows where a patch is, not what" if place > POSITIONAL else "")
        for i, (share, place) in enumerate(zip(found.explained.tolist(), found.positional.tolist(), strict=True))
    ]
    says.append(f"tokens of outlying norm (used as registers): {int(strange.sum())} of {strange.numel()}")
    arrays = {"components": found.values.unflatten(1, grid), "outliers": strange.unflatten(1, grid)}
    return Shown(colors={("components", ""): colors}, arrays=arrays, says=says)


def grouped(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """Clusters of patches, over all images."""
    features = _features(model, images)
    if asked.clusters > features[..., 0].numel():
        raise ConfigError(f"--clusters {asked.clusters}: there are {features[..., 0].numel()} patches")
    labels = clusters(features.flatten(1, 2), asked.clusters).unflatten(1, features.shape[1:3])
    import matplotlib

    table = torch.tensor(matplotlib.colormaps["viridis"](torch.linspace(0, 1, asked.clusters).numpy())[:, :3])
    return Shown(colors={("clusters", ""): table[labels].float()}, arrays={"clusters": labels}, smooth=False)


def lens(model: VisionTransformer, images: Tensor, asked: Asked) -> Shown:
    """What the head says of each patch alone, of the class that is explained."""
    target, features = _targets(model, images, asked), _features(model, images)
    try:
        logits = patch_logits(model, features.flatten(1, 2)).unflatten(1, features.shape[1:3])
    except ValueError as error:
        raise ConfigError(f"--method lens: {error}") from error
    maps = logits.gather(3, target[:, None, None, None].expand(-1, *logits.shape[1:3], 1))[..., 0]
    return Shown(maps={("logit of patches", ""): maps}, arrays={"target": target, "logits": logits})


BACK: dict[str, tuple[Method, str]] = {
    "gradient_rollout": ("gradient_rollout", "gradient rollout"), "chefer": ("relevance", "relevance"),
}  # fmt: skip
"""Methods by gradients: as model.seeing.rollout calls them, and as maps are titled."""
METHODS: dict[str, Callable[[VisionTransformer, Tensor, Asked], Shown]] = {
    "heads": heads,
    "mean": mean,
    "rollout": rollout,
    **{name: _back(*what) for name, what in BACK.items()},
    "flow": flow,
    "occlusion": lambda model, images, asked: _hidden(model, images, asked, "occlusion"),
    "rise": lambda model, images, asked: _hidden(model, images, asked, "rise"),
    "pca": pca,
    "clusters": grouped,
    "lens": lens,
}
PAGE = "page"
"""No map, but a page of all (tools.visualize.page)."""
READS: dict[str, tuple[str, ...]] = {
    PAGE: ("layers", "heads"),
    "heads": ("layers", "heads", "query", "batch"),
    "mean": ("layers", "query", "batch"),
    "rollout": ("batch",),
    "gradient_rollout": ("target", "batch"),
    "chefer": ("target", "batch"),
    "flow": ("batch",),
    "occlusion": ("target", "batch"),
    "rise": ("target", "masks", "batch"),
    "pca": (),
    "clusters": ("clusters",),
    "lens": ("target", "batch"),
}
"""Which options of the command line a method reads. Those that do not read `batch` are of all images together."""
