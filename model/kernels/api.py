"""The operations, each in the form that the chosen backend gives it."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import activations, apex, attention, checks, mapped, merge, norms, optimizers, qk, reference
from .optimizers import AdamWStep
from .select import Selection


class Kernels(Selection):
    """The kernels under one choice of backend: made once from the configuration and handed down.

    `native` is the compiled form, an error where it cannot run; `reference` is plain PyTorch; `auto` is native where it
    can run (module built for the tensor's device, element type fp32, bf16 or fp16) and the reference elsewhere; `apex`
    is auto, but with NVIDIA apex's LayerNorm (where there are weight and bias) and AdamW, on CUDA. Wrong arguments are
    a ValueError that names the argument.
    """

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> Tensor:
        """LayerNorm over the last dimension.

        x: [..., D]; weight, bias: [D] or None -> [..., D] of out_dtype (default: that of x). memory_efficient keeps the
        output, which the next layer keeps anyway, instead of the input for the backward pass (native only; weights must
        not be close to zero). Raises ValueError naming the argument.
        """
        return self._norm(x, None, weight, bias, eps, False, out_dtype, memory_efficient)[0]

    def rms_norm(
        self,
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> Tensor:
        """RMSNorm over the last dimension; arguments as for layer_norm."""
        return self._norm(x, None, weight, bias, eps, True, out_dtype, memory_efficient)[0]

    def add_layer_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """s = x + residual and LayerNorm(s) in one pass: returns (norm, s). x, residual: [..., D] of one dtype."""
        return self._norm(x, checks.tensor("residual", residual), weight, bias, eps, False, out_dtype, memory_efficient)

    def add_rms_norm(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
        *,
        out_dtype: torch.dtype | None = None,
        memory_efficient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """s = x + residual and RMSNorm(s) in one pass: returns (norm, s). x, residual: [..., D] of one dtype."""
        return self._norm(x, checks.tensor("residual", residual), weight, bias, eps, True, out_dtype, memory_efficient)

    def _norm(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        out_dtype: torch.dtype | None,
        memory_efficient: bool,
    ) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual); without a residual the second is of no use."""
        checks.norm_input(x, weight, bias, eps)
        dtype = checks.out_dtype(x, out_dtype)
        if residual is not None:
            checks.like("residual", residual, "x", x)
        elif not (rms or weight is None or bias is None) and dtype == x.dtype and self._apex("layer_norm", x.device):
            return apex.layer_norm(x, weight, bias, eps), x
        if self._native("layer_norm_forward", x, residual, weight, bias, out=dtype):
            return norms.norm(x, residual, weight, bias, eps, rms, dtype, memory_efficient)[:2]
        total = x if residual is None else x + residual
        return (reference.rms_norm if rms else reference.layer_norm)(total, weight, bias, eps, dtype), total

    def linear_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        feature_map: str = "elu",
        eps: float = 1e-6,
        *,
        power: int = 3,
        conv_weight: Tensor | None = None,
        conv_bias: Tensor | None = None,
        grid: tuple[int, int] | None = None,
        reduce: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """Attention without softmax or mask, in time and memory linear in N. q, k: [B, H, N, K]; v: [B, H, N, M] -> [B,
        H, N, M].

        feature_map: `elu` (elu + 1), `relu` or `focused` (with `power`). With conv_weight [M, s, s] (s odd) a
        depth-wise convolution
        of v over the token grid (h, w) is added, which touches only the last h*w tokens: prefix tokens are unchanged by
        it.

        reduce is for tokens split over ranks: it sums a contiguous fp32 tensor (float64 for float64 inputs) over ranks
        in place, and each rank's queries attend to the tokens of all. N may differ between ranks, and be 0. Every rank
        calls it once here, with S = phi(k)'v and z = the sum of phi(k) in one flat tensor, and once in backward, with
        their gradients, on the thread and stream of the pass; so every rank must run backward if one does. Gradients
        are those of the sum over ranks of what each computes. The convolution needs neighbouring tokens, which may be
        on other ranks: with reduce, the caller adds it, and conv_weight is a ValueError.
        """
        checks.attention_input(q, k, v, feature_map, power, eps)
        if reduce is not None:
            if conv_weight is not None:
                raise ValueError("conv_weight: cannot be combined with reduce; add the convolution to the result")
            if self._native("linear_attention_state", q, k, v):
                return attention.linear_attention_over_ranks(q, k, v, feature_map, power, eps, reduce)
            return reference.linear_attention(q, k, v, feature_map, power, eps, reduce)
        if self._native("linear_attention_forward", q, k, v):
            out = attention.linear_attention(q, k, v, feature_map, power, eps)[0]
        else:
            out = reference.linear_attention(q, k, v, feature_map, power, eps)
        if conv_weight is None:
            return out
        return out + reference.depthwise_conv(v, conv_weight, conv_bias, checks.conv(v, conv_weight, conv_bias, grid))

    def mapped_attention(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> tuple[Tensor, Tensor]:
        """Softmax attention, and its map, meaned over heads, which a fused kernel makes and forgets; not
        differentiable. q, k, v: [B, H, N, K] -> [B, H, N, K] (heads after tokens in memory) and fp32 [B, N, N] (fp64 of
        fp64), whose rows sum to 1. causal: query i sees keys 0 to i alone.
        """
        checks.like("v", v, "q", checks.queries_and_keys(q, k))
        if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
            raise ValueError("q, k, v: attention with its map has no gradient; use torch.no_grad()")
        if self._native("mapped_attention", q, k, v):
            return mapped.mapped_attention(q, k, v, causal)
        return reference.mapped_attention(q, k, v, causal)

    def qk_norm(
        self,
        packed: Tensor,
        num_heads: int,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
        *,
        rms: bool = False,
        inplace: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Norm over the channels of each head of q and k (Dehghani et al. 2023). packed: [..., 3 * H * K], q, k, v in
        this order;
        weights: [K] or None -> q, k, v, each [..., H, K].

        One pass: the gradient of the whole projection is written at once, with no slices to add up. inplace overwrites
        packed and
        returns views of it; autograd needs the old values, so this is for inference only.
        """
        checks.qk_input(packed, num_heads, q_weight, k_weight, eps)
        needs_grad = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (packed, q_weight, k_weight)
        )
        if inplace and needs_grad:
            raise ValueError(
                "packed: inplace=True would overwrite what the gradient needs; use torch.no_grad() or inplace=False"
            )
        if inplace:
            checks.in_place("packed", packed)
        if not self._native("qk_norm_forward", packed, q_weight, k_weight):
            q, k, v = reference.qk_norm(packed, q_weight, k_weight, num_heads, eps, rms)
            if not inplace:
                return q, k, v
            views = packed.unflatten(-1, (3, num_heads, -1)).unbind(-3)
            return views[0].copy_(q), views[1].copy_(k), views[2]
        if inplace:
            torch.ops.vitruvius.qk_norm_(packed, q_weight, k_weight, num_heads, eps, rms)
            return packed.unflatten(-1, (3, num_heads, -1)).unbind(-3)
        return qk.qk_norm(packed, q_weight, k_weight, num_heads, eps, rms)[:3]

    def bias_gelu(
        self, x: Tensor, bias: Tensor | None = None, *, approximate: str = "none", beside: Tensor | None = None
    ) -> Tensor:
        """gelu(x + bias), or [beside, gelu(x + bias)] in one tensor, as the input of one product.

        x: [..., D], perhaps a slice of wider rows; bias: [D] or None; approximate: `none` (erf), `tanh`,
        or `quick`, y sigmoid(1.702 y); beside: [..., E] -> [..., E + D].
        """
        checks.gelu_input(x, bias, approximate, beside)
        if self._native("gelu_forward", x, bias):
            return activations.bias_gelu(x, bias, activations.FORMS[approximate], beside)
        y = reference.bias_gelu(x, bias, approximate)
        return y if beside is None else torch.cat([beside, y], -1)

    def patch_merge(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6
    ) -> Tensor:
        """Input of the projection of a pyramid's patch merge: four neighbouring tokens side by side, and LayerNorm over
        them.

        x: [B, H, W, C], H and W even; weight, bias: [4C] or None -> [B, H/2, W/2, 4C], the parts ordered (row, column)
        = (0, 0), (1, 0),
        (0, 1), (1, 1) as in the Swin Transformer (Liu et al. 2021).
        """
        checks.merge_input(x, weight, bias, eps)
        if self._native("patch_merge_forward", x, weight, bias):
            return merge.patch_merge(x, weight, bias, eps)[0]
        return reference.patch_merge(x, weight, bias, eps)

    def adamw(
        self,
        weight: Tensor,
        grad: Tensor,
        moment: Tensor,
        square: Tensor,
        model_weight: Tensor | None,
        step: AdamWStep,
    ) -> None:
        """One AdamW step in place over flat arrays [n]: fp32 master weights, gradient of any type, fp32 moments; writes
        the new weights
        in the model's type to model_weight in the same pass, if that is given."""
        optimizers.check(weight, grad, moment, square, model_weight, step.step)
        if self._apex("adamw", weight.device):
            apex.adamw_step(weight, grad, moment, square, model_weight, step)
            return
        form = (
            optimizers.native_step if self._native("adamw", weight, grad, model_weight) else optimizers.reference_step
        )
        form(weight, grad, moment, square, model_weight, step)
