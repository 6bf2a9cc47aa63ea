"""Images of several sizes in one micro-batch: each as alone, through the plain model at its own size."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from model import ModelConfig, StageConfig, VisionTransformer
from model.blocks import DropPath
from model.build import Build
from model.embed import unfold
from model.packing import Packing
from parallel.tensor.segments import segment_attention
from tests.model.small import TINY, batch_of

SIZES = (8, 8), (4, 12), (10, 2), (7, 9), (2, 2)
"""Of images, for patches of 2 x 2: the model's own, and others; one that does not fill its last patches."""


def images_of(sizes: Any = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(1, *size, generator=generator, dtype=torch.float64) for size in sizes]


def model_of(**keys: Any) -> VisionTransformer:
    """Small, in fp64, with weights far from their small initial ones."""
    config: ModelConfig = replace(TINY, in_channels=1, **keys)
    model = VisionTransformer(config, dynamic_image_size=True).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)).double()
    return model


@pytest.mark.parametrize(
    ("position", "keys"),
    list(
        product(
            ("learned_2d", "learned_1d", "sincos_2d", "rope_2d", "none"),
            (
                {"pool": "map", "block": "parallel", "qk_norm": True, "registers": 1},
                {"pool": "cls", "class_tokens": 2, "block": "sequential", "pre_norm": True},
                {"pool": "gap", "patch_bias": False},
                {"pool": "cls_gap", "registers": 2, "norm_after_pool": True},
            ),
        )
    ),
)
def test_each_image_is_as_alone(position: str, keys: dict[str, Any]) -> None:
    """Logits, and the gradients of all weights."""
    model, images = model_of(position=position, **keys), images_of()
    with torch.inference_mode():
        model.packed(images)  # what is kept of it serves training
    logits = model.packed(images)
    (logits.sin() * torch.arange(1, 6)).sum().backward()
    packed = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat([model.logits(image[None]) for image in images])
    (alone.sin() * torch.arange(1, 6)).sum().backward()
    torch.testing.assert_close(logits, alone, rtol=1e-6, atol=1e-6)  # plain resizing sums in fp32
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_filling_changes_nothing_and_has_no_gradient() -> None:
    """Rows behind the last image: whatever they hold."""
    model, images = model_of(pool="map", registers=1), images_of()
    found = []
    for filling in (0, 5):
        model.zero_grad()
        batch = batch_of([0, 1, 2, 3, 4], training=False)
        maps = ((4, 4), (2, 6), (5, 1), (4, 5), (1, 1))
        behind = torch.full((filling, 4), 7.0, dtype=torch.float64)
        patches = torch.cat([*(unfold(x[None], 2)[0] for x in images), behind])
        packing = Packing(maps, 1, len(patches) + len(maps))
        assert packing.filling == filling and packing.patches == len(patches)
        patches.requires_grad_()
        logits = model(replace(batch, images=patches, packing=packing))
        logits.square().sum().backward()
        assert patches.grad is not None and not patches.grad[len(patches) - filling :].any()
        found.append([logits, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="59 tokens, more than 58"):
        Packing(maps, 1, 58)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_segments_are_attended_to_apart(device: str, dtype: torch.dtype) -> None:
    """Against the definition, in fp64; in half precision to its rounding."""
    generator = torch.Generator().manual_seed(0)
    queries, keys, rows = (3, 1, 70), (3, 9, 70), 85
    q, k, v = (torch.randn(rows, 3, 8, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    out = segment_attention(*(x.to(device) for x in (q, k, v)), queries, keys).cpu()
    weights = torch.randn(rows, 3, 8, generator=generator).double()
    (out.double() * weights).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    parts, first, of = [], 0, 0
    for n, m in zip(queries, keys, strict=True):
        scores = torch.einsum("phk,shk->hps", wide[0][first : first + n], wide[1][of : of + m]) / 8**0.5
        parts.append(torch.einsum("hps,shk->phk", scores.softmax(-1), wide[2][of : of + m]))
        first, of = first + n, of + m
    expected = torch.cat(parts)
    (expected * weights[:74]).sum().backward()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert not out[74:].any() and out.dtype == dtype
    torch.testing.assert_close(out[:74].double(), expected, rtol=tolerance, atol=tolerance)
    for ours, theirs in zip((q, k, v), wide, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


def test_drop_path_goes_by_images() -> None:
    """All rows of an image skip a branch, or none, and which do is drawn as without packing."""
    drop = DropPath("blocks.1", 0.5, Build(config=TINY.resolve()))
    plain = batch_of(list(range(16)))
    packing = Packing(tuple((1 + n % 3, 2) for n in range(16)), 0, 70)
    scale, packed = drop(plain, torch.float32), drop(replace(plain, packing=packing), torch.float32)
    assert scale is not None and packed is not None
    kept = scale.view(16, -1)[:, 0]
    assert 0 < kept.count_nonzero() < 16 and len(packed) == 70
    for own, rows in zip(kept, packing.split(packed), strict=True):
        assert (rows == own).all()


PYRAMID = {"width": None, "depth": None, "num_heads": None, "stages": (StageConfig(depth=1, width=16, num_heads=4),)}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"attention": "[window, full] * 1"}, "model.attention has window"),
        ({"attention": "causal"}, "model.attention has causal"),
        (PYRAMID, "model.stages"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        model_of(**keys).packed(images_of())
