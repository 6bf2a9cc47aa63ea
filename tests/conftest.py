"""Marks: tests that need a GPU are skipped, with the reason, where torch sees none."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; tools/gpu_check.sh runs it where there is one")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
