"""LayerNorm over the last dim, as a layer whose parameters know how their gradients are to be summed."""

from __future__ import annotations

from torch import Tensor, nn

from model.kernels import Kernels
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter

EPS = 1e-6


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016).

    Args:
        width: of the last dim. bias: whether there is one (ViT-22B has none).
        partial: whether each tensor rank sees only part of the rows or heads, so that gradients must be summed.
        kernels: which form of the kernel runs.
    """

    def __init__(self, width: int, *, bias: bool, partial: bool, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        layout = TensorLayout(shape=(width,))
        ones, zeros = (Init(kind="constant", scales=(value,)) for value in (1.0, 0.0))
        self.weight = make_parameter(ParameterInfo(layout=layout, init=ones, partial_over_tensor=partial))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = make_parameter(ParameterInfo(layout=layout, init=zeros, partial_over_tensor=partial))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.kernels.layer_norm(x, self.weight, self.bias, EPS)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual) in one pass: [..., D] each."""
        return self.kernels.add_layer_norm(x, residual, self.weight, self.bias, EPS)
