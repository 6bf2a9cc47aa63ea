"""Kinds of attention, chosen layer by layer, and the short form in which a pattern of them is written."""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS: dict[str, str] = {
    "full": "softmax attention of all tokens to all tokens",
    "window": "softmax attention inside windows of window_size x window_size patches",
    "shifted_window": "the same with windows moved by half their side (Liu et al. 2021, Swin)",
    "grid": "softmax attention among grid_size x grid_size patches spread over the image (Tu et al. 2022, MaxViT)",
    "global_tokens": "a window and all prefix tokens (Beltagy et al. 2020, Longformer; Zhang et al. 2021, ViL)",
    "linear": "attention through feature maps, linear in the tokens (Katharopoulos et al. 2020)",
}

MOST_LAYERS = 10_000  # what is beyond is a slip of the keyboard

_PATTERN = re.compile(r"\s*(?:\[(?P<list>[^\[\]]*)\]|(?P<one>\w+))\s*(?:\*\s*(?P<times>\d{1,9}))?\s*(?P<comma>,)?\s*")


def parse_kinds(value: str | Sequence[str], depth: int, name: str = "model.attention") -> tuple[str, ...]:
    """One kind per layer.

    Args:
        value: a kind for all layers; a list of kinds, each of which may be repeated as in `window * 3`; or the same as
            one text: `[window, window, full] * 4`, `window * 3, full`. What is shorter than the model is an error, not
            a pattern to go on with.
        depth: number of layers. name: of the key, for messages.

    Raises:
        ValueError: an unknown kind, text that is no pattern, or a number of kinds that is not `depth`.
    """
    if isinstance(value, str) and value.strip() in KINDS:
        return (value.strip(),) * depth
    parts = [value] if isinstance(value, str) else list(value)
    kinds = tuple(kind for part in parts for kind in _expand(part, name))
    if len(kinds) != depth:
        example = f", such as '[window, full] * {depth // 2}{', full' * (depth % 2)}'" if depth > 1 else ""
        layers = f"{len(kinds)} layer{'s' * (len(kinds) != 1)}"
        raise ValueError(
            f"{name} names {layers}, but there {'is' if depth == 1 else 'are'} {depth}: give one kind for all, or "
            f"{depth} of them{example}"
        )
    return kinds


def _expand(text: str, name: str) -> list[str]:
    kinds: list[str] = []
    place, expects_more = 0, True
    while place < len(text):
        found = _PATTERN.match(text, place)
        if found is None or found.end() == place or not expects_more:
            raise ValueError(
                f"{name} {text!r} is not a pattern: write a kind, a list, or '[window, window, full] * 4, full'"
            )
        inner = found["one"] or found["list"]
        times = int(found["times"] or 1)
        several = _expand(inner, name) if found["list"] is not None else [_known(inner, name)]
        if len(kinds) + len(several) * times > MOST_LAYERS:
            raise ValueError(
                f"{name} {text!r} names more than {MOST_LAYERS} layers, which is more than a model may have"
            )
        kinds += several * times
        place, expects_more = found.end(), found["comma"] is not None
    return kinds


def _known(kind: str, name: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"{name}: {kind!r} is no kind of attention: choose among {', '.join(KINDS)}")
    return kind
