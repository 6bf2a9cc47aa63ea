"""Kernels give the same bits in whatever order blocks and threads run, on GPUs of every size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda_emulation import build
from tests.cuda_emulation.device import MULTIPROCESSORS, Order, stand_in
from tests.model.kernels.kernel_cases import NATIVE, assert_same, gradients, randn
from tests.model.kernels.test_cuda import ATTENTION, CASES

pytestmark = pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable())


def run(case: str) -> list[Tensor]:
    """The output and the gradients, of bf16 arrays and fp32 weights."""
    make, shapes = (CASES | ATTENTION)[case]
    call = make(NATIVE)
    types = [torch.float32 if len(s) == 1 else torch.bfloat16 for s in shapes]
    inputs = [randn(*s, dtype=t, seed=i) for i, (s, t) in enumerate(zip(shapes, types, strict=True))]
    out, grads = gradients(call, inputs, randn(*call(*inputs).shape, seed=9))
    return [out, *grads]


@pytest.mark.parametrize("case", [*CASES, *ATTENTION])
def test_same_bits_in_every_order(case: str) -> None:
    with stand_in() as device:
        outputs = []
        for multiprocessors in MULTIPROCESSORS:
            results = []
            for order in Order:
                device.configure(multiprocessors, order)
                results.append(run(case))
            assert_same(results[0], results[1])
            assert_same(results[0], results[2])
            outputs.append(results[0][:2])  # sums over rows depend on how many there are at a time
        assert_same(outputs[0], outputs[1])
        assert_same(outputs[0], outputs[2])
