from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataConfig, Dataset, TextShape, build_datasets


@pytest.fixture(scope="session")
def digits() -> tuple[Dataset, Dataset]:
    text = TextShape(length=40, vocabulary_size=259, end_token=257)
    return build_datasets(DataConfig(), image_size=8, channels=1, num_classes=10, seed=0, text=text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of six small colour images, each of its own size."""
    rng = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 256, size=(20 + i, 30 - i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "train" / name / f"{i}.png")
    return tmp_path / "train"
