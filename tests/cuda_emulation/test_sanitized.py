"""The kernels stay inside their arrays and on their alignments; where they are made not to, their tests notice."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cuda_emulation import build

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable()),
]


def sanitized(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.cuda_emulation.sanitized", *arguments]
    result = subprocess.run(command, cwd=build.ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return result.stdout


def test_kernels_are_clean() -> None:
    """16-bit types travel alike: one of them is enough here."""
    output = sanitized("-k", "bfloat16 and (132sm or adamw or anywhere) or in_chunks and float32")
    assert " passed" in output


def launch_conditions() -> list[int]:
    """Numbers of the mutations of what decides how a kernel is launched, the first of its kind in each function."""
    first: dict[tuple[str, str], int] = {}
    for i, m in enumerate(build.write_sources("sanitized")[1]):
        if m.kind in ("alignment", "packing", "multiple", "team") and not m.harmless:
            first.setdefault((m.function, m.kind), i)
    return list(first.values())


def test_launch_conditions_that_are_left_out_are_noticed() -> None:
    numbers = launch_conditions()
    assert len(numbers) > 5  # there are that many in the sources
    tests = "float32 and (anywhere or adamw or 132sm and (layer_norm or gelu_tanh))"
    output = sanitized("--mutations", *map(str, numbers), "-k", tests)
    assert [int(line.split()[0]) for line in output.splitlines() if ": noticed by " in line] == numbers
