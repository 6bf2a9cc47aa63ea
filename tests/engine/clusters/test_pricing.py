"""Operators on the meta device: which rate of a cluster file each goes by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.clusters import Cluster, read_cluster
from engine.clusters.cluster import Curve, PassRates
from engine.clusters.pricing import Pricer
from parallel.fp8.matmul import matmul

H100 = read_cluster(str(Path(__file__).parents[3] / "configs" / "clusters" / "h100_64.yaml"))
RATES = {"plain": 2.0, "norm": 3.0, "activation": 5.0, "cast": 7.0, "strided": 11.0, "reduction": 13.0, "copy": 17.0}
X = torch.empty(64, 4, 32, device="meta")
HALF, ROW = X.bfloat16(), torch.empty(32, device="meta")

INDEX = torch.empty(64, dtype=torch.int64, device="meta")


def cluster(**rates: float) -> Cluster:
    """Without a launch, whose passes run at so many GB/s."""
    of = PassRates(**{kind: Curve(((1.0, rate),)) for kind, rate in rates.items()})
    every = {"fp32": of, "bf16": of}
    launch = replace(H100.launch, microseconds=0.0)
    return replace(H100, passes=replace(H100.passes, rates=every), launch=launch)  # type: ignore[arg-type]


def priced(of: Cluster, run: Callable[[], object]) -> dict[str, float]:
    """Seconds by what."""
    with Pricer(of) as pricer:
        run()
    return dict(pricer.spent)


@pytest.mark.parametrize(
    ("run", "kind", "nbytes"),
    [
        (lambda: X + X, "plain", 3 * X.nbytes),
        (lambda: X + ROW, "plain", 2 * X.nbytes + ROW.nbytes),
        (lambda: HALF.float(), "cast", 3 * HALF.nbytes),
        (lambda: HALF * X, "cast", 5 * HALF.nbytes),
        (lambda: X.transpose(0, 1).contiguous(), "copy", 2 * X.nbytes),
        (lambda: X.transpose(1, 2).contiguous(), "strided", 2 * X.nbytes),
        (lambda: torch.cat([X[..., 16:], X[..., :16]], -1), "copy", 2 * X.nbytes),
        (lambda: torch.ones_like(X), "copy", X.nbytes),
        (lambda: X[INDEX], "strided", 2 * X.nbytes + INDEX.nbytes),
        (lambda: X.sum(0), "reduction", X.nbytes + X[0].nbytes),
        (lambda: torch.nn.functional.silu(X), "activation", 2 * X.nbytes),
    ],
)
def test_passes_go_by_their_kind(run: Callable[[], object], kind: str, nbytes: int) -> None:
    assert priced(cluster(**RATES), run) == {"memory": pytest.approx(nbytes / RATES[kind] / 1e9)}
    three = {kind: RATES[kind] for kind in ("plain", "norm", "activation")}
    assert priced(cluster(**three), run) == {"memory": pytest.approx(nbytes / three.get(kind, 2.0) / 1e9)}


def test_what_has_8_bits_goes_by_its_own_rates_or_those_of_bf16() -> None:
    run = lambda: X.to(torch.float8_e4m3fn)  # noqa: E731
    of = cluster(**RATES)
    assert priced(of, run)["memory"] == pytest.approx(1.25 * X.nbytes / 7e9)
    slow = replace(of.passes.rates["bf16"], cast=Curve(((1.0, 1.0),)))
    own = replace(of, passes=replace(of.passes, rates={**of.passes.rates, "fp8": slow}))
    assert priced(own, run)["memory"] == pytest.approx(1.25 * X.nbytes / 1e9)


def test_products_of_8_bits_are_priced() -> None:
    def eight(rows: int, columns: int) -> Tensor:
        return torch.empty(rows, columns, device="meta").to(torch.float8_e4m3fn)

    a, b, one = eight(512, 1024), eight(256, 1024), torch.empty(1, device="meta")
    spent = priced(H100, lambda: matmul(a, b.t(), one, one, torch.bfloat16))
    assert spent == {"products": H100.product("forward", 512, 256, 1024, "fp8")}
