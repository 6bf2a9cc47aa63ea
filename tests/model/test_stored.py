"""What a rank is given of a teacher's stored features."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from model import Build, MicroBatch, ModelConfig
from model.stored import StoredBlock
from parallel.comm import Axis
from parallel.tensor import TensorParallel


def test_ranks_have_their_rows_of_a_stored_block() -> None:
    """Of 3 x 4 patches behind 2 prefix tokens, two context ranks those of 2 rows and of 1, tensor ranks half of all."""
    config = ModelConfig(image_size=(6, 8), patch_size=2, in_channels=1, width=8, depth=1, num_heads=2, registers=2)
    known, images = torch.randn(3, 12, 8), torch.zeros(3, 1, 6, 8)
    batch = replace(MicroBatch.of_images(images), teachers=({"blocks.0": known},))

    def axis(name: str, index: int) -> Axis:
        return Axis(name=name, ranks=(0, 1), index=index, planned=True)

    def rows(context: int) -> Tensor:
        found, count = list[Tensor](), 0
        for index in range(2):
            tp = TensorParallel(axis=axis("tensor", index), sequence_parallel=True)
            build = Build(config=config.resolve(), tp=tp, context=axis("context", context))
            layer, count = StoredBlock("blocks.0", build, number=0), build.tokens.count
            found.append(layer(None, batch))
            assert layer(None, replace(batch, teachers=())).shape == found[-1].shape
        own = torch.cat(found)[: 3 * count].unflatten(0, (3, count))
        prefix = 2 * (context == 0)
        assert not own[:, :prefix].any()
        return own[:, prefix:]

    assert torch.equal(torch.cat([rows(0), rows(1)], 1), known)
