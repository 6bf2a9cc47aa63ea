"""Initial values: the same in every layout bit for bit, and distributed as they should be."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from parallel import random
from parallel.layout import Init, ParameterInfo, TensorLayout, attach_info
from parallel.random import fill, initialise, key, uniform

MASK = (1 << 64) - 1
CASES = [  # shape, dim, segments, one scale per segment
    ((13,), 0, (13,), (1.0,)),
    ((37, 5), 0, (8, 8, 21), (0.1, 1.0, 3.0)),
    ((5, 41), 1, (16, 25), (1.0, 0.5)),
    ((3, 10, 7), 1, (10,), (1.0,)),
]
KINDS = ("normal", "truncated_normal", "uniform", "constant")


def draw(layout: TensorLayout, kind: str, scales: tuple[float, ...] = (1.0,), stream: int = 1) -> Tensor:
    local = torch.full(layout.local_shape, float("nan"))
    fill(local, layout, Init(kind=kind, scales=scales), stream)
    return local


def line(count: int, kind: str, stream: int = 1) -> Tensor:
    return draw(TensorLayout(shape=(count,)), kind, stream=stream)


@pytest.mark.parametrize(("case", "kind"), list(product(CASES, KINDS)), ids=str)
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_shards_are_slices_of_the_whole(case: tuple, kind: str, parts: int) -> None:
    shape, dim, segments, scales = case
    full = draw(TensorLayout(shape=shape, dim=dim, segments=segments), kind, scales)
    assert not full.isnan().any()
    for index in range(parts):
        layout = TensorLayout(shape=shape, dim=dim, segments=segments, parts=parts, index=index)
        assert torch.equal(draw(layout, kind, scales), layout.local(full)), index


def test_segments_only_scale() -> None:
    shape = (6, 4)
    plain = draw(TensorLayout(shape=shape), "normal")
    scaled = draw(TensorLayout(shape=shape, dim=0, segments=(2, 4)), "normal", (1.0, 8.0))
    torch.testing.assert_close(scaled, torch.cat([plain[:2], 8 * plain[2:]]), rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_make_no_difference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = TensorLayout(shape=(29, 11), dim=0, segments=(9, 20), parts=2, index=1)
    whole = draw(layout, "normal")
    monkeypatch.setattr(random, "_CHUNK", chunk)
    assert torch.equal(draw(layout, "normal"), whole)


def test_normal() -> None:
    x = line(200_000, "normal").double()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01
    assert abs((x**4).mean() - 3) < 0.1
    assert ((x.abs() < 1).double().mean() - math.erf(math.sqrt(0.5))).abs() < 0.005
    assert x.abs().max() > 4


def test_truncated_normal() -> None:
    x = line(200_000, "truncated_normal").double()
    inside = math.erf(math.sqrt(2))  # a normal's share within 2 standard deviations
    std = math.sqrt(1 - 4 * math.exp(-2) / (math.sqrt(2 * math.pi) * inside))
    assert x.abs().max() <= 2 and x.abs().max() > 1.99
    assert abs(x.mean()) < 0.01 and abs(x.std() - std) < 0.01


def test_uniform_and_constant() -> None:
    layout = TensorLayout(shape=(200_000,))
    x = draw(layout, "uniform", (0.25,)).double()
    assert abs(x.mean()) < 0.002 and abs(x.std() - 0.25 / math.sqrt(3)) < 0.002
    assert 0.2499 < x.abs().max() <= 0.25
    assert (draw(layout, "constant", (-10.0,)) == -10).all()
    with pytest.raises(ValueError, match="'cauchy'"):
        draw(layout, "cauchy")


def test_neighbours_are_independent() -> None:
    """Along the stream, and along both dims of a matrix."""
    x = uniform(key(0, "weight"), torch.arange(1 << 18).view(512, 512)).double() - 0.5
    for shift in ((1, 0), (0, 1), (1, 1), (0, 2)):
        moved = x.roll(shift, (0, 1))
        assert abs((x * moved).mean() * 12) < 0.01, shift
    assert x.unique().numel() > 0.97 * x.numel()  # 2^23 values for 2^18 draws


@pytest.mark.parametrize("other", [key(0, "blocks.1.weight"), key(1, "blocks.0.weight"), key(1, "0:blocks.0.weight")])
def test_names_and_seeds_draw_different_numbers(other: int) -> None:
    index = torch.arange(100_000)
    a, b = uniform(key(0, "blocks.0.weight"), index), uniform(other, index)
    assert (a == b).sum() <= 2
    assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.02


def _index_of(bits: int, stream: int) -> int:
    """The index whose hash is `bits`: SplitMix64's finaliser backwards."""
    for shift, factor in ((31, random._MIX_2), (27, random._MIX_1), (30, random._GOLDEN)):
        value = bits
        for _ in range(64 // shift):
            value = bits ^ (value >> shift)
        bits = value * pow(factor, -1, 1 << 64) & MASK if factor != random._GOLDEN else value
    return random._signed((bits - stream) * pow(random._GOLDEN, -1, 1 << 64))


def test_neither_0_nor_1_occurs() -> None:
    """At the hashes that come closest, where rounding to fp32 would make infinite normals."""
    stream = key(0, "any")
    bits = [0, 1, MASK >> 1, (MASK >> 1) + 1, MASK - 1, MASK, MASK - (1 << 40), MASK - (1 << 41)]
    index = torch.tensor([_index_of(b, stream) for b in bits])
    u = uniform(stream, index)
    torch.testing.assert_close(
        u.double(), torch.tensor([b / 2.0**64 for b in bits], dtype=torch.float64), rtol=0, atol=2**-23
    )
    assert (u > 0).all() and (u < 1).all()
    assert u[0] == 1 - u[5]  # symmetric, so that means are zero
    assert random._draw("normal", 1.0, u).isfinite().all()


def test_initialise_goes_by_name() -> None:
    def module(names: tuple[str, ...]) -> nn.ParameterDict:
        out = nn.ParameterDict({name: nn.Parameter(torch.empty(3, 4)) for name in names})
        for parameter in out.parameters():
            layout = TensorLayout(shape=(3, 4))
            attach_info(parameter, ParameterInfo(layout=layout, init=Init(kind="normal", scales=(1.0,))))
        return out

    one, other, reseeded = module(("a", "b")), module(("b", "c", "a")), module(("a",))
    initialise(one, seed=3)
    initialise(other, seed=3)
    initialise(reseeded, seed=4)
    assert torch.equal(one["a"], other["a"]) and torch.equal(one["b"], other["b"])
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(one["a"], reseeded["a"])
