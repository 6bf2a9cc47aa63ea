"""What the kernel tests share: shapes, inputs that try to break kernels, and the comparison with float64."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from model.kernels import Kernels, native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE, REFERENCE = Kernels("native"), Kernels("reference")

needs_cpu_module = pytest.mark.skipif(native.cpu is None, reason=f"native CPU module not built: {native.cpu_error}")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0, shift: float = 0.0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale + shift).to(dtype)


def leaf(t: Tensor) -> Tensor:
    """t as something to differentiate by, with t's own strides (a slice stays a slice)."""
    return t.detach().requires_grad_()


def gradients(fn: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    """fn(*inputs) and the gradients of those inputs that are tensors."""
    leaves = [None if t is None else leaf(t) for t in inputs]
    out = fn(*leaves)
    return out, list(torch.autograd.grad(out, [t for t in leaves if t is not None], grad.to(out.dtype)))


def assert_close(name: str, got: Tensor, exact: Tensor, ulps: float, floor: float = 0.0) -> None:
    """The largest error, in units of the last place (of got's type) of the largest exact value, is at most `ulps`."""
    assert got.shape == exact.shape, f"{name}: {got.shape} is not {exact.shape}"
    if not exact.numel():
        return
    error = (got.double() - exact).abs().max().item()
    limit = ulps * torch.finfo(got.dtype).eps * exact.abs().max().item() + floor
    assert error <= limit, f"{name}: error {error:.3g} above {limit:.3g}"


def check_against_float64(
    op: Callable[..., Callable[..., Tensor]],
    inputs: Sequence[Tensor | None],
    ulps: float = 1.0,
    grad_ulps: float = 16.0,
    floor: float = 0.0,
) -> None:
    """op(kernels)(*inputs): the native value and gradients in the inputs' types against the reference in float64."""
    out = op(NATIVE)(*inputs)
    grad = randn(*out.shape, dtype=out.dtype, seed=99)
    got, got_grads = gradients(op(NATIVE), inputs, grad)
    wide = [None if t is None else t.double() for t in inputs]
    exact, exact_grads = gradients(op(REFERENCE), wide, grad.double())
    assert_close("output", got, exact, ulps)
    for i, (a, b) in enumerate(zip(got_grads, exact_grads, strict=True)):
        assert_close(f"gradient {i}", a, b, grad_ulps if a.dtype == torch.float32 else 1.0, floor)


def method(name: str, **options: object) -> Callable[[Kernels], Callable[..., Tensor]]:
    """kernels -> kernels.name with options bound."""
    return lambda kernels: functools.partial(getattr(kernels, name), **options)


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor]) -> None:
    """Bit for bit."""
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
