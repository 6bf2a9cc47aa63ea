"""docs/checkpoints.md says what is: its example is a manifest, its few lines of Python read a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.checkpoint.manifest import FILE
from tests.engine.checkpoint.making import make, tensors

PAGE = (Path(__file__).parents[3] / "docs/checkpoints.md").read_text()


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    return found


def test_the_example_is_a_manifest(tmp_path: Path) -> None:
    shown = json.loads(re.sub(r"\s+//.*", "", block("jsonc")))
    values = {
        "weights/embed.weight": torch.arange(30.0).view(5, 6),
        "optimizer.steps": torch.tensor(1200.0, dtype=torch.float64),
    }
    facts = {name: shown[name] for name in ("progress", "config", "about", "evaluation")}
    assert json.loads((make(tmp_path, 1200, values, **facts) / FILE).read_text()) == shown


@pytest.mark.parametrize("files", [1, 2, 5])
def test_the_lines_read_a_checkpoint(tmp_path: Path, files: int) -> None:
    source = block("python")
    imported = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    assert set(imported) == {"json", "pathlib", "torch", "safetensors"}
    room: dict[str, Any] = {}
    exec(source, room)
    step = make(tmp_path, 3, tensors(), files=files)
    for name, values in tensors().items():
        found = room["read"](step, name)
        assert torch.equal(found, values) and found.dtype == values.dtype
