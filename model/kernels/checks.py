"""Argument checks of the kernels: a ValueError that names the argument, what it is and what would do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .native import DTYPE_CODE, plain

FLOATS = ", ".join(str(t).removeprefix("torch.") for t in DTYPE_CODE)


def tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else f"of layout {value.layout}"
        raise ValueError(f"{name}: {kind}; the kernels take strided tensors: use to_dense() or to_padded_tensor()")
    return value


def in_place(name: str, value: Tensor) -> None:
    """Memory that a kernel may write its result into."""
    if plain(value) is not value:
        raise ValueError(
            f"{name}: a view with a sign to apply, or zeros without memory, cannot be written to; use clone()"
        )


def native_types(**tensors: Tensor | None) -> None:
    """All of types that the kernels know."""
    for name, value in tensors.items():
        if value is not None and tensor(name, value).dtype not in DTYPE_CODE:
            raise ValueError(f"{name}: dtype {value.dtype} has no native kernel, only {FLOATS} have")


def shaped(name: str, value: object, shape: Sequence[int], x: Tensor, dtype: torch.dtype | None = None) -> None:
    """A tensor of this shape, on the device of x, of this type (default: that of x)."""
    checked = tensor(name, value)
    if list(checked.shape) != list(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(checked.shape)}")
    same_device(name, checked, "x", x)
    wanted = dtype or x.dtype
    if checked.dtype != wanted:
        raise ValueError(f"{name}: dtype must be {wanted}, got {checked.dtype}")


def floating(name: str, value: Tensor) -> None:
    """fp32, bf16 or fp16; fp64 passes too, and is computed by the reference."""
    if not value.is_floating_point():
        raise ValueError(f"{name}: dtype {value.dtype} is not a floating-point type; the kernels take {FLOATS}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name}: on device {value.device}, but {other_name} is on {other.device}; move one to the other"
        )


def same_shape(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape:
        raise ValueError(f"{name}: shape {list(value.shape)} differs from that of {other_name}, {list(other.shape)}")


def same_dtype(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.dtype != other.dtype:
        raise ValueError(
            f"{name}: dtype {value.dtype} differs from that of {other_name}, {other.dtype}; cast one of them"
        )


def parameter(name: str, value: Tensor | None, x: Tensor) -> None:
    """A vector over the last dimension of x, or None."""
    if value is None:
        return
    tensor(name, value)
    floating(name, value)
    if value.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: shape {list(value.shape)}, but the last dimension of x asks for {list(x.shape[-1:])}"
        )
    same_device(name, value, "x", x)


def norm_input(x: object, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Arguments of a norm over the last dimension."""
    checked = tensor("x", x)
    floating("x", checked)
    if checked.dim() == 0:
        raise ValueError("x: a norm needs at least one dimension, got a scalar")
    if checked.shape[-1] == 0:
        raise ValueError(f"x: the last dimension must not be empty, got shape {list(checked.shape)}")
    parameter("weight", weight, checked)
    parameter("bias", bias, checked)
    _eps(eps)


def out_dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The output type asked for, or that of x."""
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"out_dtype: {dtype} is not a floating-point type")
    return dtype or x.dtype


def like(name: str, value: object, other_name: str, other: Tensor) -> None:
    """Same shape, type and device."""
    checked = tensor(name, value)
    same_device(name, checked, other_name, other)
    same_shape(name, checked, other_name, other)
    same_dtype(name, checked, other_name, other)


def queries_and_keys(q: object, k: object) -> Tensor:
    """[B, H, N, K] each, of one type and device; q."""
    query = tensor("q", q)
    floating("q", query)
    if query.dim() != 4 or query.shape[-1] == 0:
        raise ValueError(f"q: expected shape [B, H, N, K] with K > 0, got {list(query.shape)}")
    like("k", k, "q", query)
    return query


def attention_input(q: object, k: object, v: object, feature_map: str, power: int, eps: float = 0.0) -> None:
    """q, k: [B, H, N, K], v: [B, H, N, M], one type and device."""
    _eps(eps)
    query = queries_and_keys(q, k)
    value = tensor("v", v)
    if value.dim() != 4 or value.shape[:-1] != query.shape[:-1] or value.shape[-1] == 0:
        raise ValueError(f"v: expected shape {[*query.shape[:-1], 'M']} with M > 0, got {list(value.shape)}")
    same_dtype("v", value, "q", query)
    same_device("v", value, "q", query)
    if feature_map not in ("elu", "relu", "focused"):
        raise ValueError(f"feature_map: '{feature_map}' is not one of elu, relu, focused")
    if power < 1:
        raise ValueError(f"power: must be at least 1, got {power}")


def conv(v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int] | None) -> tuple[int, int]:
    """The grid, checked against v and the weight of the depth-wise convolution."""
    same_device("conv_weight", tensor("conv_weight", weight), "v", v)
    if weight.dim() != 3 or weight.shape[0] != v.shape[-1] or weight.shape[1] % 2 == 0 or weight.shape[2] % 2 == 0:
        raise ValueError(f"conv_weight: expected [{v.shape[-1]}, s, s] with s odd, got {list(weight.shape)}")
    if bias is not None and bias.shape != v.shape[-1:]:
        raise ValueError(f"conv_bias: expected {list(v.shape[-1:])}, got {list(bias.shape)}")
    if grid is None:
        raise ValueError("grid: conv_weight needs the token grid (h, w)")
    if grid[0] * grid[1] > v.shape[2] or min(grid) < 1:
        raise ValueError(f"grid: {grid[0]} x {grid[1]} does not fit into the {v.shape[2]} tokens of v")
    return grid


def _vector(name: str, value: Tensor | None, size: int, x: Tensor) -> None:
    if value is None:
        return
    tensor(name, value)
    floating(name, value)
    if list(value.shape) != [size]:
        raise ValueError(f"{name}: expected shape [{size}], got {list(value.shape)}")
    same_device(name, value, "x", x)


def _eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps: must be a number that is not negative, got {eps}")


def qk_input(packed: object, heads: int, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> None:
    """packed: [..., 3 * heads * K]."""
    checked = tensor("packed", packed)
    floating("packed", checked)
    if heads < 1:
        raise ValueError(f"num_heads: must be at least 1, got {heads}")
    if checked.dim() == 0 or checked.shape[-1] == 0 or checked.shape[-1] % (3 * heads):
        raise ValueError(f"packed: the last dimension must be 3 * {heads} heads * K, got shape {list(checked.shape)}")
    _vector("q_weight", q_weight, checked.shape[-1] // (3 * heads), checked)
    _vector("k_weight", k_weight, checked.shape[-1] // (3 * heads), checked)
    _eps(eps)


def gelu_input(x: object, bias: Tensor | None, approximate: str, beside: Tensor | None = None) -> None:
    """x: [..., D], bias: [D], beside: [..., E]."""
    checked = tensor("x", x)
    floating("x", checked)
    if checked.dim() == 0 or checked.shape[-1] == 0:
        raise ValueError(f"x: expected [..., D] with D > 0, got shape {list(checked.shape)}")
    _vector("bias", bias, checked.shape[-1], checked)
    if approximate not in ("none", "tanh", "quick"):
        raise ValueError(f"approximate: '{approximate}' is not one of none, tanh, quick")
    if beside is None:
        return
    same_device("beside", tensor("beside", beside), "x", checked)
    same_dtype("beside", beside, "x", checked)
    if beside.dim() == 0:
        raise ValueError("beside: expected [..., E], got a scalar")
    if beside.shape[:-1] != checked.shape[:-1]:
        raise ValueError(f"beside: shape {list(beside.shape)} has other rows than x of {list(checked.shape)}")


def merge_input(x: object, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """x: [B, H, W, C] with even H and W."""
    checked = tensor("x", x)
    floating("x", checked)
    if checked.dim() != 4 or checked.shape[1] % 2 or checked.shape[2] % 2 or checked.shape[3] == 0:
        raise ValueError(f"x: expected [B, H, W, C] with H and W even and C > 0, got {list(checked.shape)}")
    _vector("weight", weight, 4 * checked.shape[3], checked)
    _vector("bias", bias, 4 * checked.shape[3], checked)
    _eps(eps)
