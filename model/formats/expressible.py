"""What another library's model cannot be: every key of ours that is not as that library's models are, by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from model.config import ModelConfig
from model.formats.base import ConversionError

_SIZES = {
    "preset", "image_size", "patch_size", "in_channels", "width", "depth", "num_heads", "mlp_dim", "num_classes",
    "drop_path", "head_bias",
}  # fmt: skip
ANY = object()
"""Whatever a key is."""


def check_expressible(title: str, model: ModelConfig, allowed: Mapping[str, object]) -> None:
    """Refuse what a format has no place for.

    Args:
        title: of the format. model: resolved. allowed: by key, the value that its models have, or a set of them, or
            `ANY`. A key that is not named must be as in the plainest model of ours, so that a new one is refused until
            a format knows it.

    Raises:
        ConversionError: names the first key, its value and those that would do.
    """
    plain = ModelConfig(width=4, depth=1, num_heads=1, block="sequential", position="learned_1d", pool="gap").resolve()
    for f in fields(ModelConfig):
        if f.name in _SIZES or allowed.get(f.name) is ANY:
            continue
        value, wanted = getattr(model, f.name), allowed.get(f.name, getattr(plain, f.name))
        choices = wanted if isinstance(wanted, frozenset | set) else {wanted}
        if value not in choices:
            shown = ", ".join(sorted(_shown(choice) for choice in choices))
            raise ConversionError(f"model.{f.name} is {_shown(value)}: {title} has no such models, only {shown}")


def _shown(value: object) -> str:
    """As it stands in a configuration."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def whole_patches(size: int | Sequence[int], patch: int) -> int | tuple[int, int]:
    """Our `model.image_size`: what of an image, of one side or two, fills patches. Convolutions leave out the rest (384
    in patches of 14: 378).
    """
    rows, cols = (side // patch * patch for side in ((size, size) if isinstance(size, int) else size))
    return rows if rows == cols else (rows, cols)


def check_whole_patches(title: str, model: ModelConfig) -> None:
    """Refuse images that do not fill their patches: ours are padded, those of convolutions cut.

    Raises:
        ConversionError: names the size, and the next smaller one.
    """
    patch = model.sizes.patch
    if any(side % patch for side in model.image):
        cut = [side // patch * patch for side in model.image]
        raise ConversionError(
            f"model.image_size {model.image_size} is no multiple of model.patch_size {patch}: {title} leaves out the "
            f"rest, where this model pads it; its images would be {cut}"
        )
