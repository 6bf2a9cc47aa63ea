"""Residual sum fused with a norm."""

import pytest
import torch
from torch import Tensor

from model.kernels import Kernels, add_layer_norm
from tests.model.kernels.kernel_cases import (
    NATIVE,
    REFERENCE,
    assert_close,
    assert_same,
    each_dtype,
    needs_cpu_module,
    randn,
    threads,
)

pytestmark = needs_cpu_module
each_norm = pytest.mark.parametrize("norm", ["add_layer_norm", "add_rms_norm"])


def run(kernels: Kernels, norm: str, inputs: list[Tensor], grads: list[Tensor], **options: object) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = getattr(kernels, norm)(*leaves, **options)
    return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(outputs[0].dtype) for g in grads])]


def inputs(*shape: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    x, residual = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1)
    weight, bias = randn(shape[-1], seed=2).abs() + 0.5, randn(shape[-1], seed=3)
    return [x, residual, weight, bias], [randn(*shape, dtype=dtype, seed=4), randn(*shape, dtype=dtype, seed=5)]


@each_norm
@each_dtype
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (70, 387), (2, 6144)])
@pytest.mark.parametrize("memory_efficient", [False, True])
def test_matches_float64(norm: str, dtype: torch.dtype, shape: tuple[int, ...], memory_efficient: bool) -> None:
    args, grads = inputs(*shape, dtype=dtype)
    # a sum that the type holds exactly: then what is left is the norm's own error
    args[0], args[1] = args[0].bfloat16().float().round(decimals=1).to(dtype), torch.zeros_like(args[1])
    got = run(NATIVE, norm, args, grads, memory_efficient=memory_efficient)
    exact = run(REFERENCE, norm, [t.double() for t in args], [g.double() for g in grads])
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        if memory_efficient and i > 1:
            assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()
        else:
            assert_close(f"value {i}", a, b, ulps=16 if a.dtype == torch.float32 else 1)


@each_norm
@each_dtype
def test_is_the_sum_then_the_norm(norm: str, dtype: torch.dtype) -> None:
    (x, residual, weight, bias), _ = inputs(40, 100, dtype=dtype)
    y, total = getattr(NATIVE, norm)(x, residual, weight, bias)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, getattr(NATIVE, norm.removeprefix("add_"))(x + residual, weight, bias))


@each_norm
def test_either_output_alone(norm: str) -> None:
    args, grads = inputs(6, 20, dtype=torch.float32)
    for index in (0, 1):
        results = []
        for kernels in (NATIVE, REFERENCE):
            leaves = [t.detach().requires_grad_() for t in args]
            out = getattr(kernels, norm)(*leaves)[index]
            results.append(torch.autograd.grad(out, leaves[:2], grads[0]))
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@each_norm
@each_dtype
def test_strided_empty_and_repeatable(norm: str, dtype: torch.dtype) -> None:
    (x, residual, weight, bias), grads = inputs(300, 96, dtype=dtype)
    args = [x[:, :48], residual[:, 48:], weight[:48], bias[:48]]
    grads = [g[:, ::2] for g in grads]
    with threads(1):
        expected = run(NATIVE, norm, [a.contiguous() for a in args], [g.contiguous() for g in grads])
    assert_same(run(NATIVE, norm, args, grads), expected)
    empty = run(NATIVE, norm, [x[:0], residual[:0], weight, bias], [g[:0].repeat(1, 2) for g in grads])
    assert empty[0].shape == (0, 96)
    assert torch.equal(empty[-1], torch.zeros(96))


def test_compiles_without_graph_break() -> None:
    torch._dynamo.reset()
    args, grads = inputs(5, 24, dtype=torch.float32)
    compiled = torch.compile(NATIVE.add_layer_norm, backend="aot_eager", fullgraph=True)
    leaves = [t.detach().requires_grad_() for t in args]
    out = compiled(*leaves)
    assert_same([*out, *torch.autograd.grad(out, leaves, grads)], run(NATIVE, "add_layer_norm", args, grads))


def test_bad_residual_is_named() -> None:
    x = torch.ones(2, 4)
    for bad in (torch.ones(4), torch.ones(2, 4).half(), torch.ones(2, 4, device="meta"), None):
        with pytest.raises(ValueError, match="residual: "):
            add_layer_norm(x, bad)
