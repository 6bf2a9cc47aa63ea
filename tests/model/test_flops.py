"""Products are counted as torch counts them, and what counts them has no compiler imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import VisionTransformer
from model.flops import ProductFlops
from tests.engine.small import flags
from tests.parity.cases import MODELS

ROOT = Path(__file__).parents[2]
TRAINED = """
import sys
import pretrain_vit
from engine.run.launch import run_rank

code = run_rank(pretrain_vit.main, sys.argv[1:], "prog")
found = {"torch._dynamo", "torch.distributed.tensor", "scipy", "sklearn"} & sys.modules.keys()
assert not found, found
sys.exit(code)
"""


@pytest.mark.parametrize("model", ["kinds", "pyramid", "beside"])
def test_products_forward_and_backward_are_those_of_torch(model: str) -> None:
    config = MODELS[model].resolve()
    made = VisionTransformer(config)
    images = torch.randn(2, config.sizes.channels, *config.sizes.image)
    with FlopCounterMode(display=False) as theirs, ProductFlops() as ours:
        made(images).sum().backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_a_run_imports_no_compiler(tmp_path: Path) -> None:
    """Two seconds of each rank, whose layers are measured on the meta device before it starts."""
    argv = flags(run_dir=str(tmp_path / "run"), model__qk_norm="true", model__drop_path="0.1")
    run = subprocess.run([sys.executable, "-c", TRAINED, *argv], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
