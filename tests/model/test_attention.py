"""Attention of each kind against its definition with every score written out, on one rank and over a context axis."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import Build, ModelConfig
from model.attention import Attention, rotary_table, rotate
from model.kinds import KINDS
from model.sizes import Tokens
from parallel import comm
from parallel.comm import Axis, single_axis
from parallel.grid import GridShape, make_grid
from parallel.layout import TensorLayout, info_of, split_range
from parallel.process_group import World
from parallel.tensor import TensorParallel
from tests.distributed import run_ranks
from tests.model.small import context_axis, real
from tests.model.test_groups import expected as patches_that_see

HEADS, HEAD_DIM, IMAGES = 3, 4, 2
WIDTH = HEADS * HEAD_DIM


def config_of(kind: str, rows: int, cols: int, side: int, prefix: int = 0, **changes: Any) -> ModelConfig:
    sides = {} if kind in ("full", "causal", "linear") else {"grid_size" if kind == "grid" else "window_size": side}
    config = ModelConfig(
        width=WIDTH, depth=1, num_heads=HEADS, image_size=(rows, cols), patch_size=1, in_channels=1, num_classes=2,
        attention=kind, pool="gap", **sides,
        **{"global_tokens" if kind == "global_tokens" else "registers": prefix},
    )  # fmt: skip
    return replace(config, **changes).resolve()


def attention_of(build: Build, kind: str) -> Any:
    """With the same logical parameters on every rank, in float64."""
    attention = real(Attention(build, kind)).double()
    generator = torch.Generator().manual_seed(7)
    for parameter in attention.parameters():
        layout = info_of(parameter).layout
        parameter.data.copy_(layout.local(torch.randn(layout.shape, generator=generator, dtype=torch.float64)))
    return attention


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def who_sees_whom(kind: str, rows: int, cols: int, side: int, prefix: int) -> Tensor:
    """Bool [S, S]."""
    sees = torch.ones(prefix + rows * cols, prefix + rows * cols, dtype=torch.bool)
    if kind in ("full", "linear"):
        return sees
    if kind == "causal":
        return sees.tril()
    sees[prefix:, :prefix] = kind == "global_tokens"
    sees[prefix:, prefix:] = patches_that_see("window" if kind == "global_tokens" else kind, rows, cols, side)
    return sees


def turned(x: Tensor, config: ModelConfig, prefix: int) -> Tensor:
    """Rotary positions of [S, K]: features i and i + K/2 as a complex number, turned by 2 pi place / period."""
    k, (rows, cols) = x.shape[1], config.sizes.image
    angles = torch.zeros(len(x), k // 2, dtype=torch.float64)
    for patch, i in product(range(rows * cols), range(k // 2)):
        row, col = divmod(patch, cols)
        place = 2 * (row + 0.5) / rows - 1 if i < k // 4 else 2 * (col + 0.5) / cols - 1
        angles[prefix + patch, i] = 2 * math.pi * place / (config.rope_base or 0) ** (4 * (i % (k // 4)) / k)
    pairs = torch.complex(x[:, : k // 2], x[:, k // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], 1)


def normed(x: Tensor, norm: Any, config: ModelConfig, head: int) -> Tensor:
    """[S, D] of queries or keys -> [S, K] of a head."""
    own = slice(HEAD_DIM * head, HEAD_DIM * (head + 1))
    if not config.qk_norm:
        return x[:, own]
    x = x if config.qk_norm_over == "width" else x[:, own]
    centred = x if config.norm == "rmsnorm" else x - x.mean(1, keepdim=True)
    y = centred / (centred.square().mean(1, keepdim=True) + config.norm_eps).sqrt() * norm.weight
    y = y if norm.bias is None else y + norm.bias
    return y[:, own] if config.qk_norm_over == "width" else y


def relative(table: Tensor, rows: int, cols: int, side: int, prefix: int) -> Tensor:
    """[P] of a head -> what is added to its scores: [S, S], of pairs that share a window; zero for others."""
    high, wide = min(side, rows), min(side, cols)
    added = torch.zeros(prefix + rows * cols, prefix + rows * cols, dtype=table.dtype)
    for i, j in product(range(rows * cols), repeat=2):
        down, right = i // cols - j // cols, i % cols - j % cols
        if abs(down) < high and abs(right) < wide:
            added[prefix + i, prefix + j] = table[(down + high - 1) * (2 * wide - 1) + right + wide - 1]
    return added


def explicit(attention: Any, qkv: Tensor, config: ModelConfig, kind: str, side: int, prefix: int) -> Tensor:
    """[B * S, 3 * D] -> [B * S, D], image by image and head by head."""
    rows, cols = config.sizes.image
    sees = who_sees_whom(kind, rows, cols, side, prefix)
    images = []
    for image in qkv.split(len(sees)):
        heads = []
        for head in range(HEADS):
            q, k, v = image.split(WIDTH, 1)
            q, k = normed(q, attention.q_norm, config, head), normed(k, attention.k_norm, config, head)
            v = v[:, HEAD_DIM * head :][:, :HEAD_DIM]
            if config.position == "rope_2d":
                q, k = turned(q, config, prefix), turned(k, config, prefix)
            if kind == "linear":
                weights = (F.elu(q) + 1) @ (F.elu(k) + 1).t()
                out = weights @ v / (weights.sum(1, keepdim=True) + 1e-6)
            else:
                scores = q @ k.t() / math.sqrt(HEAD_DIM)
                if config.relative_position:
                    scores = scores + relative(attention.mixer.relative_position[head], rows, cols, side, prefix)
                scores = torch.exp(scores) * sees
                out = scores / scores.sum(1, keepdim=True) @ v
            if config.linear_conv:
                patches = v[prefix:].t().unflatten(1, (rows, cols))
                weight, bias = attention.mixer.conv_weight, attention.mixer.conv_bias
                y = F.conv2d(patches, weight[:, None], bias, padding="same", groups=HEAD_DIM)
                out = out + F.pad(y.flatten(1).t(), (0, 0, prefix, 0))
            heads.append(out)
        images.append(torch.cat(heads, 1))
    return torch.cat(images)


SHAPES = [(4, 4, 2, 0), (4, 6, 2, 2), (5, 7, 3, 1), (3, 5, 4, 0), (3, 2, 4, 2)]  # rows, cols, side, prefix tokens


WIDE: dict[str, Any] = {"qk_norm": True, "qk_norm_over": "width", "norm_eps": 0.5}
RELATIVE: dict[str, Any] = {"relative_position": True, "qk_norm": True, "qk_norm_bias": True, "norm_eps": 0.1}
OPTIONS: list[dict[str, Any]] = [
    {}, {"qk_norm": True, "position": "rope_2d", "rope_base": 9.0}, WIDE | {"qk_norm_bias": True},
    WIDE | {"norm": "rmsnorm"}, RELATIVE,
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "options"), [(k, o) for k in KINDS for o in OPTIONS if "window" in k or o is not RELATIVE], ids=str
)
def test_it_is_what_its_definition_says(kind: str, shape: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    rows, cols, side, prefix = shape
    prefix = max(1, prefix) if kind == "global_tokens" else prefix
    if kind == "linear" and options:
        options = options | {"linear_conv": 3}
    config = config_of(kind, rows, cols, side, prefix, **options)
    attention = attention_of(Build(config=config), kind)
    count = prefix + rows * cols
    qkv = (numbers(IMAGES * count, 3 * WIDTH, seed=1) * 2).requires_grad_()
    weights = numbers(IMAGES * count, WIDTH, seed=2)
    results = []
    for out in (attention(qkv), explicit(attention, qkv, config, kind, side, prefix)):
        results.append([out, *torch.autograd.grad((out * weights).sum(), [qkv, *attention.parameters()])])
    exact = {"rtol": 1e-9, "atol": 1e-9} if config.position != "rope_2d" else {"rtol": 1e-4, "atol": 1e-5}  # fp32 table
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        self.largest = max(self.largest, *sizes, 0)
        return out


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("kind", ["window", "shifted_window", "grid", "global_tokens", "linear"])
def test_nothing_is_as_large_as_all_pairs_of_patches(kind: str, fits: bool) -> None:
    rows = 32 if fits else 31
    config = config_of(kind, rows, rows, 4, 2, width=4, num_heads=1, qk_norm=True, position="rope_2d")
    with _Largest() as seen:
        attention = real(Attention(Build(config=config), kind))
        qkv = torch.randn(config.sizes.tokens, 12, requires_grad=True)
        attention(qkv).sum().backward()
    packed = 1024 * 12
    assert packed - 1000 < seen.largest <= 1024 * (16 + 2)  # scores in groups; all pairs would be a million
    assert sum(buffer.numel() for buffer in attention.buffers()) <= 1024 * (16 + 8 + 8)


# -- rotary positions --------------------------------------------------------------------------------------------------


def _tokens(rows: int, cols: int, prefix: int = 0, ranks: int = 1, index: int = 0) -> Tokens:
    shares = tuple(split_range(rows, ranks, i) for i in range(ranks))
    return Tokens(rows=rows, cols=cols, prefix=prefix, rows_of_ranks=shares, context=context_axis(ranks, index))


def test_scores_depend_on_the_distance_alone() -> None:
    rows, cols = 4, 6
    cos, sin = rotary_table(_tokens(rows, cols), 16, 100.0)
    q, k = (x.expand(1, rows * cols, 1, 16) for x in torch.randn(2, 16))
    scores = rotate(q, cos, sin)[0, :, 0] @ rotate(k, cos, sin)[0, :, 0].t()
    by_distance: dict[tuple[int, int], list[float]] = {}
    for i, j in product(range(rows * cols), repeat=2):
        distance = (j // cols - i // cols, j % cols - i % cols)
        by_distance.setdefault(distance, []).append(scores[i, j].item())
    for values in by_distance.values():
        assert max(values) - min(values) < 1e-4
    different = {round(values[0], 3) for values in by_distance.values()}
    assert len(different) > len(by_distance) * 0.9  # rows and columns tell


def test_rotation_keeps_lengths_and_prefix_tokens() -> None:
    cos, sin = rotary_table(_tokens(3, 5, prefix=2), 8, 100.0)
    assert cos.shape == sin.shape == (2 + 15, 8)
    x = torch.randn(2, 17, 3, 8)
    y = rotate(x, cos, sin)
    assert torch.equal(y[:, :2], x[:, :2])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert not torch.isclose(y[:, 2:], x[:, 2:]).all(-1).any(-1).all()
    assert y.dtype == torch.float32 and rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_coordinates_span_the_map_whatever_its_size() -> None:
    """The middle of three patches of a finer map lies where the patch of the coarse one did."""
    coarse, fine = (torch.stack(rotary_table(_tokens(*size), 8, 100.0)) for size in ((3, 5), (9, 15)))
    middles = fine.view(2, 3, 3, 5, 3, 8)[:, :, 1, :, 1]
    torch.testing.assert_close(coarse, middles.flatten(1, 2))
    centre = torch.stack(rotary_table(_tokens(1, 1), 8, 100.0))
    torch.testing.assert_close(centre, torch.tensor([[[1.0] * 8], [[0.0] * 8]]))


def test_each_rank_turns_by_the_places_of_its_own_rows() -> None:
    whole = torch.stack(rotary_table(_tokens(5, 3, prefix=2), 8, 50.0))
    parts = [torch.stack(rotary_table(_tokens(5, 3, 2, ranks=3, index=i), 8, 50.0)) for i in range(3)]
    assert torch.equal(torch.cat(parts, 1), whole)


# -- over a context axis -----------------------------------------------------------------------------------------------


def _check_over_ranks(axis: Axis, kind: str, rows: int, cols: int, side: int, prefix: int) -> None:
    what = (kind, rows, cols, side, prefix, axis.size)
    prefix = max(1, prefix) if kind == "global_tokens" else prefix
    options = {"linear_conv": 3} if kind == "linear" else {}
    if "window" in kind:
        options = RELATIVE
    config = config_of(kind, rows, cols, side, prefix, **{"qk_norm": True, "position": "rope_2d"} | options)
    alone, shared = (Build(config=config, context=context) for context in (single_axis("context"), axis))
    t = shared.tokens
    count, start = config.sizes.tokens, sum(t.counts[: axis.index])
    own = slice(start, start + t.count)
    qkv = numbers(IMAGES, count, 3 * WIDTH, seed=1).requires_grad_()
    weights = numbers(IMAGES, count, WIDTH, seed=2)
    results = []
    for build, part in ((alone, slice(None)), (shared, own)):
        attention = attention_of(build, kind)
        x = qkv.detach()[:, part].flatten(0, 1).requires_grad_()
        out = attention(x)
        (out * weights[:, part].flatten(0, 1)).sum().backward()
        assert x.grad is not None
        grads = [p.grad for p in attention.parameters()]
        results.append(([out.unflatten(0, (IMAGES, -1)), x.grad.unflatten(0, (IMAGES, -1))], grads))
    (whole, whole_grads), (ours, own_grads) = results
    exact = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda m: f"{what}: {m}"}
    for expected, found in zip(whole, ours, strict=True):
        torch.testing.assert_close(found, expected[:, own], **exact)
    for expected, found in zip(whole_grads, own_grads, strict=True):  # parts of the sum over ranks
        torch.testing.assert_close(comm.all_reduce(found.clone(), axis), expected, **exact)


def _all_kinds(world: World) -> None:
    axis = make_grid(GridShape(context=world.size), world).context
    for kind in KINDS:
        for shape in ((4, 6, 2, 2), (5, 7, 3, 1), (3, 2, 4, 0)):  # the last has fewer groups than ranks
            _check_over_ranks(axis, kind, *shape)


# -- over a tensor axis ------------------------------------------------------------------------------------------------


def _check_over_tensor(axis: Axis, kind: str, options: dict[str, Any]) -> None:
    config = config_of(kind, 5, 7, 3, 1, **options)
    tp = TensorParallel(axis=axis)
    alone, shared = (attention_of(build, kind) for build in (Build(config=config), Build(config=config, tp=tp)))
    heads = TensorLayout(
        shape=(3 * WIDTH,), dim=0, segments=(WIDTH,) * 3, units=(HEAD_DIM,) * 3, parts=axis.size, index=axis.index
    )
    of_v = replace(heads, shape=(WIDTH,), segments=(WIDTH,), units=(HEAD_DIM,))

    def part(x: Tensor, layout: TensorLayout) -> Tensor:
        return layout.local(x.detach().t()).t().contiguous()

    qkv, weights = numbers(IMAGES * 36, 3 * WIDTH, seed=1).requires_grad_(), numbers(IMAGES * 36, WIDTH, seed=2)
    own = part(qkv, heads).requires_grad_()
    out, expected = shared(own), alone(qkv)
    (out * part(weights, of_v)).sum().backward()
    (expected * weights).sum().backward()
    assert own.grad is not None and qkv.grad is not None
    exact = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda m: f"{kind} {options} {axis.size}: {m}"}
    torch.testing.assert_close(out, part(expected, of_v), **exact)
    torch.testing.assert_close(own.grad, part(qkv.grad, heads), **exact)
    for ours, whole in zip(shared.parameters(), alone.parameters(), strict=True):
        info = info_of(ours)
        grad = comm.all_reduce(ours.grad.clone(), axis) if info.partial_over_tensor else ours.grad
        torch.testing.assert_close(grad, info.layout.local(whole.grad), **exact)


def _tensor_options(world: World) -> None:
    axis = make_grid(GridShape(tensor=world.size), world).tensor
    for options in (WIDE, WIDE | {"qk_norm_bias": True}, WIDE | {"norm": "rmsnorm"}):
        _check_over_tensor(axis, "full", options)
    _check_over_tensor(axis, "shifted_window", RELATIVE)


@pytest.mark.parametrize("ranks", [2, 3])
def test_over_tensor_ranks_it_is_as_on_one(ranks: int) -> None:
    """Three heads: two and one on two ranks."""
    run_ranks(ranks, _tensor_options)


@pytest.mark.parametrize("ranks", [2, 3])
def test_over_ranks_it_is_as_on_one(ranks: int) -> None:
    run_ranks(ranks, _all_kinds)
