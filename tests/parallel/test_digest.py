"""The hash of a tensor's bits: exact, by place, and the same for every way of cutting memory."""

from __future__ import annotations

import pytest
import torch

from parallel import digest as module
from parallel.digest import digest

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    values = (torch.arange(37) % 5).to(dtype)
    size, whole = values.element_size(), digest(values).item()
    for bit in range(8 * size * values.numel()):
        changed = values.clone()
        changed.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
        assert digest(changed).item() != whole, bit


def test_what_compares_equal_but_has_other_bits_differs() -> None:
    assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
    payloads = torch.tensor([0x7FC00000, 0x7FC00001, 0x7F800001, -0x400000], dtype=torch.int32).view(torch.float32)
    assert payloads.isnan().all() and len({digest(x).item() for x in payloads.split(1)}) == 4


def test_place_and_length_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module._CHUNK, "cpu", 8)
    values = torch.arange(30.0)
    hashes = {digest(x).item() for x in (values, values.roll(1), values.roll(8), values.flip(0), values[:-1])}
    hashes |= {digest(torch.zeros(n)).item() for n in (0, 1, 8, 9, 16)}
    signs = values.clone()
    signs[[3, 5, 12, 20]] *= -1  # the top bits, whose products know least of their places
    assert len(hashes | {digest(signs).item()}) == 11


def test_alignment_does_not_count() -> None:
    values = torch.randn(1000).bfloat16()
    shifted = torch.cat([values[:1], values])[1:]
    assert digest(values) == digest(shifted)
