"""A trained model at another image size, aspect ratio or patch size: its position tables and patch kernel, resized.

Run once when weights are loaded. The embedding depends on these sizes, and relative positions on the windows, which are
no larger than the map; rope_2d and sincos_2d compute their positions and have nothing to resize.

Legend: D width, C channels, P patch side, g a grid side in patches; a prime marks the size after.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_RELATIVE = re.compile(r"blocks\.(\d+)\..*\brelative_position")

ResizeMode = Literal["bicubic", "bilinear"]


def resize_grid(
    table: Tensor, source: tuple[int, int], target: tuple[int, int], *, mode: ResizeMode = "bicubic"
) -> Tensor:
    """Interpolates a position table over its grid, with pixel centres at half-integers and anti-aliasing.

    Bicubic is what timm does. Bilinear is what FlexiViT does (`jax.image.resize`, "linear"); big_vision's own loader is
    linear too, but keeps the corners in place (`scipy.ndimage.zoom`), so it differs from both.

    Args:
        table: [gh * gw, D], row-major.
        source: (gh, gw), rows and columns of the grid as trained.
        target: (gh', gw'), those wanted.
        mode: "bicubic" or "bilinear".

    Returns:
        [gh' * gw', D] in the dtype of `table`, computed in fp32 (fp64 for fp64); `table` itself where
        `source == target`.

    Raises:
        ValueError: `table` is not of size `source`, `target` is empty, or `mode` is unknown.
    """
    _check_positions("table", table, source)
    if mode not in ("bicubic", "bilinear"):
        raise ValueError(f"mode {mode!r} is unknown: use bicubic or bilinear")
    if min(target) < 1:
        raise ValueError(f"target {target} has no patches: each side must be at least 1")
    if tuple(source) == tuple(target):
        return table
    x = table.to(_precise(table)).reshape(*source, -1).permute(2, 0, 1)  # [D, gh, gw]
    x = _resize_last(x, target[1], mode)
    x = _resize_last(x.mT, target[0], mode).mT
    return x.flatten(1).T.to(table.dtype).contiguous()


def resize_line(table: Tensor, target: int, mode: ResizeMode = "bicubic") -> Tensor:
    """`resize_grid` in one dimension, for the row and column tables of learned_2d.

    Interpolation is separable and its weights sum to 1, so resizing both tables resizes the grid of their sums.

    Args:
        table: [g, D].
        target: g', the number of rows or columns wanted.
        mode: "bicubic" or "bilinear".

    Returns:
        [g', D] in the dtype of `table`; `table` itself where g == g'.

    Raises:
        ValueError: `target` is below 1, or `mode` is unknown.
    """
    return resize_grid(table, (table.shape[0], 1), (target, 1), mode=mode)


def resize_patch_kernel(weight: Tensor, channels: int, source: int, target: int) -> Tensor:
    """The patch kernel for patches of another side, by the pseudo-inverse resize of FlexiViT (Beyer et al. 2023).

    With B the bilinear resize of a patch from P to P', the new kernel is pinv(B').w, the least-squares solution of
    <w', B x> = <w, x> over all patches x. For P' > P it is exact: a model that is given its images enlarged bilinearly,
    patch by patch, computes the tokens it computed before. For P' < P it is the best fit.

    FlexiViT's B has no anti-aliasing. Ours has, which is the same B for P' > P; for P' < P it keeps the pixels that
    plain bilinear sampling skips (tokens of smooth images are off by 1 % instead of 14 % at 16 -> 8, by 2 % instead
    of 77 % at 32 -> 8).

    Args:
        weight: [D, C * P * P], each row flattened as a convolution kernel is.
        channels: C.
        source: P, the patch side as trained.
        target: P', the side wanted.

    Returns:
        [D, C * P' * P'] in the dtype of `weight`, computed in fp64; `weight` itself where P == P'.

    Raises:
        ValueError: `weight` is not of size `channels` and `source`, or `target` is below 1.
    """
    _check_kernel("weight", weight, channels, source)
    if target < 1:
        raise ValueError(f"target patch side {target} must be at least 1")
    if source == target:
        return weight
    # B is the Kronecker product of one 1-D resize with itself, so its pseudo-inverse is that of theirs.
    unit = torch.eye(source, dtype=torch.float64, device=weight.device)
    inverse = torch.linalg.pinv(resize_line(unit, target, "bilinear"))  # [P, P']
    kernel = weight.double().reshape(-1, channels, source, source)
    kernel = inverse.T @ kernel @ inverse
    return kernel.flatten(1).to(weight.dtype)


def resize_relative(table: Tensor, source: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """A table of relative positions for windows of another size, bicubic over its offsets as in Swin's own loader (timm
    stretches the outer offsets more than the inner ones), with anti-aliasing.

    Args:
        table: [H, (2a - 1) * (2b - 1)]. source: (a, b), the window as trained. target: (a', b'), that wanted.

    Returns:
        [H, (2a' - 1) * (2b' - 1)]; `table` itself where `source == target`.

    Raises:
        ValueError: `table` is not of size `source`.
    """
    if source == target:
        return table
    sides = [(2 * high - 1, 2 * wide - 1) for high, wide in (source, target)]
    return resize_grid(table.T, sides[0], sides[1]).T.contiguous()


def can_resize_channels(source: int, target: int) -> bool:
    """Whether `resize_channels` knows how."""
    return source == target or target == 1 or source in (1, 3)


def resize_channels(weight: Tensor, source: int, target: int) -> Tensor:
    """The patch kernel for images of another number of channels, as timm does it: for one channel the kernels of all
    are added up, else those of 1 or 3 channels are repeated in turn, times source / target.

    A grey image whose channels are equal gives the tokens it gave before (to three channels and back exactly; where the
    target is no multiple of the source, nearly).

    Args:
        weight: [D, source * P * P]. source, target: C and C', which `can_resize_channels`.

    Returns:
        [D, target * P * P]; `weight` itself where C == C'.
    """
    assert can_resize_channels(source, target), (source, target)
    if source == target:
        return weight
    kernel = weight.double().reshape(len(weight), source, -1)  # [D, C, P * P]
    if target == 1:
        kernel = kernel.sum(1, keepdim=True)
    else:
        kernel = kernel.repeat(1, -(-target // source), 1)[:, :target] * (source / target)
    return kernel.flatten(1).to(weight.dtype)


def resize_weights(
    weights: Mapping[str, Tensor],
    *,
    position: str,
    source_grid: tuple[int, int],
    target_grid: tuple[int, int],
    channels: int,
    source_patch: int,
    target_patch: int,
    class_rows: int,
    source_windows: Sequence[tuple[int, int]] = (),
    target_windows: Sequence[tuple[int, int]] = (),
    mode: ResizeMode = "bicubic",
) -> dict[str, Tensor]:
    """Weights of a model of one geometry, for a model of another.

    Args:
        weights: parameters by name, whole (no rank's part), all or some of them.
        position: model.position of both models.
        source_grid: rows and columns of patches as trained.
        target_grid: those wanted.
        channels: channels of the image.
        source_patch: side of a patch as trained, in pixels.
        target_patch: the side wanted.
        class_rows: how many of the first rows of `embed.pos` belong to class tokens; they are kept as they are.
        source_windows, target_windows: of each block, for tables of relative positions.
        mode: how positions of the embedding are interpolated, "bicubic" or "bilinear".

    Returns:
        The same names; `embed.weight`, the tables of `position` and of relative positions resized, every other tensor
        the very same object.

    Raises:
        ValueError: a tensor does not have the size that the source geometry gives it, or one of the arguments is out
            of range; the message names the tensor, its shape and the one expected.
    """
    out = dict(weights)
    if (kernel := weights.get("embed.weight")) is not None:
        _check_kernel("embed.weight", kernel, channels, source_patch)
        out["embed.weight"] = resize_patch_kernel(kernel, channels, source_patch, target_patch)
    if position == "learned_1d" and (table := weights.get("embed.pos")) is not None:
        _check_positions("embed.pos", table, source_grid, class_rows)
        patches = table[class_rows:]
        resized = resize_grid(patches, source_grid, target_grid, mode=mode)
        out["embed.pos"] = table if resized is patches else torch.cat([table[:class_rows], resized])
    if position == "learned_2d":
        for axis, name in enumerate(("embed.pos_row", "embed.pos_col")):
            if (line := weights.get(name)) is not None:
                _check_positions(name, line, (source_grid[axis],))
                out[name] = resize_line(line, target_grid[axis], mode)
    for name, table in weights.items():
        if (number := block_of_relative(name)) is not None and target_windows:
            out[name] = resize_relative(table, source_windows[number], target_windows[number])
    return out


def block_of_relative(name: str) -> int | None:
    """The block whose table of relative positions this is."""
    found = _RELATIVE.fullmatch(name)
    return int(found[1]) if found else None


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _resize_last(x: Tensor, size: int, mode: ResizeMode) -> Tensor:
    """[..., g] -> [..., g']."""
    # Never torch's vertical pass: where the width is 1, torch 2.13 on CPU repeats the first row all the way down.
    lines = x.reshape(1, -1, 1, x.shape[-1])
    return F.interpolate(lines, size=(1, size), mode=mode, antialias=True).reshape(*x.shape[:-1], size)


def _check_positions(name: str, table: Tensor, grid: tuple[int, ...], class_rows: int = 0) -> None:
    rows = torch.Size(grid).numel() + class_rows
    if table.ndim != 2 or table.shape[0] != rows:
        of_class = f"{class_rows} class token{'s' * (class_rows > 1)} + " if class_rows else ""
        sides = of_class + " * ".join(map(str, grid))
        raise ValueError(f"{name} has shape {list(table.shape)}: expected [{rows}, D], for {sides} positions")


def _check_kernel(name: str, weight: Tensor, channels: int, patch: int) -> None:
    features = channels * patch * patch
    if weight.ndim != 2 or weight.shape[1] != features:
        raise ValueError(
            f"{name} has shape {list(weight.shape)}: expected [D, {features}], for {channels} channels of "
            f"{patch} * {patch} pixels"
        )
