"""Plain PyTorch forms of the kernels: what they mean, what runs where nothing was compiled, and what the tests compare
with.

Where torch has the operation, it is torch's; half precision with parameters of another type is computed in fp32, and on
CPUs norms of half precision always are: in bf16 torch's LayerNorm adds up the rows of its parameters' gradients in bf16
there, and loses a third of the bias's at 12,000 rows, four fifths at 50,000. A convolution's in fp16 are off by a few
thousandths, and take 30 times as long.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _common(*tensors: Tensor | None) -> torch.dtype | None:
    """The element type that all share, or None."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return dtypes.pop() if len(dtypes) == 1 else None


def _wide(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.dtype == torch.float64 else t.float()


def _sums_in_its_own_type(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension; var divides by D."""
    if _common(x, weight, bias) == out_dtype and not _sums_in_its_own_type(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = _wide(x)
    assert wide is not None
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    return F.layer_norm(wide, x.shape[-1:], weight, bias, eps).to(out_dtype)


def rms_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight + bias over the last dimension."""
    if bias is None and _common(x, weight) == out_dtype and not _sums_in_its_own_type(x):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    wide = _wide(x)
    assert wide is not None
    weight, bias = (None if p is None else p.to(wide.dtype) for p in (weight, bias))
    y = F.rms_norm(wide, x.shape[-1:], weight, eps)
    return (y if bias is None else y + bias).to(out_dtype)


def feature(x: Tensor, feature_map: str, power: int) -> Tensor:
    """The feature maps of linear attention, over the last dimension; all give numbers >= 0.

    elu: elu(x) + 1 (Katharopoulos et al. 2020). relu: u = max(0, x). focused: |u| u^p / |u^p| (Han et al. 2023, FLatten
    Transformer): u with its direction sharpened and its length kept.
    """
    if feature_map == "elu":
        return F.elu(x) + 1
    u = F.relu(x)
    if feature_map == "relu":
        return u
    norm = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    largest = u.detach().amax(-1, keepdim=True)  # the direction does not feel it; of u / |u| all high powers may vanish
    sharp = (u / torch.where(largest == 0, 1, largest)) ** power
    length = torch.linalg.vector_norm(sharp, dim=-1, keepdim=True)
    return norm * sharp / torch.where(length == 0, 1, length)


class _SumOverRanks(torch.autograd.Function):
    """The sum of x over ranks, which is its own adjoint where the objective is the sum of what each rank computes.

    `_anchor` is not used: where it wants a gradient, backward takes part in the sum even if x wants none, as it must,
    since the other ranks wait for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor], object], _anchor: Tensor) -> Tensor:
        ctx.reduce = reduce
        total = x.clone(memory_format=torch.contiguous_format)
        reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _SumOverRanks.apply(grads[0], ctx.reduce, grads[0]), None, None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str,
    power: int,
    eps: float,
    reduce: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """phi(q) (phi(k)' v) / (phi(q) . sum of phi(k) + eps), the sums over tokens in fp32 (fp16 overflows at once).

    reduce adds up over ranks the sums over tokens, packed into one flat tensor, and in backward their gradients.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    a, b, wide = feature(q.to(dtype), feature_map, power), feature(k.to(dtype), feature_map, power), v.to(dtype)
    state = torch.einsum("bhnk,bhnm->bhkm", b, wide)
    keys = b.sum(2)
    if reduce is not None:
        packed = _SumOverRanks.apply(torch.cat([state.flatten(), keys.flatten()]), reduce, q)
        state, keys = packed[: state.numel()].view_as(state), packed[state.numel() :].view_as(keys)
    den = torch.einsum("bhnk,bhk->bhn", a, keys) + eps
    return (torch.einsum("bhnk,bhkm->bhnm", a, state) / den[..., None]).to(q.dtype)


def depthwise_conv(v: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """Each channel of v convolved over the token grid, zero-padded. The tokens before the grid ("prefix") get zero.

    v: [B, H, P + h*w, K]; weight: [K, s, s], s odd, shared by heads; bias: [K] or None; grid: (h, w) -> like v.
    """
    batch, heads, tokens, dim = v.shape
    prefix = tokens - grid[0] * grid[1]
    wide = torch.float32 if _sums_in_its_own_type(v) else v.dtype
    image = v[:, :, prefix:].to(wide).reshape(batch * heads, *grid, dim).permute(0, 3, 1, 2)
    out = F.conv2d(image, weight[:, None].to(wide), None if bias is None else bias.to(wide), 1, "same", 1, dim)
    out = out.to(v.dtype).permute(0, 2, 3, 1).reshape(batch, heads, tokens - prefix, dim)
    return F.pad(out, (0, 0, prefix, 0))


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), the sum kept in fp32 where the types differ."""
    if bias is not None:
        x = (x + bias.to(x.dtype)) if bias.dtype == x.dtype else _gelu_wide(x, bias)
    if approximate != "quick":
        return F.gelu(x, approximate=approximate)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def _gelu_wide(x: Tensor, bias: Tensor) -> Tensor:
    return (x.to(torch.promote_types(x.dtype, bias.dtype)) + bias).to(x.dtype)


def qk_norm(
    packed: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, heads: int, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Norm over the channels of each head of q and k. packed: [..., 3 * H * K] -> q, k, v of [..., H, K]."""
    q, k, v = packed.unflatten(-1, (3, heads, packed.shape[-1] // (3 * heads))).unbind(-3)
    norm = rms_norm if rms else layer_norm
    return norm(q, q_weight, None, eps, q.dtype), norm(k, k_weight, None, eps, k.dtype), v


def patch_merge(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """[B, H, W, C] -> [B, H/2, W/2, 4C]: parts (0,0), (1,0), (0,1), (1,1) of each 2x2 side by side, then LayerNorm."""
    parts = [x[:, i::2, j::2] for i, j in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return layer_norm(torch.cat(parts, dim=-1), weight, bias, eps, x.dtype)


_SCORES = 16 << 20  # bytes of all heads' scores at once, some of which stay in the caches


def mapped_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention written out, some queries at a time, whose heads are added up while their rows are in the caches.

    [B, H, N, K] each -> the same, and the mean over heads [B, N, N]; in fp32, of fp64 in fp64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, dim = q.shape
    maps = q.new_empty(batch, tokens, tokens, dtype=wide)
    out = q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
    share = q.new_full((1, heads), 1 / heads, dtype=wide)
    step = max(1, _SCORES // (wide.itemsize * max(1, heads * tokens)))
    for image in range(batch):
        queries, keys, values = (t[image].to(wide).contiguous() for t in (q, k, v))
        queries, keys = queries / math.sqrt(dim), keys.transpose(1, 2)
        for start in range(0, tokens, step):
            part = slice(start, min(start + step, tokens))
            rows = queries[:, part] @ keys
            if causal:
                later = torch.ones(rows.shape[1:], dtype=torch.bool, device=q.device).triu(start + 1)
                rows.masked_fill_(later, -math.inf)
            rows = rows.softmax(-1)
            torch.mm(share, rows.flatten(1), out=maps[image, part].view(1, -1))
            out[image, :, part] = (rows @ values).to(q.dtype)
    return out, maps
