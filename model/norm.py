"""LayerNorm and RMSNorm over the last dim, as a layer whose parameters know how their gradients are to be summed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from model.kernels import Kernels
from parallel.layout import Init, ParameterInfo, TensorLayout, make_parameter

if TYPE_CHECKING:
    from model.build import Build


class Norm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) * weight + bias (Ba et al. 2016), or without mean and bias (Zhang et al. 2019).

    Args:
        width: of the last dim. bias: whether there is one (ViT-22B has none).
        partial: whether each tensor rank sees only part of the rows or heads, so that gradients must be summed.
        kernels: which form of the kernel runs. eps: added to the variance. rms: RMSNorm. layout: of weight and bias, if
            they are split over ranks (whose statistics `forward` does not see). from_output: whether backward reads the
            output, which is kept in the place of the input.
    """

    def __init__(
        self,
        width: int,
        *,
        bias: bool,
        partial: bool,
        kernels: Kernels,
        eps: float,
        rms: bool = False,
        layout: TensorLayout | None = None,
        from_output: bool = False,
    ) -> None:
        super().__init__()
        self.kernels, self.eps, self.rms, self.from_output = kernels, eps, rms, from_output
        layout = layout or TensorLayout(shape=(width,))
        ones, zeros = (Init(kind="constant", scales=(value,)) for value in (1.0, 0.0))
        self.weight = make_parameter(ParameterInfo(layout=layout, init=ones, partial_over_tensor=partial))
        self.bias: nn.Parameter | None = None
        if bias and not rms:
            self.bias = make_parameter(ParameterInfo(layout=layout, init=zeros, partial_over_tensor=partial))

    @staticmethod
    def of(
        build: Build,
        width: int,
        *,
        bias: bool | None = None,
        partial: bool | None = None,
        layout: TensorLayout | None = None,
        from_output: bool = False,
    ) -> Norm:
        """Of the kind that the model has; by default with its bias, over rows that sequence parallelism may split."""
        return Norm(
            width,
            bias=bool(build.config.norm_bias) if bias is None else bias,
            partial=build.tp.splits_rows if partial is None else partial,
            kernels=build.kernels,
            eps=build.eps,
            rms=build.config.norm == "rmsnorm",
            layout=layout,
            from_output=from_output,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        norm = self.kernels.rms_norm if self.rms else self.kernels.layer_norm
        return norm(x, self.weight, self.bias, self.eps, memory_efficient=self.from_output)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of x + residual, x + residual) in one pass: [..., D] each."""
        norm = self.kernels.add_rms_norm if self.rms else self.kernels.add_layer_norm
        return norm(x, residual, self.weight, self.bias, self.eps, memory_efficient=self.from_output)
