"""A student that starts from a teacher's blocks, heads and features: shapes, which ones, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from model import ModelConfig, VisionTransformer
from model.config import StageConfig
from model.inherit import chosen_blocks, evenly, inherit
from model.layers import logical_shapes

BASE = ModelConfig(
    image_size=16, patch_size=4, in_channels=1, width=24, depth=4, num_heads=4, mlp_dim=48, num_classes=5, qk_norm=True,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "parallel": {"block": "parallel", "pool": "map", "position": "learned_2d"},
    "sequential": {"block": "sequential", "pool": "cls_gap", "norm_after_pool": True, "mlp": "swiglu", "registers": 2},
    "linear": {"attention": "linear", "qk_norm": False, "layer_scale": 0.1, "pool": "gap"},
}


def _started(teacher: VisionTransformer, student: VisionTransformer, blocks: Any = "first") -> set[str]:
    """Fills the student; returns what has stayed as it was."""
    whole, own = dict(teacher.named_parameters()), dict(student.named_parameters())
    found = inherit(teacher.config, student.config, blocks)
    with torch.no_grad():
        for name, piece in found.items():
            assert piece.of(whole[piece.source]).shape == own[name].shape, name
            own[name].copy_(piece.of(whole[piece.source]))
    return own.keys() - found.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_the_teachers_own_shape_is_the_teacher(kind: str) -> None:
    config = replace(BASE, **KINDS[kind])
    teacher, student = VisionTransformer(config, seed=1), VisionTransformer(config, seed=2)
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not _started(teacher, student)
    assert torch.equal(teacher(images), student(images))


@pytest.mark.parametrize("kind", KINDS)
def test_a_smaller_student_has_all_its_tensors(kind: str) -> None:
    small = {"width": 12, "num_heads": 3, "mlp_dim": 20, "depth": 2, "num_classes": 3}
    teacher, student = (replace(BASE, **KINDS[kind], **with_).resolve() for with_ in ({}, small))
    left = _started(VisionTransformer(teacher, seed=1), VisionTransformer(student, seed=2), [1, 3])
    assert left == {name for name in logical_shapes(student) if name.startswith("head.fc")}


@pytest.mark.parametrize("block", ["parallel", "sequential"])
def test_features_belong_together(block: Any) -> None:
    """A teacher with nothing but its student's weights, where they would be taken from, is the same function."""
    wide = replace(BASE, block=block, pool="cls", position="learned_1d", norm="rmsnorm", qk_norm=False, norm_eps=1e-12)
    narrow = replace(wide, width=12, num_heads=2, mlp_dim=24, depth=2)
    teacher, student = VisionTransformer(wide, seed=1), VisionTransformer(narrow, seed=2)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()  # a block of zeros adds nothing
        for name, piece in inherit(teacher.config, student.config, [0, 2]).items():
            whole, own = teacher.get_parameter(piece.source), student.get_parameter(name)
            own.add_(torch.randn(own.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
            places = [torch.arange(n) if i is None else i for n, i in zip(whole.shape, piece.indices, strict=True)]
            # a mean square is over twice as many features
            whole[torch.meshgrid(*places, indexing="ij")] = own * (0.5**0.5 if "norm" in name else 1)
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(teacher(images), student(images), rtol=1e-4, atol=1e-5)


def test_pyramids_go_stage_by_stage() -> None:
    stages = [StageConfig(depth=2, width=8, num_heads=2), StageConfig(depth=3, width=16, num_heads=4)]
    fewer = [StageConfig(depth=1, width=4, num_heads=1), StageConfig(depth=2, width=8, num_heads=2)]
    base = replace(BASE, width=None, depth=None, num_heads=None, mlp_dim=None, pool="cls_gap")
    wide, narrow = (replace(base, stages=tuple(of)).resolve() for of in (stages, fewer))
    assert not _started(VisionTransformer(wide, seed=1), VisionTransformer(narrow, seed=2))
    assert chosen_blocks(wide, narrow, "even") == [1, 3, 4]
    found = inherit(wide, narrow)
    assert found["blocks.1.norm1.weight"].source == "blocks.2.norm1.weight"
    merged = found["merges.0.proj.weight"].indices[1]
    assert merged is not None and merged.tolist() == [token * 8 + i for token in range(4) for i in (0, 2, 4, 6)]
    with pytest.raises(ValueError, match="block 0 would start from the teacher's 2, which is not in the same stage"):
        inherit(wide, narrow, [2, 3, 4])


def test_heads_and_their_features_are_chosen_as_such() -> None:
    base = replace(BASE, block="sequential")
    teacher, student = base.resolve(), replace(base, width=8, num_heads=2).resolve()
    qkv = inherit(teacher, student)["blocks.0.attn.qkv.weight"].indices[0]
    assert qkv is not None
    assert qkv.tolist() == [24 * part + 6 * head + i for part in range(3) for head in (0, 2) for i in (0, 1, 3, 4)]
    assert evenly(10, 4).tolist() == [0, 2, 5, 7]


@pytest.mark.parametrize(
    ("changes", "blocks", "said"),
    [
        ({"width": 32}, "first", "has 4 x 8 features in a dim, the teacher's 4 x 6|has 32 x 1 features"),
        ({"depth": 5}, "first", "5 blocks in stage 0, the teacher 4: give the student fewer, or say"),
        ({"depth": 2}, [1], "1 blocks of the teacher are given for the student's 2"),
        ({"depth": 5}, "even", "5 blocks in stage 0, the teacher 4"),
        ({"depth": 1}, [4], "would start from the teacher's 4"),
        ({"patch_size": 8}, "first", "model.patch_size is 8, the teacher's 4"),
        ({"position": "sincos_2d"}, "first", "model.position is sincos_2d"),
    ],
)
def test_what_cannot_start_so(changes: dict[str, Any], blocks: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        inherit(BASE.resolve(), replace(BASE, **changes).resolve(), blocks)


def test_heads_that_are_turned_stay_whole() -> None:
    rope = replace(BASE, position="rope_2d", width=32)
    with pytest.raises(ValueError, match="such that a head has 8"):
        inherit(rope.resolve(), replace(rope, width=16).resolve())
    assert inherit(rope.resolve(), replace(rope, width=16, num_heads=2).resolve())
