"""Resized position tables and patch kernels: what interpolation must keep, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import ModelConfig, VisionTransformer
from model.embed import unfold
from model.resize import resize_grid, resize_line, resize_patch_kernel, resize_weights

GRIDS = [
    ((4, 4), (7, 7)),
    ((7, 7), (4, 4)),
    ((4, 6), (6, 4)),
    ((5, 3), (5, 8)),
    ((1, 1), (3, 2)),
    ((6, 5), (1, 1)),
    ((4, 1), (9, 1)),
]


def _smooth(rows: int, cols: int, width: int = 6) -> Tensor:
    """[rows * cols, D] in fp64: slow waves over the unit square, sampled at the centres of the patches."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (rows, cols))
    k = torch.arange(1, width + 1, dtype=torch.float64) / width
    return ((2 * k * y[:, None, None]).sin() + (3 * k * x[None, :, None]).cos()).flatten(0, 1)


def _filter(source: int, target: int, mode: str) -> Tensor:
    """[g', g]: the weights of anti-aliased interpolation, written out (triangle, or Keys' cubic with a = -1/2)."""
    scale = source / target
    centre = (torch.arange(target, dtype=torch.float64)[:, None] + 0.5) * scale
    x = (torch.arange(source, dtype=torch.float64) + 0.5 - centre).abs() / max(scale, 1.0)
    if mode == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


# -- position tables ---------------------------------------------------------------------------------------------------


def test_same_grid_is_identity() -> None:
    table = torch.randn(12, 5)
    assert resize_grid(table, (3, 4), (3, 4)) is table
    assert resize_line(table, 12) is table


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("source", "target"), GRIDS)
def test_grid_is_the_product_of_its_filters(source: tuple[int, int], target: tuple[int, int], mode: Any) -> None:
    table = torch.randn(*source, 5, dtype=torch.float64)
    rows, cols = (_filter(g, n, mode) for g, n in zip(source, target, strict=True))
    expected = torch.einsum("ai,bj,ijd->abd", rows, cols, table).flatten(0, 1)
    got = resize_grid(table.flatten(0, 1), source, target, mode=mode)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("source", "target"), [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((4, 6), (6, 4)), ((5, 3), (5, 8))])
def test_grid_is_interpolate(source: tuple[int, int], target: tuple[int, int], mode: Any) -> None:
    """What timm calls, on grids wide enough for torch to be right."""
    table = torch.randn(*source, 5)
    planes = table.permute(2, 0, 1)[None]
    expected = F.interpolate(planes, size=target, mode=mode, antialias=True)[0].permute(1, 2, 0).flatten(0, 1)
    torch.testing.assert_close(resize_grid(table.flatten(0, 1), source, target, mode=mode), expected)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("source", "target"), GRIDS)
def test_constants_stay(source: tuple[int, int], target: tuple[int, int], mode: Any) -> None:
    constant = torch.randn(5, dtype=torch.float64)
    got = resize_grid(constant.expand(source[0] * source[1], 5), source, target, mode=mode)
    torch.testing.assert_close(got, constant.expand(target[0] * target[1], 5))


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("source", "target"), GRIDS)
def test_lines_agree_with_grid(source: tuple[int, int], target: tuple[int, int], mode: Any) -> None:
    row, col = (torch.randn(n, 5, dtype=torch.float64) for n in source)
    whole = resize_grid((row[:, None] + col).flatten(0, 1), source, target, mode=mode)
    new_row, new_col = (resize_line(t, n, mode) for t, n in zip((row, col), target, strict=True))
    torch.testing.assert_close((new_row[:, None] + new_col).flatten(0, 1), whole)


def test_rows_and_columns_are_not_swapped() -> None:
    ramp = torch.arange(3.0)[:, None].expand(3, 4).reshape(12, 1)  # grows from row to row
    got = resize_grid(ramp, (3, 4), (6, 2)).view(6, 2)
    assert (got.diff(dim=0) > 0).all()
    torch.testing.assert_close(got[:, 0], got[:, 1])


def test_transposed_grid_is_resized_alike() -> None:
    table = torch.randn(3, 5, 2, dtype=torch.float64)
    got = resize_grid(table.flatten(0, 1), (3, 5), (4, 9)).view(4, 9, 2)
    turned = resize_grid(table.transpose(0, 1).flatten(0, 1), (5, 3), (9, 4)).view(9, 4, 2)
    torch.testing.assert_close(got, turned.transpose(0, 1))


@pytest.mark.parametrize(
    ("mode", "inner", "border", "back"), [("bicubic", 1e-3, 0.06, 0.02), ("bilinear", 0.015, 0.09, 0.07)]
)
def test_smooth_tables_survive(mode: Any, inner: float, border: float, back: float) -> None:
    """A larger grid samples the same function, best where it has neighbours all around; the way back returns it."""
    small, truth = _smooth(14, 12), _smooth(24, 28)
    large = resize_grid(small, (14, 12), (24, 28), mode=mode)
    error = (large - truth).abs().view(24, 28, -1)
    assert error[4:-4, 4:-4].max() < inner
    assert error.max() < border
    assert (resize_grid(large, (24, 28), (14, 12), mode=mode) - small).abs().max() < back


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tables_are_computed_in_fp32(dtype: torch.dtype) -> None:
    table = torch.randn(16, 8).to(dtype)
    got = resize_grid(table, (4, 4), (6, 9))
    assert got.dtype == dtype
    assert torch.equal(got, resize_grid(table.float(), (4, 4), (6, 9)).to(dtype))


# -- the patch kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "target"), [(2, 3), (4, 8), (7, 8), (8, 8), (5, 16)])
def test_enlarged_patches_give_the_same_tokens(source: int, target: int) -> None:
    channels, grid = 3, 2
    weight = torch.randn(10, channels * source**2, dtype=torch.float64)
    patches = unfold(torch.randn(4, channels, grid * source, grid * source, dtype=torch.float64), source)
    pixels = patches.view(-1, channels, source, source)
    enlarged = F.interpolate(pixels, size=(target, target), mode="bilinear").reshape(4, grid**2, -1)
    resized = resize_patch_kernel(weight, channels, source, target)
    torch.testing.assert_close(enlarged @ resized.T, patches @ weight.T)


@pytest.mark.parametrize(("source", "target"), [(3, 5), (6, 4)])
def test_kernel_is_the_pseudo_inverse(source: int, target: int) -> None:
    """As in the paper: pinv(B') w with B the matrix of the resize, column by column."""
    weight = torch.randn(4, 2 * source**2, dtype=torch.float64)
    basis = torch.eye(source**2, dtype=torch.float64).view(-1, 1, source, source)
    resize = F.interpolate(basis, size=(target, target), mode="bilinear", antialias=True).flatten(1).T
    expected = weight.view(8, -1) @ torch.linalg.pinv(resize)
    torch.testing.assert_close(resize_patch_kernel(weight, 2, source, target), expected.view(4, -1))


def test_smaller_patches_of_smooth_images() -> None:
    coarse = [torch.randn(32, 1, 4, 4, dtype=torch.float64) for _ in range(2)]
    images, kernels = (F.interpolate(t, size=(16, 16), mode="bicubic") for t in coarse)
    small = F.interpolate(images, size=(8, 8), mode="bilinear", antialias=True)
    tokens = images.flatten(1) @ kernels.flatten(1).T
    got = small.flatten(1) @ resize_patch_kernel(kernels.flatten(1), 1, 16, 8).T
    assert (got - tokens).norm() < 0.05 * tokens.norm()


def test_kernel_identity_and_dtype() -> None:
    weight = torch.randn(6, 3 * 16).bfloat16()
    assert resize_patch_kernel(weight, 3, 4, 4) is weight
    got = resize_patch_kernel(weight, 3, 4, 6)
    assert got.dtype == torch.bfloat16 and got.is_contiguous()
    assert torch.equal(got, resize_patch_kernel(weight.double(), 3, 4, 6).bfloat16())


# -- all weights -------------------------------------------------------------------------------------------------------

SAME: dict[str, Any] = {
    "source_grid": (4, 3), "target_grid": (4, 3), "channels": 3, "source_patch": 4, "target_patch": 4,
    "class_rows": 0,
}  # fmt: skip


def _weights(**tables: Tensor) -> dict[str, Tensor]:
    weights = {"embed.weight": torch.randn(8, 48), "embed.bias": torch.randn(8), "blocks.0.norm.weight": torch.randn(8)}
    return weights | {f"embed.{k}": v for k, v in tables.items()}


def test_weights_learned_1d() -> None:
    weights = _weights(pos=torch.randn(13, 8), cls=torch.randn(1, 8))
    geometry = SAME | {"target_grid": (6, 7), "target_patch": 6, "class_rows": 1}
    got = resize_weights(weights, position="learned_1d", mode="bilinear", **geometry)
    assert list(got) == list(weights)
    assert torch.equal(got["embed.pos"][:1], weights["embed.pos"][:1])
    expected = resize_grid(weights["embed.pos"][1:], (4, 3), (6, 7), mode="bilinear")
    assert torch.equal(got["embed.pos"][1:], expected)
    assert torch.equal(got["embed.weight"], resize_patch_kernel(weights["embed.weight"], 3, 4, 6))
    for name in ("embed.bias", "embed.cls", "blocks.0.norm.weight"):
        assert got[name] is weights[name]


def test_weights_learned_2d() -> None:
    weights = _weights(pos_row=torch.randn(4, 8), pos_col=torch.randn(3, 8))
    got = resize_weights(weights, position="learned_2d", **SAME | {"target_grid": (2, 9)})
    assert torch.equal(got["embed.pos_row"], resize_line(weights["embed.pos_row"], 2))
    assert torch.equal(got["embed.pos_col"], resize_line(weights["embed.pos_col"], 9))
    assert got["embed.weight"] is weights["embed.weight"]


@pytest.mark.parametrize("position", ["rope_2d", "sincos_2d"])
def test_weights_without_tables(position: str) -> None:
    weights = _weights()
    got = resize_weights(weights, position=position, **SAME | {"target_grid": (8, 8)})
    assert all(got[name] is weight for name, weight in weights.items()) and len(got) == len(weights)


@pytest.mark.parametrize("class_rows", [0, 1, 2])
def test_weights_of_the_same_geometry_are_untouched(class_rows: int) -> None:
    weights = _weights(pos=torch.randn(12 + class_rows, 8), pos_row=torch.randn(4, 8), pos_col=torch.randn(3, 8))
    for position in ("learned_1d", "learned_2d"):
        got = resize_weights(weights, position=position, **SAME | {"class_rows": class_rows})
        assert all(got[name] is weight for name, weight in weights.items())


def test_a_part_of_the_weights() -> None:
    """Those of a later pipeline stage hold no embedding."""
    weights = {"blocks.3.norm.weight": torch.randn(8)}
    got = resize_weights(weights, position="learned_1d", **SAME | {"target_grid": (6, 7), "target_patch": 6})
    assert got == weights


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("position", "tables", "change", "message"),
    [
        (
            "learned_1d",
            {"pos": (13, 8)},
            {},
            r"embed\.pos has shape \[13, 8\]: expected \[12, D\], for 4 \* 3 positions",
        ),
        ("learned_1d", {"pos": (12, 8)}, {"class_rows": 1}, r"expected \[13, D\], for 1 class token \+ 4 \* 3"),
        ("learned_2d", {"pos_row": (3, 8)}, {}, r"embed\.pos_row has shape \[3, 8\]: expected \[4, D\]"),
        ("learned_2d", {"pos_col": (4, 8)}, {}, r"embed\.pos_col has shape \[4, 8\]: expected \[3, D\]"),
        (
            "rope_2d",
            {},
            {"channels": 1},
            r"embed\.weight has shape \[8, 48\]: expected \[D, 16\], for 1 channels of 4 \* 4",
        ),
        ("rope_2d", {}, {"target_patch": 0}, "target patch side 0 must be at least 1"),
        ("learned_2d", {"pos_row": (4, 8)}, {"target_grid": (0, 3)}, r"target \(0, 1\) has no patches"),
        ("learned_1d", {"pos": (12, 8)}, {"mode": "nearest"}, "mode 'nearest' is unknown: use bicubic or bilinear"),
    ],
)
def test_refusals(position: str, tables: dict[str, Any], change: dict[str, Any], message: str) -> None:
    weights = _weights(**{name: torch.randn(shape) for name, shape in tables.items()})
    with pytest.raises(ValueError, match=message):
        resize_weights(weights, position=position, **SAME | change)


# -- a whole model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["learned_1d", "learned_2d", "rope_2d"])
def test_a_model_loads_weights_of_another_size(position: str) -> None:
    """Patches twice as large: the same tokens from patches that are enlarged one by one, so the same logits."""
    small = ModelConfig(
        width=32, depth=2, num_heads=4, image_size=(8, 12), patch_size=2, num_classes=5, pool="cls", position=position
    )  # type: ignore[arg-type]
    large = replace(small, image_size=(16, 24), patch_size=4)
    trained, loaded = VisionTransformer(small), VisionTransformer(large, seed=1)
    loaded.load(dict(trained.state_dict()), small)
    images = torch.randn(3, 3, 8, 12)
    tiles = images.view(3, 3, 4, 2, 6, 2).transpose(3, 4).reshape(-1, 3 * 4 * 6, 2, 2)
    tiles = F.interpolate(tiles, scale_factor=2, mode="bilinear").view(3, 3, 4, 6, 4, 4)
    enlarged = tiles.transpose(3, 4).reshape(3, 3, 16, 24)
    torch.testing.assert_close(loaded.logits(enlarged), trained.logits(images), rtol=1e-4, atol=1e-4)


def test_a_model_resizes_positions_for_a_larger_image() -> None:
    small = ModelConfig(width=32, depth=1, num_heads=4, image_size=8, patch_size=2, num_classes=5, pool="gap")
    model = VisionTransformer(replace(small, image_size=(12, 20)))
    weights = dict(VisionTransformer(small).state_dict())
    model.load(weights, small)
    own = dict(model.named_parameters())
    assert own["embed.pos_row"].shape == (6, 32) and own["embed.pos_col"].shape == (10, 32)
    assert torch.equal(own["embed.pos_col"], resize_line(weights["embed.pos_col"], 10))
    assert torch.equal(own["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])


def test_weights_that_do_not_fit_a_model() -> None:
    config = ModelConfig(width=32, depth=1, num_heads=4, image_size=8, patch_size=2, num_classes=5, pool="gap")
    model = VisionTransformer(config)
    weights = dict(VisionTransformer(replace(config, num_classes=6)).state_dict())
    with pytest.raises(ValueError, match=r"head\.fc\.\w+ has shape \[6.*\], the model wants \[5"):
        model.load(weights, config)
    del weights["embed.bias"]
    with pytest.raises(ValueError, match=r"embed\.bias are not in both"):
        model.load(weights, config)
