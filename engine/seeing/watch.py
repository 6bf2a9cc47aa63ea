"""What a model that is being trained attends to, in whatever layout, summarised layer by layer (docs/seeing.md).

Of two towers both are looked at, of a student and its teachers the student.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data import Batch
from engine.assembly import Assembly
from engine.seeing.capture import look
from model import LayerSpec
from model.heads import AttentionPool
from model.seeing.rows import Sight
from model.seeing.summary import Summary, SummaryTap, summaries
from model.seeing.trace import pooled_tokens
from model.taps import Tapped, tapped
from model.towers import TEXT
from parallel import comm


class Watch:
    """Looks at the same images whenever it is called. Collective, as is making it.

    Args:
        assembly: of any objective. batches: this data rank's, as many on all of them; their samples' ids are the
            numbers of images, 0 to `images` - 1, others are of no interest. images: N.
    """

    def __init__(self, assembly: Assembly, batches: Sequence[Batch], images: int) -> None:
        self._assembly, self._batches, self._images = assembly, batches, images
        self._forwards = assembly.forwards(len(batches))
        self._specs = {spec.name: spec for spec in assembly.layers}

    @torch.no_grad()
    def __call__(self) -> dict[str, Summary] | None:
        """What each attention layer that is trained attends to now, in order, on the first rank; None on the others.

        Nothing of what is trained, and nothing that training draws, is changed.
        """
        a = self._assembly
        taps = {
            name: SummaryTap(name, place, self._pooled(self._specs[name], place), self._images)
            for stage in a.stages.values()
            for name, place in tapped(stage).items()
            if self._counts(self._specs[name], place)
        }
        look(a, self._forwards, [a.to_device(batch, training=False) for batch in self._batches], taps)
        found = comm.gather_objects_to_first([piece for tap in taps.values() for piece in tap.pieces], a.grid.world)
        if found is None:
            return None
        of = summaries((piece for pieces in found for piece in pieces), self._images)
        return {name: of[name] for name in self._specs if name in of}

    def _counts(self, spec: LayerSpec, place: Tapped) -> bool:
        """Whether this rank summarises the layer: no teacher's, each token on one context rank alone; and not the probe
        of a text tower, which sees tokens up to the text's end, and is not told here which."""
        if spec.is_frozen or (place.site.kind == "probe" and _is_of_texts(spec)):
            return False
        return place.site.tokens.context.size > 1 or self._assembly.grid.context.index == 0

    def _pooled(self, spec: LayerSpec, place: Tapped) -> Tensor:
        """[Q], the shares of a layer's queries in what is pooled."""
        if isinstance(place, AttentionPool):
            return torch.ones(1)
        total = Sight(place.site).total
        if _is_of_texts(spec):
            return torch.full((total,), 1 / total)
        return pooled_tokens(self._assembly.build.of(spec).config, total)


def _is_of_texts(spec: LayerSpec) -> bool:
    return spec.tower is not None and spec.tower.name == TEXT
