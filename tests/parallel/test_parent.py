"""What a rank's process is told before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def openmp(**environment: str) -> str:
    """What OpenMP says of itself when a training process loads it."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    run = subprocess.run(
        [sys.executable, "pretrain_vit.py", "--help"],
        env=clean | {"OMP_DISPLAY_ENV": "VERBOSE"} | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return run.stderr


def test_waiting_threads_sleep_soon() -> None:
    """Of the runtime itself: it reads the environment when torch loads it, so a moment later would have no effect."""
    said = openmp()
    if "GOMP_SPINCOUNT" not in said:
        pytest.skip("torch's OpenMP here is not libgomp")
    assert "GOMP_SPINCOUNT = '10000'" in said
    assert "GOMP_SPINCOUNT = '7'" in openmp(GOMP_SPINCOUNT="7")
    assert "GOMP_SPINCOUNT = '10000'" not in openmp(OMP_WAIT_POLICY="ACTIVE")
