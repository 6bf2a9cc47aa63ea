"""The model on one process: shapes, drop-path, patches, positions, blocks, initial weights."""

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import Build, Stage, VisionTransformer, build_layers
from model.blocks import BLOCKS, DropPath, Mlp
from model.embed import Embedding, sincos_table, unfold
from tests.model.small import TINY, batch_of, real
from tests.parity import plain_vit

# -- the whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pool", "position", "block"),
    list(product(("map", "cls", "gap"), ("learned_2d", "learned_1d", "sincos_2d", "rope_2d"), BLOCKS)),
)
def test_shapes(pool: Any, position: Any, block: Any) -> None:
    registers = 2 if position == "sincos_2d" else 0
    config = replace(TINY, pool=pool, position=position, block=block, registers=registers, in_channels=1).resolve()
    model = VisionTransformer(config)
    images = torch.randn(3, 1, 8, 8)
    logits = model.logits(images)
    assert logits.shape == (3, 5) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())  # nothing is left out
    torch.testing.assert_close(model.logits(images[1:2]), logits[1:2])  # images do not mix
    tokens = 16 + registers + (pool == "cls")
    assert config.sizes.tokens == tokens
    assert [layer.output for layer in model.specs] == [(tokens, 16)] * 3 + [(1, 5)]
    assert sum(layer.parameters for layer in model.specs) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("block", BLOCKS)
def test_shapes_with_everything_else_there_is(block: Any) -> None:
    """Each kind of attention, RMSNorm, gated MLP, layer scale, all prefix tokens, and images that are not square."""
    config = replace(
        TINY, image_size=(9, 12), in_channels=1, depth=7, block=block, norm="rmsnorm", mlp="swiglu", layer_scale=0.5,
        qk_norm=True, position="rope_2d", pool="cls", registers=2, global_tokens=3, linear_conv=3, window_size=3,
        grid_size=2, attention="linear, window, shifted_window, grid, global_tokens, causal, full",
    ).resolve()  # fmt: skip
    model = VisionTransformer(config)
    images = torch.randn(3, 1, 9, 12)
    logits = model.logits(images)
    assert logits.shape == (3, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    torch.testing.assert_close(model.logits(images[1:2]), logits[1:2])  # images do not mix
    tokens = 5 * 6 + 1 + 2 + 3
    assert config.sizes.tokens == tokens
    assert [layer.output for layer in model.specs] == [(tokens, 16)] * 8 + [(1, 5)]
    assert sum(layer.parameters for layer in model.specs) == sum(p.numel() for p in model.parameters())


OUTER: dict[str, dict[str, Any]] = {
    "CLIP": {
        "pool": "cls", "position": "learned_1d", "pre_norm": True, "norm_after_pool": True, "gelu": "quick",
        "patch_bias": False, "classifier_bias": False,
    },
    "DeiT": {"pool": "cls", "position": "learned_1d", "class_tokens": 2, "norm_after_pool": True, "registers": 1},
    "no class position": {"pool": "cls", "position": "learned_1d", "class_tokens": 2, "class_position": False},
    "features of two tokens": {"pool": "cls", "class_tokens": 2, "num_classes": 0},
    "DINOv2": {"pool": "cls_gap", "registers": 2, "position": "learned_1d"},
    "beside, normed after": {"pool": "cls_gap", "norm_after_pool": True, "norm": "rmsnorm", "position": "none"},
    "gap beside a class token": {"pool": "gap", "class_tokens": 1, "num_classes": 0, "norm_after_pool": True},
    "probe, then norm": {"pool": "map", "class_tokens": 1, "norm_after_pool": True, "patch_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OUTER)
def test_other_embeddings_and_heads(name: str) -> None:
    """Against the plain ViT in float64, with all its weights drawn anew; then images of another size."""
    config = replace(TINY, **OUTER[name]).resolve()
    model = VisionTransformer(config, dynamic_image_size=True).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) / 4)
    shape = plain_vit.Shape(
        patch=2, heads=4, depth=2, block="sequential", position=str(config.position), pool=str(config.pool),
        gelu=str(config.gelu), norm=str(config.norm), norm_after_pool=bool(config.norm_after_pool), eps=1e-6,
    )  # fmt: skip
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    found = model(images)
    weights = {key: weight.detach() for key, weight in model.named_parameters()}
    torch.testing.assert_close(found, plain_vit.logits(weights, images, shape), rtol=1e-9, atol=1e-9)
    assert found.shape == (3, config.num_classes or 16 * (1 + (config.pool == "cls_gap")))
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())  # nothing is left out
    assert [layer.output for layer in model.specs] == [(config.sizes.tokens, 16)] * 3 + [(1, found.shape[1])]
    wide = replace(config, image_size=(8, 12)).resolve()
    other = VisionTransformer(wide).double()
    other.load(weights, config)
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(model(images), other(images))
    assert [tuple(x.shape) for x, _ in model.features(images)] == [(2, 16, 4, 6)]


def test_images_that_do_not_fill_their_patches_are_padded_with_zeros() -> None:
    odd, even = (VisionTransformer(replace(TINY, image_size=size)) for size in ((7, 9), (8, 10)))
    images = torch.randn(2, 3, 7, 9)
    assert torch.equal(odd.logits(images), even.logits(F.pad(images, (0, 1, 0, 1))))
    assert odd.sizes.tokens == 4 * 5


def test_initial_weights_do_not_depend_on_the_cut() -> None:
    config = replace(TINY, depth=4, pool="map", registers=1).resolve()
    layers, build = build_layers(config), Build(config=config)
    whole = dict(VisionTransformer(config, seed=5).named_parameters())
    for cut in ([0, 6], [0, 1, 4, 6], [0, 3, 5, 6]):
        seen = {}
        for start, stop in pairwise(cut):
            seen |= dict(real(Stage(layers[start:stop], build), seed=5).named_parameters())
        assert seen.keys() == whole.keys()
        assert all(torch.equal(seen[name], whole[name]) for name in whole)
    other = dict(VisionTransformer(config, seed=6).named_parameters())
    name = "blocks.3.attn.qkv.weight"
    assert not torch.equal(whole[name], other[name])
    assert not torch.equal(whole[name], whole["blocks.2.attn.qkv.weight"])


def test_stages_in_a_row_are_the_model() -> None:
    config = replace(TINY, depth=3, drop_path=0.3).resolve()
    layers, build = build_layers(config), Build(config=config)
    batch = batch_of([7, 8, 9], images=torch.randn(3, 3, 8, 8))
    flowing: tuple[Tensor, ...] = ()
    for start, stop in ((0, 2), (2, 4), (4, 5)):
        flowing = real(Stage(layers[start:stop], build))(flowing, batch)
    assert torch.equal(flowing[0], VisionTransformer(config)(batch))


def test_head_bias() -> None:
    model = VisionTransformer(replace(TINY, head_bias=-10.0))
    assert (model.get_parameter("head.fc.bias") == -10).all()
    assert (VisionTransformer(TINY).get_parameter("head.fc.bias") == 0).all()


# -- drop-path ---------------------------------------------------------------------------------------------------------


def _mask(drop: DropPath, ids: list[int], *, training: bool = True) -> Tensor:
    """Which images are kept, and that the rows of an image share its fate: [B]."""
    scale = drop(batch_of(ids, training=training), torch.float32)
    rows = torch.ones(len(ids), drop.tokens) if scale is None else scale.view(len(ids), -1)
    assert (rows == rows[:, :1]).all()
    return rows[:, 0]


def test_drop_path_goes_by_sample() -> None:
    build = Build(config=TINY.resolve(), seed=1)
    drop, ids = DropPath("blocks.1", 0.4, build), list(range(100))
    mask = _mask(drop, ids)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    assert torch.equal(_mask(drop, order), mask[order])
    assert torch.equal(_mask(drop, ids[30:37]), mask[30:37])  # another micro-batch
    for other in (DropPath("blocks.0", 0.4, build), DropPath("blocks.1", 0.4, replace(build, seed=2))):
        assert not torch.equal(_mask(other, ids), mask)
    assert torch.equal(_mask(DropPath("blocks.1", 0.4, build), ids), mask)  # nothing is remembered


def test_drop_path_rate() -> None:
    drop = DropPath("any", 0.3, Build(config=TINY.resolve()))
    mask = _mask(drop, list(range(20_000)))
    assert mask.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.015)
    assert mask.mean().item() == pytest.approx(1, abs=0.02)
    assert (_mask(drop, [1, 2, 3], training=False) == 1).all()
    assert (_mask(DropPath("any", 0.0, Build(config=TINY.resolve())), [1, 2]) == 1).all()


@pytest.mark.parametrize("block", BLOCKS)
def test_drop_path_rates_grow_with_depth(block: Any) -> None:
    model = VisionTransformer(replace(TINY, depth=5, drop_path=0.4, block=block))
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    per_block = len(rates) // 5
    assert rates == pytest.approx([rate for rate in (0.0, 0.1, 0.2, 0.3, 0.4) for _ in range(per_block)])
    names = [module.stream for module in model.modules() if isinstance(module, DropPath)]
    assert len(set(names)) == len(names)  # each draws for itself


@pytest.mark.parametrize("block", BLOCKS)
def test_a_dropped_image_skips_the_whole_block(block: str) -> None:
    config = TINY.resolve()
    module = real(BLOCKS[block]("b", 1 - 1e-6, "full", Build(config=config)))
    x = torch.randn(3 * 16, 16)
    assert torch.equal(module(x, batch_of([0, 1, 2])), x)
    assert not torch.allclose(module(x, batch_of([0, 1, 2], training=False)), x, atol=1e-2)


# -- embedding ---------------------------------------------------------------------------------------------------------


def test_unfold_and_a_matrix_are_a_convolution() -> None:
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    kernel = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    expected = F.conv2d(images, kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(unfold(images, 4) @ kernel.flatten(1).t(), expected)
    cut = images[:, :, :9, :10]  # what does not fill a patch is filled up, at the bottom and the right
    expected = F.conv2d(F.pad(cut, (0, 2, 0, 3)), kernel, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(unfold(cut, 4) @ kernel.flatten(1).t(), expected)


def _table(**changes: Any) -> tuple[Embedding, Tensor]:
    """An embedding, and what it gives for black images: [S, D]."""
    config = replace(TINY, **changes).resolve()
    embedding = real(Embedding(Build(config=config)))
    nn.init.normal_(embedding.bias)
    rows = embedding(None, batch_of([0, 1], images=torch.zeros(2, 3, *config.sizes.image))).view(2, -1, 16)
    assert rows.shape[1] == config.sizes.tokens
    assert torch.equal(rows[0], rows[1])
    return embedding, rows[0]


def test_learned_2d_positions() -> None:
    embedding, table = _table(
        position="learned_2d", pool="cls", registers=2, global_tokens=1, attention="global_tokens", image_size=(4, 8)
    )  # fmt: skip
    assert embedding.cls is not None and embedding.registers is not None and embedding.global_tokens is not None
    assert torch.equal(table[0], embedding.cls[0])
    assert torch.equal(table[1:3], embedding.registers)
    assert torch.equal(table[3:4], embedding.global_tokens)
    for row, column in product(range(2), range(4)):
        expected = embedding.pos_row[row] + embedding.pos_col[column] + embedding.bias
        torch.testing.assert_close(table[4 + 4 * row + column], expected)


def test_learned_1d_positions() -> None:
    embedding, table = _table(position="learned_1d", pool="cls", registers=1)
    assert embedding.cls is not None and embedding.registers is not None
    torch.testing.assert_close(table[0], embedding.cls[0] + embedding.pos[0])
    assert torch.equal(table[1], embedding.registers[0])
    torch.testing.assert_close(table[2:], embedding.pos[1:] + embedding.bias)
    embedding, table = _table(position="learned_1d", pool="gap")
    torch.testing.assert_close(table, embedding.pos + embedding.bias)


def test_sincos_positions() -> None:
    embedding, table = _table(position="sincos_2d", pool="gap")
    assert {name for name, _ in embedding.named_parameters()} == {"weight", "bias"}
    fixed = sincos_table(4, 4, 16)
    torch.testing.assert_close(table, fixed + embedding.bias)
    omega = torch.tensor([1.0, 10_000**-0.25, 10_000**-0.5, 10_000**-0.75])
    for row, column in ((0, 0), (1, 3), (3, 2)):
        expected = torch.cat([(column * omega).sin(), (column * omega).cos(), (row * omega).sin(), (row * omega).cos()])
        torch.testing.assert_close(fixed[4 * row + column], expected)
    products = fixed @ fixed.t()  # depends on the distance alone
    torch.testing.assert_close(products[0, 5], products[10, 15])
    assert torch.equal(sincos_table(3, 5, 8), sincos_table(5, 5, 8)[:15])  # rows first
    assert torch.equal(sincos_table(3, 4, 8).view(3, 4, 8), sincos_table(3, 5, 8).view(3, 5, 8)[:, :4])


def test_rotary_positions_are_not_in_the_embedding() -> None:
    embedding, table = _table(position="rope_2d", pool="gap", registers=1)
    assert {name for name, _ in embedding.named_parameters()} == {"weight", "bias", "registers"}
    assert torch.equal(table, torch.cat([embedding.registers, embedding.bias.expand(16, -1)]))


# -- blocks ------------------------------------------------------------------------------------------------------------


def test_a_gated_mlp() -> None:
    mlp = real(Mlp(Build(config=replace(TINY, mlp="swiglu", mlp_dim=6).resolve())))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(7, 16)
    gate, value = F.linear(x, mlp.fc1.weight, mlp.fc1.bias).split(6, 1)
    expected = F.linear(gate * gate.sigmoid() * value, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(mlp(x, 7), expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_layer_scale(block: Any) -> None:
    """Each branch times a factor per feature, which starts at the given value; at 0 the block is no more."""
    module = real(BLOCKS[block]("b", 0.0, "full", Build(config=replace(TINY, layer_scale=0.25).resolve())))
    plain = real(BLOCKS[block]("b", 0.0, "full", Build(config=TINY.resolve())))
    scales = {name: p for name, p in module.named_parameters() if name.startswith("scale")}
    assert len(scales) == (1 if block == "parallel" else 2)
    assert all((p == 0.25).all() and p.shape == (16,) for p in scales.values())
    assert {name for name, _ in module.named_parameters()} - set(scales) == {n for n, _ in plain.named_parameters()}
    x = torch.randn(2 * 16, 16)
    for p in scales.values():
        nn.init.ones_(p)
    assert torch.equal(module(x, batch_of([0, 1])), plain(x, batch_of([0, 1])))
    for p in scales.values():
        nn.init.zeros_(p)
    assert torch.equal(module(x, batch_of([0, 1])), x)
    factors = torch.randn(16)
    with torch.no_grad():
        list(scales.values())[-1].copy_(factors)  # of the last branch
    ours = module(x, batch_of([0, 1])) - x
    other = real(BLOCKS[block]("b", 0.0, "full", Build(config=TINY.resolve())))
    if block == "sequential":  # without the branch before it
        for p in other.attn.proj.parameters():
            nn.init.zeros_(p)
    torch.testing.assert_close(ours, (other(x, batch_of([0, 1])) - x) * factors, atol=1e-5, rtol=1e-5)


def test_a_model_is_made_where_nothing_is_to_be_learned() -> None:
    with torch.inference_mode():
        made = VisionTransformer(TINY)(torch.zeros(1, 3, 8, 8))
    assert torch.equal(made, VisionTransformer(TINY)(torch.zeros(1, 3, 8, 8)))
