"""8-bit products with a scale for each row: against float64 of the same quantised values, and that rows are apart.

Tensor ranks against one: tests/parallel/fp8/test_linear.py.
"""

import math

import torch
from torch import Tensor, nn

from parallel.comm import single_axis
from parallel.fp8 import RowProducts, enable_row_products, quantise_rows, row_products
from parallel.fp8.matmul import FLOAT8, matmul
from parallel.tensor import ColumnParallelLinear, no_tensor_parallel

E4M3, ALONE = FLOAT8[0], no_tensor_parallel()
ROWS, WIDTH, FEATURES = 13, 24, 40  # none of which is a multiple of 16


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _rounded(x: Tensor) -> Tensor:
    scale = torch.finfo(E4M3).max / x.abs().amax(1, keepdim=True)
    return (x * scale).to(E4M3).double() / scale.double()


def test_products_are_those_of_rounded_rows() -> None:
    """Of sizes that differ by rows, which one scale for all would lose."""
    x = _random(ROWS, WIDTH) * 10.0 ** torch.arange(-6, 7)[:, None]
    w = _random(FEATURES, WIDTH, seed=1) * 10.0 ** (torch.arange(FEATURES) % 5)[:, None]
    exact = _rounded(x) @ _rounded(w).t()
    for kind, bias in (("column", None), ("row", None), ("column", _random(FEATURES)), ("row", _random(FEATURES))):
        products = RowProducts(1)
        for _ in range(2):  # the second with the weight that was kept
            y = products.column(x, w, bias, ALONE) if kind == "column" else products.row(x, w, bias, ALONE, False)
            wanted = exact if bias is None else exact + bias.double()
            size = x.norm(dim=1)[:, None] * w.norm(dim=1)
            assert ((y.double() - wanted).abs() <= 1e-5 * (wanted.abs() + size)).all()
            assert ((y - (0 if bias is None else bias) - x @ w.t()).abs() <= 2.0**-4 * size + 1e-6).all()


def test_what_comes_of_a_row_hangs_on_no_other_row() -> None:
    x = _random(ROWS, WIDTH)
    x[3], x[5, 2], x[7, 1] = 0.0, math.nan, math.inf
    whole = quantise_rows(x, single_axis("tensor"))
    for row in range(ROWS):
        alone = quantise_rows(x[row : row + 1], None)
        assert torch.equal(whole.values[row].view(torch.uint8), alone.values[0].view(torch.uint8))
        assert torch.equal(whole.factor[row], alone.factor[0]) or row in (5, 7)
    y = RowProducts(0).column(x, _random(FEATURES, WIDTH, seed=1), None, ALONE)
    bad = {row for row in range(ROWS) if not y[row].isfinite().all()}
    assert bad == {5, 7} and y[[5, 7]].isnan().all() and not y[3].any()


def test_gpu_s_products_of_rows_have_such_shapes() -> None:
    """torch checks them on the meta device as on a GPU, for which what is planned stands."""
    meta = torch.device("meta")
    x, w = (torch.empty(shape, dtype=torch.bfloat16, device=meta) for shape in ((ROWS, WIDTH), (FEATURES, WIDTH)))
    y = RowProducts(1).column(x, w, None, ALONE)
    assert y.is_meta and y.dtype == torch.bfloat16 and y.shape == (ROWS, FEATURES)
    a, b = (quantise_rows(t.new_ones(t.shape, device="cpu"), None) for t in (x, w))
    try:
        matmul(a.values, b.values.t(), a.factor, b.factor, torch.float32)
    except AssertionError:
        return
    raise AssertionError("two columns of factors")


def test_weights_are_kept_until_they_are_others_or_not_at_all() -> None:
    layers = nn.ModuleDict({
        name: ColumnParallelLinear(WIDTH, (FEATURES,), tp=ALONE, bias=False) for name in ("one", "two", "head")
    }).requires_grad_(False)  # fmt: skip
    layers.to_empty(device="cpu")
    for layer in layers.values():
        layer.weight.copy_(_random(FEATURES, WIDTH, seed=1))
    x = _random(ROWS, WIDTH)
    for keeps in (True, False):
        enable_row_products([layers], keep_weights=keeps, skip=lambda name: name == "head")
        made = list(row_products([layers]))
        assert [products.weight_bytes for products in made] == [(48 * 32 + 4 * 48) * keeps] * 2
        before = layers["one"](x)
        layers["one"].weight.mul_(-1)
        assert torch.equal(layers["one"](x), before if keeps else -before)
        for products in made:
            products.forget_weight()
        assert torch.equal(layers["one"](x), -before)
        layers["one"].weight.mul_(-1)
