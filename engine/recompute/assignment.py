"""Who keeps what: a save set for each block and patch merge of the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from engine.recompute.config import RecomputeConfig
from engine.recompute.save_sets import SaveSet
from model import LayerSpec


def may_drop(layers: Sequence[LayerSpec], passes: Sequence[int], place: int) -> bool:
    """Whether a layer is a block that gradients pass through: it may keep less. Arguments as of `assignment`."""
    return layers[place].kind == "blocks" and passes[place] > 1


def has_merge(layers: Sequence[LayerSpec], place: int) -> bool:
    """Whether a patch merge goes with a block."""
    behind = (layer for layer in layers[place + 1 :] if layer.tower == layers[place].tower)
    return any(layer.kind == "merges" for layer in islice(behind, 1))


def assignment(config: RecomputeConfig, layers: Sequence[LayerSpec], passes: Sequence[int]) -> dict[str, SaveSet]:
    """Of each block and patch merge that gradients pass through, by its name, in order: a list in the configuration
    names all blocks of the list of layers, those of the image tower before those of the text tower, and none of a
    teacher.

    A patch merge goes with the block before it: it is dropped if that block's save set drops merges, and what it keeps
    is where that block has what it keeps.

    Args:
        config: resolved. layers: of the whole model. passes: of each, as `engine.frozen` counts: nothing is kept where
            that is 1.
    """
    own = [(layer, count) for layer, count in zip(layers, passes, strict=True) if not layer.is_frozen]
    sets = iter(config.sets(sum(layer.kind == "blocks" for layer, _ in own)))
    found, here = dict[str, SaveSet](), SaveSet()
    for layer, count in own:
        kind = layer.kind
        if kind == "blocks":
            here = next(sets)
        if kind in ("blocks", "merges") and count > 1:
            drops = kind == "blocks" or here.dropped("", "merge")
            found[layer.name] = here if drops else SaveSet(offloads=here.offloads)
    return found
