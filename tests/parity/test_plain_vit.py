"""The plain ViT itself, on cases that can be checked by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.parity import plain_vit
from tests.parity.plain_vit import Shape, Site, StageShape, Weights

SHAPE = Shape(
    patch=2, heads=2, depth=2, block="sequential", position="learned_2d", pool="gap", gelu="erf", image=(6, 8)
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def site(
    kind: str, grid: tuple[int, int], prefix: int = 0, window: int = 2, grid_size: int = 2, heads: int = 2
) -> Site:
    return Site(kind, StageShape(1, heads, (kind,), window, grid_size), grid, prefix)


def random_weights(shape: Shape, images: Tensor, prefix: dict[str, int], widths: Sequence[int]) -> Weights:
    """Of a whole model with LayerScale, QK norm and a convolution in linear attention; `widths` of the stages."""
    w: Weights = {}
    grid = tuple(math.ceil(side / shape.patch) for side in images.shape[2:])
    d, hidden = widths[0], 6

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        w[f"{name}.weight"] = rand(rows, columns) / math.sqrt(columns)
        if bias:
            w[f"{name}.bias"] = rand(rows)

    def norm(name: str, width: int, bias: bool) -> None:
        w[f"{name}.weight"] = 1 + 0.1 * rand(width)
        if bias:
            w[f"{name}.bias"] = rand(width)

    def mlp(name: str, width: int, factor: int) -> None:
        linear(f"{name}.fc1", factor * hidden, width)
        linear(f"{name}.fc2", width, hidden)

    linear("embed", d, images.shape[1] * shape.patch**2)
    w |= {f"embed.{name}": rand(count, d) for name, count in prefix.items()}
    if shape.position == "learned_2d":
        w["embed.pos_row"], w["embed.pos_col"] = rand(grid[0], d), rand(grid[1], d)
    elif shape.position == "learned_1d":
        w["embed.pos"] = rand(prefix.get("cls", 0) + grid[0] * grid[1], d)
    factor, biased, number = 2 if shape.mlp == "swiglu" else 1, shape.norm == "layernorm", 0
    for j, (stage, d) in enumerate(zip(shape.all_stages(), widths, strict=True)):
        if j:
            norm(f"merges.{j - 1}.norm", 4 * widths[j - 1], True)
            linear(f"merges.{j - 1}.proj", d, 4 * widths[j - 1], False)
            if prefix:
                linear(f"merges.{j - 1}.prefix", d, widths[j - 1], False)
        for kind in stage.kinds:
            name, core = f"blocks.{number}.", f"blocks.{number}.{'attn.' if shape.block == 'sequential' else ''}core."
            number += 1
            for which in ("q_norm", "k_norm"):
                norm(core + which, d // stage.heads, False)
            if kind == "linear":
                w[core + "mixer.conv_weight"], w[core + "mixer.conv_bias"] = (
                    rand(d // stage.heads, 3, 3),
                    rand(d // stage.heads),
                )
            if shape.block == "parallel":
                norm(name + "norm", d, biased)
                linear(name + "in_proj", 3 * d + factor * hidden, d, False)
                w[name + "fc1_bias"], w[name + "scale"] = rand(factor * hidden), rand(d)
                linear(name + "out_proj", d, d + hidden)
                continue
            for i in (1, 2):
                norm(f"{name}norm{i}", d, biased)
                w[f"{name}scale{i}"] = rand(d)
            linear(name + "attn.qkv", 3 * d, d)
            linear(name + "attn.proj", d, d)
            mlp(name + "mlp", d, factor)
    norm("head.norm", d, biased)
    if shape.pool == "map":
        w["head.pool.probe"] = rand(1, d)
        for name, rows in (("q", d), ("kv", 2 * d), ("proj", d)):
            linear(f"head.pool.{name}", rows, d)
        norm("head.pool.norm", d, True)
        mlp("head.pool.mlp", d, 1)
    linear("head.fc", 3, d)
    return w


# --- who sees whom ---


def map_of(where: Site) -> str:
    """The grid as letters, one for each neighbourhood."""
    rows, columns = where.grid
    seen = [where.neighbourhood(patch) for patch in range(rows * columns)]
    letters = {one: "abcdefghijklmnop"[i] for i, one in enumerate(dict.fromkeys(seen))}
    return " ".join("".join(letters[one] for one in seen[r * columns : (r + 1) * columns]) for r in range(rows))


@pytest.mark.parametrize(
    ("kind", "grid", "drawn"),
    [
        ("window", (4, 4), "aabb aabb ccdd ccdd"),
        ("shifted_window", (4, 4), "abbc deef deef ghhi"),  # no wrapping round: the corners are alone
        ("grid", (4, 4), "abab cdcd abab cdcd"),
        ("window", (3, 5), "aabbc aabbc ddeef"),
        ("shifted_window", (3, 5), "abbcc deeff deeff"),
        ("shifted_window", (2, 4), "abbc abbc"),  # one window is as high as the map: shifted to the side alone
        ("shifted_window", (2, 1), "a a"),
        ("grid", (3, 5), "abcab defde abcab"),  # strides 2 and 3
        ("global_tokens", (2, 3), "aab aab"),
    ],
)
def test_neighbourhoods(kind: str, grid: tuple[int, int], drawn: str) -> None:
    assert map_of(site(kind, grid)) == drawn


def test_shift_of_an_odd_window() -> None:
    assert map_of(site("shifted_window", (4, 8), window=3)) == "abbbcccd efffgggh efffgggh efffgggh"


def test_masks_with_a_prefix_token() -> None:
    """Two windows of one patch each."""
    drawn = {kind: site(kind, (1, 2), prefix=1, window=1).mask().int().tolist() for kind in ("window", "global_tokens")}
    assert drawn == {"window": [[1, 1, 1], [0, 1, 0], [0, 0, 1]], "global_tokens": [[1, 1, 1], [1, 1, 0], [1, 0, 1]]}


@pytest.mark.parametrize(("kind", "sees_prefix"), [("window", False), ("grid", False), ("global_tokens", True)])
def test_one_window_is_full_attention(kind: str, sees_prefix: bool) -> None:
    qkv = rand(2, 2 + 12, 3 * 8)
    y = plain_vit.self_attention({}, qkv, SHAPE, site(kind, (3, 4), prefix=2, window=4, grid_size=4))
    full = plain_vit.self_attention({}, qkv, SHAPE, site("full", (3, 4), prefix=2))
    alone = plain_vit.self_attention({}, qkv[:, 2:], SHAPE, site("full", (3, 4)))
    torch.testing.assert_close(y[:, :2], full[:, :2])
    torch.testing.assert_close(y[:, 2:], full[:, 2:] if sees_prefix else alone)
    assert not torch.allclose(full[:, 2:], alone)


def test_a_window_is_attention_of_its_tokens_alone() -> None:
    qkv = rand(1, 16, 3 * 8)
    y = plain_vit.self_attention({}, qkv, SHAPE, site("shifted_window", (4, 4)))
    middle = [5, 6, 9, 10]
    torch.testing.assert_close(y[:, middle], plain_vit.self_attention({}, qkv[:, middle], SHAPE, site("full", (2, 2))))
    torch.testing.assert_close(y[:, 0], qkv[:, 0, 16:])  # a corner sees itself


# --- rotary positions ---


def test_rotary_scores_depend_on_differences_of_coordinates_only() -> None:
    rows, columns, where = 3, 4, site("full", (3, 4), prefix=1)
    q, k = rand(8), rand(8)
    rotated_q, rotated_k = (plain_vit.rotate(x.expand(1, 1, 13, 8), where, 100.0)[0, 0] for x in (q, k))
    assert torch.equal(rotated_q[0], q)  # the prefix is not rotated
    scores = (rotated_q[1:] @ rotated_k[1:].T).view(rows, columns, rows, columns)
    by_difference: dict[tuple[int, int], list[float]] = {}
    for r in range(rows):
        for c in range(columns):
            for r2 in range(rows):
                for c2 in range(columns):
                    by_difference.setdefault((r - r2, c - c2), []).append(scores[r, c, r2, c2].item())
    assert all(same == pytest.approx([same[0]] * len(same)) for same in by_difference.values())
    assert len({round(same[0], 9) for same in by_difference.values()}) == len(by_difference) == 5 * 7
    assert by_difference[0, 0][0] == pytest.approx((q @ k).item())


def test_rotary_angles_by_hand() -> None:
    """Head dim 4: dims 0 and 2 turn with the row, dims 1 and 3 with the column, by 2 pi times the coordinate."""
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 8, 4)
    turned = plain_vit.rotate(x, site("full", (2, 4)), 100.0)[0, 0, 2 * 4 - 1]  # row 1 of 2: +1/2, column 3 of 4: +3/4
    torch.testing.assert_close(turned, torch.tensor([-1.0, 0.0, 0.0, -1.0], dtype=torch.float64))


def test_rotary_periods_by_hand() -> None:
    """Head dim 8 and base 100: periods 1 and 100^(2 / 4) = 10."""
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(1, 1, 2, 8)
    first = plain_vit.rotate(x, site("full", (2, 1)), 100.0)[0, 0, 0]  # row -1/2, column 0
    angles = torch.tensor([-math.pi, -math.pi / 10, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(first, torch.cat([angles.cos(), angles.sin()]))


# --- linear attention ---


@pytest.mark.parametrize("feature_map", ["elu", "relu", "focused"])
def test_linear_attention(feature_map: str) -> None:
    shape = replace(SHAPE, feature_map=feature_map)
    q, k, v = rand(3, 1, 2, 1, 4)
    q, k = q.abs(), k.abs()
    torch.testing.assert_close(plain_vit.linear_attention(q, k, v, shape), v, rtol=1e-4, atol=0)  # one token
    q, k, v = rand(3, 1, 2, 5, 4)
    a, b = plain_vit.feature_map(q, shape), plain_vit.feature_map(k, shape)
    linear = a @ (b.transpose(2, 3) @ v) / ((a * b.sum(2, keepdim=True)).sum(3, keepdim=True) + 1e-6)
    torch.testing.assert_close(plain_vit.linear_attention(q, k, v, shape), linear)


def test_feature_maps_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0, -1.0], [-1.0, 0.0, -2.0]], dtype=torch.float64, requires_grad=True)
    elu, relu, focused = (plain_vit.feature_map(x, replace(SHAPE, feature_map=m)) for m in ("elu", "relu", "focused"))
    assert elu.tolist()[1] == pytest.approx([math.exp(-1), 1, math.exp(-2)])
    assert relu.tolist() == [[3, 4, 0], [0, 0, 0]]
    length = math.hypot(27, 64)
    assert focused.tolist() == [pytest.approx([5 * 27 / length, 5 * 64 / length, 0]), [0, 0, 0]]
    focused.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and not x.grad[1].any()


def test_convolution_in_linear_attention() -> None:
    """A kernel that looks one patch up, and a bias per channel, alike for both heads; nothing for the prefix."""
    where = site("linear", (2, 3), prefix=1)
    qkv, weight, bias = rand(1, 7, 3 * 4), torch.zeros(2, 3, 3, dtype=torch.float64), rand(2)
    weight[:, 0, 1] = torch.tensor([1.0, 10.0])
    plain = plain_vit.self_attention({}, qkv, SHAPE, where)
    added = plain_vit.self_attention({"mixer.conv_weight": weight, "mixer.conv_bias": bias}, qkv, SHAPE, where) - plain
    expected = torch.zeros(7, 4, dtype=torch.float64)
    expected[1:] = bias.repeat(2)
    expected[4:] += qkv[0, 1:4, 8:] * torch.tensor([1.0, 10.0, 1.0, 10.0])
    torch.testing.assert_close(added[0], expected)


# --- parts of a block ---


def test_rmsnorm_by_hand() -> None:
    y = plain_vit.rmsnorm(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0]))
    assert y.tolist() == pytest.approx([3 / math.sqrt(12.5), 8 / math.sqrt(12.5)])


def test_swiglu_has_the_gate_first() -> None:
    y = plain_vit.activate(torch.tensor([0.0, 2.0, 5.0, 3.0]), replace(SHAPE, mlp="swiglu"))
    assert y.tolist() == pytest.approx([0, 2 / (1 + math.exp(-2)) * 3])


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_layer_scale(block: str) -> None:
    """Zero: the identity. One: as without."""
    shape = replace(SHAPE, block=block, mlp="swiglu", norm="rmsnorm", depth=1)
    w = plain_vit.under(random_weights(shape, rand(1, 1, 6, 8), {}, [8]), "blocks.0.")
    scales = [name for name in w if name.startswith("scale")]
    assert scales == (["scale"] if block == "parallel" else ["scale1", "scale2"])
    x, where = rand(2, 12, 8), site("full", (3, 4))
    assert torch.equal(plain_vit.block(w | {s: torch.zeros(8) for s in scales}, x, shape, where), x)
    ones = plain_vit.block(w | {s: torch.ones(8) for s in scales}, x, shape, where)
    without = plain_vit.block({name: w[name] for name in w if name not in scales}, x, shape, where)
    torch.testing.assert_close(ones, without)
    assert not torch.allclose(without, plain_vit.block(w, x, shape, where))


# --- embedding and merging ---


def test_prefix_order_and_positions() -> None:
    """1 x 1 patches of weight one, width 4: what was added to each is what the table says."""
    shape = replace(SHAPE, patch=1, position="learned_1d", image=(2, 3))
    names = {"embed.registers": 2, "embed.cls": 1, "embed.global_tokens": 1}  # not in the order of the tokens
    w = {name: rand(count, 4) for name, count in names.items()}
    w |= {"embed.weight": torch.ones(4, 1).double(), "embed.bias": rand(4), "embed.pos": rand(1 + 6, 4)}
    images = rand(1, 1, 2, 3)
    x, grid = plain_vit.embed(w, images, shape)
    assert grid == (2, 3)
    cls, pos = w["embed.cls"] + w["embed.pos"][:1], w["embed.pos"][1:]
    patches = images.view(6, 1) + w["embed.bias"] + pos
    torch.testing.assert_close(x[0], torch.cat([cls, w["embed.registers"], w["embed.global_tokens"], patches]))
    del w["embed.pos"]
    w |= {"embed.pos_row": rand(2, 4), "embed.pos_col": rand(3, 4)}
    learned = plain_vit.embed(w, images, replace(shape, position="learned_2d"))[0][0, -6:]
    table = w["embed.pos_row"][[0, 0, 0, 1, 1, 1]] + w["embed.pos_col"][[0, 1, 2, 0, 1, 2]]
    torch.testing.assert_close(learned, images.view(6, 1) + w["embed.bias"] + table)
    nothing = plain_vit.embed(w, images, replace(shape, position="rope_2d"))[0][0]
    torch.testing.assert_close(nothing[0], w["embed.cls"][0])
    fixed = plain_vit.embed(w, images, replace(shape, position="sincos_2d"))[0][0, -6:]
    last = [math.sin(2), math.cos(2), math.sin(1), math.cos(1)]  # row 1, column 2
    torch.testing.assert_close((fixed - nothing[-6:])[5], torch.tensor(last, dtype=torch.float64))


def test_images_are_padded_to_whole_patches() -> None:
    shape = replace(SHAPE, image=(3, 5))
    images = rand(2, 1, 3, 5)
    w = random_weights(shape, images, {"registers": 1}, [8])
    padded = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    padded[:, :, :3, :5] = images
    assert plain_vit.embed(w, images, shape)[1] == (2, 3)
    assert torch.equal(plain_vit.logits(w, images, shape), plain_vit.logits(w, padded, replace(shape, image=None)))


def test_merge_order() -> None:
    """One channel, 3 x 3 patches numbered from 1 behind a prefix of 10: columns of a 2 x 2 first, zeros outside."""
    x = torch.tensor([10.0, *range(1, 10)], dtype=torch.float64).view(1, 10, 1)
    w = {"norm.weight": torch.ones(4), "norm.bias": torch.arange(4.0), "proj.weight": torch.eye(4)}
    w = {name: value.double() for name, value in (w | {"prefix.weight": torch.full((4, 1), 2.0)}).items()}
    y, grid = plain_vit.merge(w, x, (3, 3), 1)
    assert grid == (2, 2)
    assert y[0, 0].tolist() == [20] * 4
    gathered = torch.tensor([[1, 4, 2, 5], [3, 6, 0, 0], [7, 0, 8, 0], [9, 0, 0, 0]], dtype=torch.float64)
    expected = torch.nn.functional.layer_norm(gathered, (4,), eps=1e-6) + torch.arange(4.0)
    torch.testing.assert_close(y[0, 1:], expected)


# --- whole models ---

PYRAMID = (StageShape(2, 2, ("shifted_window", "linear"), 2, 2), StageShape(3, 4, ("window", "grid", "full"), 2, 2))
WHOLE = {
    "pyramid": replace(SHAPE, stages=PYRAMID, norm="rmsnorm", mlp="swiglu", position="rope_2d", feature_map="focused"),
    "parallel pyramid": replace(
        SHAPE, stages=PYRAMID, block="parallel", mlp="swiglu", pool="map", position="sincos_2d"
    ),
    "global tokens": replace(SHAPE, kinds=("global_tokens",) * 2, window=2, pool="cls", position="learned_1d"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_weight_has_a_gradient(name: str) -> None:
    shape, images = replace(WHOLE[name], image=(5, 10)), rand(2, 1, 5, 10)  # 3 x 5 patches
    prefix = {"cls": 1, "registers": 1, "global_tokens": 2} if shape.pool != "gap" else {"registers": 1}
    w = random_weights(shape, images, prefix, [8, 16][: len(shape.all_stages())])
    for value in w.values():
        value.requires_grad_(True)
    (plain_vit.logits(w, images, shape) ** 2).sum().backward()
    assert not [n for n, value in w.items() if value.grad is None or not value.grad.isfinite().all()]
    unused = [n for n, value in w.items() if value.grad is not None and not value.grad.any()]
    assert unused == []


@pytest.mark.parametrize(("pool", "tokens"), [("cls", slice(0, 1)), ("gap", slice(4, None))])
def test_which_tokens_are_pooled(pool: str, tokens: slice) -> None:
    shape, images = replace(SHAPE, depth=0, pool=pool), rand(2, 1, 6, 8)
    w = random_weights(shape, images, {"cls": 1, "registers": 2, "global_tokens": 1}, [8])
    x = plain_vit.layernorm(plain_vit.embed(w, images, shape)[0], w["head.norm.weight"], w["head.norm.bias"])
    expected = x[:, tokens].mean(1) @ w["head.fc.weight"].T + w["head.fc.bias"]
    torch.testing.assert_close(plain_vit.logits(w, images, shape), expected)


def test_an_isotropic_model_is_one_stage() -> None:
    images = rand(1, 1, 6, 8)
    short = replace(SHAPE, kinds=("window", "grid"), window=2, grid_size=2)
    long = replace(SHAPE, stages=(StageShape(2, 2, ("window", "grid"), 2, 2),))
    w = random_weights(short, images, {}, [8])
    assert torch.equal(plain_vit.logits(w, images, short), plain_vit.logits(w, images, long))
    assert not torch.allclose(plain_vit.logits(w, images, short), plain_vit.logits(w, images, SHAPE))
