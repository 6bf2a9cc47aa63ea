"""What a conversion tells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.formats.pairs import BIAS, SCALE, text_model
from model.formats.shown import describe
from model.formats.weights import Weights
from parallel.checkpoint.manifest import DTYPES
from tools.convert.images import NAMES
from tools.convert.verify import LEAST_COSINE, MOST_APART, Difference

_SHOWN = 4


def lines_of(weights: Weights) -> Iterator[str]:
    """What is in a source."""
    d, m = weights.description, weights.description.model
    sizes = m.sizes
    count = sum(math.prod(entry.shape) for entry in weights.tensors.values())
    kinds = sorted({DTYPES.get(entry.dtype, str(entry.dtype)) for entry in weights.tensors.values()})
    yield f"from      {weights.path} ({weights.kind}): {count / 1e6:,.1f} M parameters, {', '.join(kinds)}"
    shape = ", ".join(f"{s.depth} blocks of width {s.width} with {s.heads} heads" for s in sizes.stages)
    head = f"{m.num_classes} classes" if m.num_classes else "no classifier" if d.pairing is None else "image tower"
    rows, cols = sizes.image
    yield f"model     {shape}; images {rows} x {cols}, patches {sizes.patch}; pool {m.pool}, {head}"
    if (pair := d.pairing) is not None:
        t, (text, _) = pair.text, text_model(pair)
        yield (
            f"text      {text.depth} blocks of width {text.width} with {text.num_heads} heads; {t.context_length} "
            f"tokens of a vocabulary of {t.vocabulary_size}; pool {t.pool}, {t.attention} attention"
        )
        scale = min(weights.read(SCALE).double().exp().item(), pair.max_logit_scale or math.inf)
        bias = "" if pair.bias is None else f", bias {weights.read(BIAS).item():.4g}"
        yield f"pair      {pair.embedding} features; scale of logits {scale:.4g}{bias}"
    if (p := d.preprocessing) is not None:
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (p.mean, p.std))
        yield f"images    mean {mean}; std {std}; {describe(p)}"
    for what, names in (("carried", list(weights.carried)), ("left out", getattr(weights, "left_out", []))):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            yield f"{what:<9} {len(names)} tensor(s): {', '.join(names[:_SHOWN])}{more}"


def unsaid(weights: Weights, kind: str) -> Iterator[str]:
    """What of the images a format has no words for, and says otherwise."""
    how = weights.description.preprocessing
    if how is not None and not how.antialias and kind not in ("vitruvius", "big_vision"):
        yield f"images    {kind} cannot say that images are resized without antialiasing: there they are with it"


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        path, kind: where, and as what. bytes: of all files. seconds: that it took. above: most bytes of memory beyond
            those of the program before it began.
    """

    path: Path
    kind: str
    bytes: int
    seconds: float
    above: int

    def line(self) -> str:
        """In words."""
        mb = self.bytes / 1e6
        return (
            f"to        {self.path} ({self.kind}): {mb:,.1f} MB in {self.seconds:.1f} s, "
            f"{mb / self.seconds:,.0f} MB/s, {self.above / 1e6:,.0f} MB of memory above the program's own"
        )


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files)


def verified(found: Sequence[Difference], source: str, target: str) -> Iterator[str]:
    """How far two models are apart."""
    yield f"verify    {source} and {target} on {', '.join(NAMES)}, in fp32:"
    for d in found:
        verdict = "equal but for rounding" if d.small else f"more than {MOST_APART:g}, or cosine below {LEAST_COSINE}"
        yield f"          {d.what:<9} largest difference {d.largest:.2e}, cosine 1 - {1 - d.cosine:.1e}: {verdict}"
