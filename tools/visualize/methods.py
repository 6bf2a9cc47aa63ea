"""Methods by name: from a model and images to maps of patches.

Legend: B images, S tokens, h heads, C classes, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from model import VisionTransformer
from model.heads import Head
from model.seeing.features import POSITIONAL, clusters, components, outliers
from model.seeing.lens import patch_logits
from model.seeing.perturb import Score, occlusion, rise
from model.seeing.rollout import Method, back_through
from model.seeing.trace import Score as OfOutputs
from model.seeing.trace import map_of, mean_trace, trace
from model.sizes import Sizes
from tools.visualize.of_rows import OF_LAYERS, by_name, flow, rollout
from tools.visualize.ranks import Ranks
from tools.visualize.shown import Asked, Shown

_WITHOUT_CLASSES = "take --method heads, mean, rollout, flow, pca or clusters (of two towers, or --text)"
_TOKENS = 8192  # that RISE and occlusion run at once, unless the images alone have more


Model = VisionTransformer | Ranks


def _back(name: Method, title: str) -> Callable[[Model, Tensor, Asked], Shown]:
    def found(model: Model, images: Tensor, asked: Asked) -> Shown:
        target = _chooser(model, asked)
        tokens, outputs = _owed(model, images, name, lambda y: y.gather(1, target(y)[:, None])[:, 0])
        arrays = {"target": target(outputs), "tokens": tokens}
        return Shown(maps={(title, ""): map_of(model.config, tokens)}, arrays=arrays)

    return found


def _owed(model: Model, images: Tensor, name: Method, score: OfOutputs) -> tuple[Tensor, Tensor]:
    """What the score owes to each token [B, S], and what the model gives [B, C]."""
    if isinstance(model, Ranks):
        return model.owed(images, name, score)
    noted, outputs = trace(model, images, score)
    return back_through(noted, name), outputs


def check_target(classes: int, target: int | None, *, embeds: bool) -> None:
    """Raise ConfigError where a model of so many classes, or features of an embedding, has not the one to explain."""
    if not classes:
        raise ConfigError(f"this model has no classes, and so no score to be explained: {_WITHOUT_CLASSES}")
    if embeds:
        raise ConfigError(
            f"this model gives {classes} features of an embedding, of which none is a class to be explained: "
            f"{_WITHOUT_CLASSES}, or train a classifier on it (checkpoint.load)"
        )
    if target is not None and not 0 <= target < classes:
        raise ConfigError(f"--target {target}: there are classes 0 to {classes - 1}")


def _chooser(model: Model, asked: Asked) -> Callable[[Tensor], Tensor]:
    """Of what the model gives [B, C], the class of each image that is explained [B]. Raises as `check_target`."""
    given = asked.target
    check_target(model.sizes.classes, given, embeds=model.embeds)
    if given is None:
        return lambda outputs: outputs.argmax(1)
    return lambda outputs: outputs.new_full((len(outputs),), given, dtype=torch.int64)


def _targets(model: Model, images: Tensor, asked: Asked) -> Tensor:
    """The same, of images that are not run anyway."""
    choose = _chooser(model, asked)
    with torch.no_grad():
        return choose(model.logits(images))


def _hidden(model: Model, images: Tensor, asked: Asked, how: str) -> Shown:
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


def integrated_gradients(model: Model, images: Tensor, asked: Asked) -> Shown:
    """Gradients of a class's logit, summed on the way from the mean image, 0, to this one (Sundararajan et al. 2017):
    what each pixel has added to the difference of the two logits. By captum."""
    target, way = _targets(model, images, asked), captum().IntegratedGradients(model.logits)
    at_once = max(len(images), _TOKENS // model.sizes.tokens)
    found, missing = way.attribute(
        images, target=target, n_steps=asked.steps, internal_batch_size=at_once, return_convergence_delta=True
    )
    arrays = {"target": target, "attributions": found.detach(), "missing": missing.detach()}
    return Shown(maps={("integrated gradients", ""): found.detach().sum(1)}, arrays=arrays)


def captum() -> Any:
    """The library's methods. Raises ConfigError where it is not installed."""
    try:
        return import_module("captum.attr")
    except ImportError as error:
        raise ConfigError(
            "--method integrated_gradients is captum's, which is not installed: pip install captum (it takes the torch "
            "that is there), or take --method chefer or occlusion"
        ) from error


def explained(shown: Shown, names: Sequence[str]) -> list[str]:
    """A line: which class of each image is explained, if one is."""
    if "target" not in shown.arrays:
        return []
    targets = zip(names, shown.arrays["target"].tolist(), strict=True)
    return ["explained: class " + ", ".join(f"{target} of {name}" for name, target in targets)]


def _of_features(show: Callable[[Tensor, Asked], Shown]) -> Callable[[Model, Tensor, Asked], Shown | None]:
    """Methods of the last stage's patches of all images, after the last block [B, rows, cols, D]."""

    def found(model: Model, images: Tensor, asked: Asked) -> Shown | None:
        features = model.patches(images) if isinstance(model, Ranks) else _patches(model, images)
        return None if features is None else show(features, asked)

    return found


def _patches(model: VisionTransformer, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.features(images)[-1][0].permute(0, 2, 3, 1)


def pca(features: Tensor, asked: Asked) -> Shown:
    """Three principal components of patches as red, green and blue; what is artefact is told."""
    grid, flat = features.shape[1:3], features.flatten(1, 2)
    strange = outliers(flat)
    found = components(torch.where(strange[..., None], flat[~strange].mean(0), flat))
    low, high = found.values.flatten(0, 1).quantile(0.01, 0), found.values.flatten(0, 1).quantile(0.99, 0)
    span = (high - low).clamp(min=torch.finfo(low.dtype).tiny)  # of patches that are all alike
    colors = ((found.values - low) / span).clamp(0, 1).unflatten(1, grid)
    says = [
        f"component {i}: {share:.1%} of the variance"
        + (f", {place:.0%} of it by the place alone" if not math.isnan(place) else "")
        + (", which shows where a patch is, not what" if place > POSITIONAL else "")
        for i, (share, place) in enumerate(zip(found.explained.tolist(), found.positional.tolist(), strict=True))
    ]
    says.append(f"tokens of outlying norm (used as registers): {int(strange.sum())} of {strange.numel()}")
    arrays = {"components": found.values.unflatten(1, grid), "outliers": strange.unflatten(1, grid)}
    return Shown(colors={("components", ""): colors}, arrays=arrays, says=says)


def grouped(features: Tensor, asked: Asked) -> Shown:
    """Clusters of patches, over all images."""
    labels = clusters(features.flatten(1, 2), asked.clusters).unflatten(1, features.shape[1:3])
    import matplotlib

    table = torch.tensor(matplotlib.colormaps["viridis"](torch.linspace(0, 1, asked.clusters).numpy())[:, :3])
    return Shown(colors={("clusters", ""): table[labels].float()}, arrays={"clusters": labels}, smooth=False)


def lens(model: Model, images: Tensor, asked: Asked) -> Shown | None:
    """What the head says of each patch alone, of the class that is explained."""
    target = _targets(model, images, asked)
    logits = model.lens(images) if isinstance(model, Ranks) else _lens(model, images)
    if logits is None:
        return None
    of = target.to(logits.device)[:, None, None, None].expand(-1, *logits.shape[1:3], 1)
    maps = {("logit of patches", ""): logits.gather(3, of)[..., 0]}
    return Shown(maps=maps, arrays={"target": target, "logits": logits})


def _lens(model: VisionTransformer, images: Tensor) -> Tensor:
    head, rows = model.get_submodule("head"), _patches(model, images)
    assert isinstance(head, Head)
    return patch_logits(head, rows.flatten(0, 2)).unflatten(0, rows.shape[:3])


def _of_layers(name: str) -> Callable[[VisionTransformer, Tensor, Asked], Shown]:
    return lambda model, images, asked: OF_LAYERS[name](model.config, by_name(trace(model, images)[0]), asked)


def rolled_out(model: Model, images: Tensor, asked: Asked) -> Shown:
    """Attention rollout."""
    if isinstance(model, Ranks):
        return rollout(model.config, model.owed(images, "rollout", None)[0])
    return rollout(model.config, back_through(mean_trace(model, images)[0], "rollout"))


BACK: dict[str, tuple[Method, str]] = {
    "gradient_rollout": ("gradient_rollout", "gradient rollout"), "chefer": ("relevance", "relevance"),
}  # fmt: skip
"""Methods by gradients: as model.seeing.rollout calls them, and as maps are titled."""
EVERYWHERE: dict[str, Callable[[Model, Tensor, Asked], Shown | None]] = {
    "rollout": rolled_out,
    **{name: _back(*what) for name, what in BACK.items()},
    "occlusion": lambda model, images, asked: _hidden(model, images, asked, "occlusion"),
    "rise": lambda model, images, asked: _hidden(model, images, asked, "rise"),
    "integrated_gradients": integrated_gradients,
    "pca": _of_features(pca),
    "clusters": _of_features(grouped),
    "lens": lens,
}
"""Those that ask all ranks of a model alike; of some only the first rank has what was found."""
EXPLAIN = (*BACK, "occlusion", "rise", "integrated_gradients", "lens")
"""Those of a score: of a class, or, but for the last two, of the likeness to a text."""
BY_GRADIENTS = (*BACK, "integrated_gradients")
METHODS: dict[str, Callable[[VisionTransformer, Tensor, Asked], Shown | None]] = {
    **{name: _of_layers(name) for name in OF_LAYERS},
    **EVERYWHERE,
    "flow": lambda model, images, asked: flow(model.config, mean_trace(model, images)[0]),
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
    "integrated_gradients": ("target", "steps", "batch"),
    "pca": (),
    "clusters": ("clusters",),
    "lens": ("target", "batch"),
}
"""Which options of the command line a method reads. Those that do not read `batch` are of all images together."""
