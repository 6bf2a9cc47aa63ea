"""The layers of several models as one list, by their depth: who stands where, and what rides past whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from model.layers import LayerSpec


def taking_turns(streams: Sequence[Sequence[tuple[Fraction, LayerSpec]]]) -> list[LayerSpec]:
    """The layers of several models, each with its place in the depth, as one list; of equal places, the first model's
    first.

    What is handed on is the newest output first, then those of the other models, the newest first.
    """
    turns = [(depth, number, spec) for number, of in enumerate(streams) for depth, spec in of]
    found, flow = list[LayerSpec](), list[tuple[int, str]]()
    for _, number, spec in sorted(turns, key=lambda turn: turn[:2]):
        takes = next((place for place, (of, _) in enumerate(flow) if of == number), None)
        if takes is not None:
            del flow[takes]
        begins = takes is None and bool(flow)
        found.append(replace(spec, begins=begins, takes=takes or 0, rides=tuple(name for _, name in flow)))
        flow.insert(0, (number, spec.name))
    return found


def by_depth(
    layers: Sequence[LayerSpec], bends: Mapping[Fraction, Fraction], depth: int
) -> Iterator[tuple[Fraction, LayerSpec]]:
    """Each layer of a model after the share of its blocks that are done with it; a head is last. A patch merge goes
    with the block behind it, a projection for the head with that.

    Args:
        bends: where such shares are to come to stand instead, the others in proportion between them. depth: of the
            model, of which not all blocks may be there.
    """
    done = 0
    end = Fraction(3, 2) if 1 in bends.values() and 1 not in bends else Fraction(1)  # behind what the bend put there
    known = {Fraction(0): Fraction(0), Fraction(1): end} | dict(bends)
    for layer in layers:
        done = number_of(layer) + 1 if layer.kind == "blocks" else done
        at = Fraction(done + (layer.kind == "merges"), depth)
        if layer.kind == "head" or at > 1:
            yield Fraction(2), layer
            continue
        low, high = max(x for x in known if x <= at), min(x for x in known if x >= at)
        inner = known[low] if low == high else known[low] + (known[high] - known[low]) * (at - low) / (high - low)
        yield inner, layer


def number_of(block: LayerSpec) -> int:
    """Of a block, as its name has it, or of what is made of one."""
    return int(block.name.rpartition(".")[2])
