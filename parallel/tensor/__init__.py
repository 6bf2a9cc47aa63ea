"""Tensor and sequence parallelism: layers whose matrices are split over ranks."""

from parallel.tensor.divergence import sigmoid_divergence, softened_divergence
from parallel.tensor.linear import ColumnParallelLinear, RowParallelLinear, linear, xavier_uniform
from parallel.tensor.loss import LOSSES, Softening, sigmoid_cross_entropy, softmax_cross_entropy, top_class
from parallel.tensor.norm import norm_over_ranks
from parallel.tensor.rows import (
    TensorParallel,
    copy_in,
    enter,
    gather_features,
    gather_rows,
    leave,
    no_tensor_parallel,
    slice_rows,
)
from parallel.tensor.vocabulary import VocabularyEmbedding
from parallel.tensor.weight_grad import GradientSink, attach_sink, weight_gradient

__all__ = [
    "LOSSES",
    "ColumnParallelLinear",
    "GradientSink",
    "RowParallelLinear",
    "Softening",
    "TensorParallel",
    "VocabularyEmbedding",
    "attach_sink",
    "copy_in",
    "enter",
    "gather_features",
    "gather_rows",
    "leave",
    "linear",
    "no_tensor_parallel",
    "norm_over_ranks",
    "sigmoid_cross_entropy",
    "sigmoid_divergence",
    "slice_rows",
    "softened_divergence",
    "softmax_cross_entropy",
    "top_class",
    "weight_gradient",
    "xavier_uniform",
]
