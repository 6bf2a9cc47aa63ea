"""Pyramids: maps, tokens and names of each stage, patch merges, feature maps, and how ranks share the rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import Build, MicroBatch, ModelConfig, StageConfig, VisionTransformer, build_layers
from model.blocks import BLOCKS, DropPath
from model.merge import PatchMerge, Widening
from model.sizes import Tokens
from tests.model.small import TINY, context_axis, real

STAGES = (
    StageConfig(depth=2, width=8, num_heads=2, attention="window, shifted_window"),
    StageConfig(depth=1, width=16, num_heads=2, attention="grid"),
    StageConfig(depth=2, width=24, num_heads=3, mlp_dim=20, attention=("full", "linear")),
)
# 17 x 26 pixels: 9 x 13 patches of 2 x 2, then 5 x 7, then 3 x 4
PYRAMID = ModelConfig(
    image_size=(17, 26), patch_size=2, in_channels=1, num_classes=5, stages=STAGES, window_size=3, grid_size=2,
    registers=2, pool="gap", drop_path=0.4,
)  # fmt: skip
MAPS, WIDTHS = [(9, 13), (5, 7), (3, 4)], [8, 16, 24]


def test_sizes() -> None:
    sizes = PYRAMID.resolve().sizes
    assert [(stage.rows, stage.cols) for stage in sizes.stages] == MAPS
    assert [stage.stride for stage in sizes.stages] == [2, 4, 8]
    assert [sizes.tokens_of(i) for i in range(3)] == [2 + 117, 2 + 35, 2 + 12]
    assert (sizes.tokens, sizes.depth, sizes.prefix, sizes.fewest_heads) == (119, 5, 2, 2)
    assert [stage.mlp for stage in sizes.stages] == [32, 64, 20]
    assert [stage.head_dim for stage in sizes.stages] == [4, 8, 8]
    assert sizes.last is sizes.stages[2]


def test_names_and_shapes_of_the_layers() -> None:
    layers = build_layers(PYRAMID.resolve())
    assert [layer.name for layer in layers] == [
        "embed", "blocks.0", "blocks.1", "merges.0", "blocks.2", "merges.1", "blocks.3", "blocks.4", "head",
    ]  # fmt: skip
    assert [layer.stage for layer in layers] == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    rows = [119] * 3 + [37] * 2 + [14] * 3
    assert [layer.output for layer in layers] == [*zip(rows, [8] * 3 + [16] * 2 + [24] * 3, strict=True), (1, 5)]
    build = Build(config=PYRAMID.resolve())
    assert [layer.boundary(3, build) for layer in layers[:-1]] == [(3 * rows, width) for rows, width in zip(
        rows, [8] * 3 + [16] * 2 + [24] * 3, strict=True
    )]  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("pool", ["map", "cls", "gap"])
def test_the_whole_model(pool: Any, block: Any) -> None:
    model = VisionTransformer(replace(PYRAMID, pool=pool, block=block, drop_path=0.0))
    images = torch.randn(3, 1, 17, 26)
    logits = model.logits(images)
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(model.logits(images[1:2]), logits[1:2])
    assert sum(layer.parameters for layer in model.specs) == sum(p.numel() for p in model.parameters())


def test_drop_path_rates_grow_through_all_stages() -> None:
    model = VisionTransformer(PYRAMID)
    drops = [module for module in model.modules() if isinstance(module, DropPath)]
    assert [drop.rate for drop in drops] == pytest.approx([rate for rate in (0.0, 0.1, 0.2, 0.3, 0.4) for _ in "ab"])
    assert [drop.tokens for drop in drops] == [119] * 4 + [37] * 2 + [14] * 4
    assert len({drop.stream for drop in drops}) == len(drops)


# -- feature maps ------------------------------------------------------------------------------------------------------


def test_features_of_a_pyramid() -> None:
    model, images = VisionTransformer(PYRAMID).eval(), torch.randn(2, 1, 17, 26)
    features = model.features(images)
    assert [tuple(x.shape) for x, _ in features] == [(2, w, *size) for w, size in zip(WIDTHS, MAPS, strict=True)]
    assert [stride for _, stride in features] == [2, 4, 8]
    x: Tensor | None = None
    seen = {}
    for spec in model.specs[:-1]:
        x = model.get_submodule(spec.name)(x, MicroBatch.of_images(images))
        seen[spec.name] = x
    for (found, _), name, (rows, cols) in zip(features, ("blocks.1", "blocks.2", "blocks.4"), MAPS, strict=True):
        patches = seen[name].view(2, 2 + rows * cols, -1)[:, 2:]  # after the stage's last block, without the prefix
        for row, col in ((0, 0), (1, 2), (rows - 1, cols - 1)):
            assert torch.equal(found[:, :, row, col], patches[:, row * cols + col])


def test_features_of_a_model_without_stages() -> None:
    model = VisionTransformer(replace(TINY, image_size=(6, 10), pool="cls", registers=1))
    ((found, stride),) = model.features(torch.randn(2, 3, 6, 10))
    assert found.shape == (2, 16, 3, 5) and stride == 2


def test_features_can_be_trained() -> None:
    model = VisionTransformer(replace(PYRAMID, drop_path=0.0))
    sum(x.square().sum() for x, _ in model.features(torch.randn(2, 1, 17, 26))).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("head."), name


def test_a_stage_may_keep_the_map_and_widen_tokens() -> None:
    stages = (
        StageConfig(depth=1, width=4, num_heads=1), StageConfig(depth=1, width=6, num_heads=1, merge=False),
        StageConfig(depth=1, width=8, num_heads=1),
    )  # fmt: skip
    config = replace(PYRAMID, image_size=(7, 12), patch_size=1, stages=stages, window_size=None, grid_size=None)
    sizes = config.resolve().sizes
    assert [(s.rows, s.cols, s.stride) for s in sizes.stages] == [(7, 12, 1), (7, 12, 1), (4, 6, 2)]
    wide = real(Widening("merges.0", Build(config=config.resolve(), stage=1)))
    nn.init.normal_(wide.proj.weight)
    x = torch.randn(2 * sizes.tokens, 4)
    torch.testing.assert_close(wide(x, MicroBatch.of_images(torch.empty(2, 1, 7, 12))), x @ wide.proj.weight.T)
    with pytest.raises(ValueError, match=r"stages\[0\]\.merge is False, .* no stage lies before it"):
        replace(config, stages=(replace(stages[0], merge=False), *stages[1:])).resolve()


# -- patch merges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (8, 11), (7, 11), (1, 1)], ids=str)
@pytest.mark.parametrize("registers", [0, 2])
def test_a_patch_merge(size: tuple[int, int], registers: int) -> None:
    """Against a loop over the patches of the coarse map; what lies outside is zero."""
    stages = (StageConfig(depth=1, width=4, num_heads=1), StageConfig(depth=1, width=6, num_heads=1))
    config = replace(
        PYRAMID, image_size=size, patch_size=1, stages=stages, registers=registers, window_size=None, grid_size=None
    ).resolve()  # fmt: skip
    merge = real(PatchMerge("merges.0", Build(config=config, stage=1))).double()
    for parameter in merge.parameters():
        nn.init.normal_(parameter)
    rows, cols = size
    x = torch.randn(2, registers + rows * cols, 4, dtype=torch.float64)
    ours = merge(x.flatten(0, 1), MicroBatch.of_images(torch.empty(2, 1, rows, cols))).view(2, -1, 6)
    down, across = -(-rows // 2), -(-cols // 2)
    assert ours.shape[1] == registers + down * across == config.sizes.tokens_of(1)
    maps = x[:, registers:].view(2, rows, cols, 4)
    for i in range(down):
        for j in range(across):
            four = [(2 * i, 2 * j), (2 * i + 1, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j + 1)]
            parts = [maps[:, r, c] if r < rows and c < cols else torch.zeros(2, 4).double() for r, c in four]
            normed = F.layer_norm(torch.cat(parts, 1), (16,), merge.norm.weight, merge.norm.bias, 1e-6)
            torch.testing.assert_close(ours[:, registers + i * across + j], normed @ merge.proj.weight.t())
    if registers:
        torch.testing.assert_close(ours[:, :registers], x[:, :registers] @ merge.prefix.weight.t())
    else:
        assert merge.prefix is None


# -- rows over the ranks of a context axis -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_which_tokens_a_rank_holds(ranks: int) -> None:
    sizes = PYRAMID.resolve().sizes
    for index in range(ranks):
        places = [Tokens.of(sizes, stage, context_axis(ranks, index)) for stage in range(3)]
        for stage, place in enumerate(places):
            edges = [edge for share in place.rows_of_ranks for edge in share]
            assert edges[0] == 0 and edges[-1] == place.rows == MAPS[stage][0]
            assert edges[1:-1:2] == edges[2::2]
            assert all(a < b for a, b in place.rows_of_ranks)
            assert sum(place.counts) == sizes.tokens_of(stage) and place.counts[index] == place.count
            assert (place.first, place.stop) == place.rows_of_ranks[index]
            assert place.own_prefix == (2 if index == 0 else 0)
            assert place.count == place.own_prefix + place.patches
        for before, after in pairwise(places):  # what a rank merges, it holds: no neighbour is asked
            assert before.first == 2 * after.first
            assert before.stop == min(2 * after.stop, before.rows)
