"""Gradients that are sums over 50,000 rows, in 16 bits: as exact as their one rounding, in every form of a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.embed import add_in_turn
from model.kernels import Kernels
from model.kernels.reference import depthwise_conv
from parallel.tensor import linear

ROWS, WIDTH, HEADS, TOKENS = 50_432, 64, 4, 197  # 256 images
ROUNDING = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of a sum and what it is taken of; losing rows costs 1e-2 to 1

Op = Callable[..., Tensor]


def _heads(x: Tensor) -> Tensor:
    return torch.cat([x] * 3, -1)


def of_kernels(k: Kernels) -> dict[str, tuple[Op, list[int]]]:
    """Operations of x [ROWS, WIDTH] and parameters, and these parameters' lengths."""
    return {
        "layer_norm": (k.layer_norm, [WIDTH, WIDTH]),
        "rms_norm": (k.rms_norm, [WIDTH]),
        "add_layer_norm": (lambda x, w, b: k.add_layer_norm(x, x / 2, w, b)[0], [WIDTH, WIDTH]),
        "qk layer_norm": (lambda x, q, w: sum(k.qk_norm(_heads(x), HEADS, q, w)[:2]), [WIDTH // HEADS] * 2),  # type: ignore[return-value]
        "qk rms_norm": (lambda x, q, w: sum(k.qk_norm(_heads(x), HEADS, q, w, rms=True)[:2]), [WIDTH // HEADS] * 2),  # type: ignore[return-value]
        "bias_gelu": (k.bias_gelu, [WIDTH]),
        "patch_merge": (lambda x, w, b: k.patch_merge(x.view(ROWS // 16, 4, 4, WIDTH), w, b), [4 * WIDTH] * 2),
    }  # fmt: skip


def _conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    images = x.view(256, HEADS, TOKENS, WIDTH // HEADS)
    return depthwise_conv(images, weight.view(WIDTH // HEADS, 3, 3), bias, (14, 14))


OTHERS: dict[str, tuple[Op, list[int]]] = {
    "linear": (lambda x, w, b: linear(x, w.view(WIDTH, WIDTH), b), [WIDTH * WIDTH, WIDTH]),
    "positions": (lambda x, t: (x.view(-1, TOKENS, WIDTH) + t.view(TOKENS, WIDTH)).flatten(0, 1), [TOKENS * WIDTH]),
    "positions of split rows": (lambda x, t: add_in_turn(x, t.view(TOKENS, WIDTH), 1234), [TOKENS * WIDTH]),
    "layer_scale": (lambda x, scale: x * scale, [WIDTH]),
    "depthwise_conv": (_conv, [WIDTH // HEADS * 9, WIDTH // HEADS]),
}


def gradients(op: Op, x: Tensor, parameters: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [p.detach().clone().requires_grad_() for p in parameters]
    y = op(x, *leaves)
    y.backward(grad.view_as(y))
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def assert_exact(op: Op, exact: Op, lengths: list[int], dtype: torch.dtype) -> None:
    """Against the same operation of the same 16-bit numbers in float64."""
    generator = torch.Generator().manual_seed(0)
    x, grad, *parameters = (
        (torch.randn(n, WIDTH, generator=generator) if n == ROWS else torch.randn(n, generator=generator)).to(dtype)
        for n in (ROWS, ROWS, *lengths)
    )
    grad = grad / 8 + 0.01  # sums that grow with the rows, as those of biases do
    found = gradients(op, x, parameters, grad)
    expected = gradients(exact, x.double(), [p.double() for p in parameters], grad.double())
    assert len(found) == len(expected) == len(lengths)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= ROUNDING[dtype] * theirs.norm()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", of_kernels(Kernels("reference")))
def test_kernels(name: str, backend: str, dtype: torch.dtype) -> None:
    op, lengths = of_kernels(Kernels(backend))[name]  # type: ignore[arg-type]
    assert_exact(op, of_kernels(Kernels("reference"))[name][0], lengths, dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", OTHERS)
def test_other_operations(name: str, dtype: torch.dtype) -> None:
    op, lengths = OTHERS[name]
    exact = (lambda x, w, b: F.linear(x, w.view(WIDTH, WIDTH), b)) if name == "linear" else op
    assert_exact(op, exact, lengths, dtype)


@pytest.mark.parametrize("first", [0, 1, 16, 17, 18, 400])
@pytest.mark.parametrize("rows", [0, 3, 17, 40])
def test_rows_are_added_in_turn(rows: int, first: int) -> None:
    table, x = torch.arange(17.0)[:, None] * torch.tensor([1.0, 100.0]), torch.rand(rows, 2)
    assert torch.equal(add_in_turn(x, table, first), x + table[torch.arange(first, first + rows) % 17])
