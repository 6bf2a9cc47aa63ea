"""What optimizers sum over a matrix of 50 M elements, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.config import OptimizerConfig
from engine.optimizers import Adafactor, Lamb, make_optimizer, muon
from engine.optimizers.base import Rates
from model.kernels import Kernels
from parallel.comm import single_axis
from parallel.layout import Init, ParameterInfo, TensorLayout
from parallel.sharding.fragments import Fragment, Fragments, Group

ROWS, COLS = 8192, 6144
BODY = Group("body")


@pytest.fixture(scope="module")
def fragments() -> Fragments:
    info = ParameterInfo(layout=TensorLayout(shape=(ROWS, COLS)), init=Init(kind="constant", scales=(1.0,)))
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).repeat(ROWS * COLS >> 20)
    # weights all alike: each rounding of a sum goes the same way as the one before
    weight, grad, count = torch.full((ROWS * COLS,), 0.02), pattern * 1e-3, ROWS * COLS
    fragment = Fragment("w", info, BODY, 0, count, slice(0, count), weight, grad)
    return Fragments(spans=[], fragments=[fragment], axis=single_axis("all"), owned={}, trained={})


def matrix(values: Tensor) -> Tensor:
    return values.view(ROWS, COLS)


def test_lamb(fragments: Fragments) -> None:
    optimizer = make_optimizer(OptimizerConfig(name="lamb", head_weight_decay=0.0), fragments, Kernels("reference"), 0)
    assert isinstance(optimizer, Lamb)
    (fragment,), optimizer.steps = fragments.fragments, 1
    squares = 0.0
    for elements, _ in optimizer._trained[0]:
        optimizer._update_moments(0, fragment.grad[elements].clone(), elements)
        squares += optimizer._direction(0, elements, 0.0).double().square().sum().item()
    ratio = optimizer._trust_ratios({BODY: Rates(1e-3, 0.0)})[0].item()
    exact = 0.02 * (ROWS * COLS / squares) ** 0.5
    assert ratio == pytest.approx(exact, rel=1e-6)


def test_adafactor(fragments: Fragments) -> None:
    config = OptimizerConfig(name="adafactor", head_weight_decay=0.0)
    optimizer = make_optimizer(config, fragments, Kernels("reference"), 0)
    assert isinstance(optimizer, Adafactor)
    by_row, by_col = optimizer._sums(1.0).split([ROWS, COLS])
    squares = [part.double().square() for part in matrix(fragments.fragments[0].grad).split(1024)]
    rows, cols = torch.cat([part.sum(1) for part in squares]), torch.stack([part.sum(0) for part in squares]).sum(0)
    assert max((by_row / rows - 1).abs().max(), (by_col / cols - 1).abs().max()) < 1e-6


def test_muon(fragments: Fragments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_STEPS", 0)  # what is left divides by the norm
    for given in (matrix(fragments.fragments[0].grad), matrix(fragments.fragments[0].weight).T):
        unit = muon.orthogonalise(given)
        assert sum(part.double().square().sum().item() for part in unit.split(512)) == pytest.approx(1.0, rel=2e-6)
