"""Which formats there are, and which of them a source is of."""

from __future__ import annotations

from model.formats.base import ConversionError
from model.formats.big_vision import BigVision
from model.formats.huggingface.clip import HfClipVision
from model.formats.huggingface.dino import HfDinov2, HfDinov3
from model.formats.huggingface.pairs import HfClipPair, HfSiglip2Pair, HfSiglipPair
from model.formats.huggingface.siglip import HfSiglip, HfSiglip2
from model.formats.huggingface.vit import HfVit
from model.formats.open_clip import OpenClip
from model.formats.open_clip_pair import OpenClipPair
from model.formats.pairs import ALONE
from model.formats.sources import Source
from model.formats.timm.format import Timm
from model.formats.weights import Format

VITRUVIUS = "vitruvius"
_TRANSFORMERS: tuple[Format, ...] = (HfVit(), HfSiglip(), HfSiglip2(), HfDinov2(), HfDinov3(), HfClipVision())
_ALL: tuple[Format, ...] = (*_TRANSFORMERS, Timm(), OpenClip(), BigVision())
FORMATS: dict[str, Format] = {form.kind: form for form in _ALL}
_PAIRS: tuple[Format, ...] = (OpenClipPair(), HfClipPair(), HfSiglipPair(), HfSiglip2Pair())
PAIRS: dict[str, Format] = {form.kind: form for form in _PAIRS}
"""Of two towers, by their kinds."""
KINDS: tuple[str, ...] = (VITRUVIUS, *FORMATS)


def format_of(source: Source, kind: str = "auto") -> Format:
    """The format of a source.

    Args:
        kind: what it is said to be, or `auto`.

    Raises:
        ConversionError: it is of another kind than is said, or of none that is known.
    """
    found = [name for name, form in FORMATS.items() if form.recognises(source)]
    if kind != "auto" and kind in found:
        return FORMATS[kind]
    if len(found) == 1 and kind == "auto":
        return FORMATS[found[0]]
    if found:
        what = f"is of kind {' or '.join(found)}"
        raise ConversionError(f"{source.path} {what}" + (f", not {kind}" if kind != "auto" else ": say which"))
    shown = ", ".join(list(source.tensors)[:3])
    raise ConversionError(
        f"{source.path} is of none of the kinds {', '.join(FORMATS)}: its tensors are called {shown or 'nothing'}"
    )


def target(kind: str, *, scan: bool = False, pair: bool = False) -> Format:
    """The format to write a kind in.

    Args:
        scan: with the layers stacked. pair: two towers.

    Raises:
        ConversionError: the kind has no such form.
    """
    if pair:
        if kind not in PAIRS:
            raise ConversionError(
                f"it is an image tower and a text tower, and {kind} has no text tower (from here): {', '.join(PAIRS)} "
                f"have one; {ALONE}"
            )
        if scan:
            raise ConversionError(f"--scan stacks the layers of a {BigVision.kind} file: {kind} has no such form")
        return PAIRS[kind]
    if not scan:
        return FORMATS[kind]
    if kind != BigVision.kind:
        raise ConversionError(f"--scan stacks the layers of a {BigVision.kind} file: {kind} has no such form")
    return BigVision(scan=True)
