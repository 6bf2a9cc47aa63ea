"""Kinds of attention, chosen layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

from model.patterns import Pattern

KINDS: dict[str, str] = {
    "full": "softmax attention of all tokens to all tokens",
    "window": "softmax attention inside windows of window_size x window_size patches",
    "shifted_window": "the same with windows moved by half their side (Liu et al. 2021, Swin)",
    "grid": "softmax attention among grid_size x grid_size patches spread over the image (Tu et al. 2022, MaxViT)",
    "global_tokens": "a window and all prefix tokens (Beltagy et al. 2020, Longformer; Zhang et al. 2021, ViL)",
    "linear": "attention through feature maps, linear in the tokens (Katharopoulos et al. 2020)",
    "causal": "softmax attention of each token to itself and those before it",
}


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of attention: choose among {', '.join(KINDS)}")


_PATTERN = Pattern(
    check=_check,
    noun="kind",
    things="layers",
    example="[window, window, full] * 4, full",
    example_of=lambda depth: f"[window, full] * {depth // 2}{', full' * (depth % 2)}",
)


def parse_kinds(value: str | Sequence[str], depth: int, name: str = "model.attention") -> tuple[str, ...]:
    """One kind per layer, as `model.patterns.Pattern.parse` does.

    Args:
        value: a kind for all layers, a list of kinds, or a pattern. depth: number of layers. name: of the key.

    Raises:
        ValueError: an unknown kind, text that is no pattern, or a number of kinds that is not `depth`.
    """
    return _PATTERN.parse(value, depth, name)
