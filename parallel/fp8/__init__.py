"""FP8 products for the parallel linears: formats and scales, casts, products, and autograd nodes that use them.

Legend: R rows, D input width, F output width. `enable_fp8` is where a model meets this; then, once per step on every
rank, `registry.finish_step(grid.along("data", "context", "tensor"))`.
"""

from parallel.fp8.backend import FP8_BACKENDS, Fp8Backend, NativeBackend, choose_backend
from parallel.fp8.linear import Fp8Products, enable_fp8
from parallel.fp8.matmul import fp8_means, fp8_obstacle, matmul
from parallel.fp8.quantise import Quantised, quantise
from parallel.fp8.recipe import ROLES, Fp8Recipe, Role
from parallel.fp8.rows import RowProducts, enable_row_products, quantise_rows, row_products
from parallel.fp8.state import Fp8Registry, Fp8State

__all__ = [
    "FP8_BACKENDS",
    "ROLES",
    "Fp8Backend",
    "Fp8Products",
    "Fp8Recipe",
    "Fp8Registry",
    "Fp8State",
    "NativeBackend",
    "Quantised",
    "Role",
    "RowProducts",
    "choose_backend",
    "enable_fp8",
    "enable_row_products",
    "fp8_means",
    "fp8_obstacle",
    "matmul",
    "quantise",
    "quantise_rows",
    "row_products",
]
