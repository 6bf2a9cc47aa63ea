"""The emulator names mistakes: mistakes.cu has one of each kind, and what must be said of it in a comment beside it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulation import build

pytestmark = pytest.mark.skipif(bool(build.unavailable()), reason=build.unavailable())

SOURCE = build.HERE / "mistakes.cu"
KERNEL = re.compile(r"__global__ void (\w+)\(")
MISTAKE = re.compile(r";  +// (.*)")


def mistakes() -> dict[str, tuple[int, str]]:
    """Of each kernel that has one: its line, and what must be said."""
    found: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(SOURCE.read_text().splitlines(), 1):
        if match := KERNEL.match(line):
            kernel = match[1]
        elif (match := MISTAKE.search(line)) and match[1] != "orders no memory":
            found[kernel] = (number, match[1])
    return found


@pytest.fixture(scope="module")
def program() -> Path:
    return build.program(SOURCE, "sanitized")


def run(program: Path, kernel: str) -> tuple[int, str]:
    settings = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": ""}
    result = subprocess.run([program, kernel], capture_output=True, text=True, env=settings, timeout=60)
    return result.returncode, result.stdout + result.stderr


@pytest.mark.parametrize("kernel", mistakes())
def test_is_named_with_its_line(program: Path, kernel: str) -> None:
    line, words = mistakes()[kernel]
    code, output = run(program, kernel)
    assert code != 0
    assert words in output
    assert f"mistakes.cu:{line}" in output.split("allocated by")[0].split("freed by")[0]


def test_right_ones_are_let_through(program: Path) -> None:
    assert run(program, "right") == (0, "no error\n1520 496\n")
    assert run(program, "right_in_a_warp") == (0, "no error\n")


@pytest.mark.parametrize("size", ["no_blocks", "too_many_threads", "too_many_in_z"])
def test_launches_of_illegal_size_are_refused(program: Path, size: str) -> None:
    assert run(program, size) == (1, "invalid configuration argument\n")
