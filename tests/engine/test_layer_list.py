"""Two towers as the engine sees their list: names, depths, what is frozen, what flows, formats, save sets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import Config, PrecisionConfig, RecomputeConfig, TrainConfig
from engine.errors import ConfigError
from engine.frozen import frozen_of
from engine.layer_list import depths_of, layer_of, outputs_of
from engine.precision.precision import precision_of
from engine.recompute.assignment import assignment
from engine.recompute.ranks import Place
from model import Build, LayerSpec, ModelConfig, TextConfig, build_layers, build_towers, makers, ride_of
from model.matching import Weights
from model.teachers import Matching, Pixels, Teacher, build_student

IMAGE = ModelConfig(width=16, depth=2, num_heads=4, image_size=8, patch_size=2, in_channels=1, num_classes=3).resolve()
TEXT = TextConfig(width=24, depth=3, num_heads=4, context_length=7, vocabulary_size=11, end_token=9).resolve()
LAYERS = build_towers(IMAGE, TEXT, embedding=10)
NAMES = [layer.name for layer in LAYERS]
TAUGHT = build_student(
    IMAGE,
    [Teacher(name="teacher", model=IMAGE, pixels=Pixels(scale=(1.0,), shift=(0.0,), size=(8, 8)), dtype=torch.float32)],
    Matching(pairs=(((0, 0), (1, 1)),), shares=(1.0,), loss="mse", weights=Weights(features=1.0)),
)


def _passes(*freeze: str, layers: list[LayerSpec] = LAYERS) -> tuple[int, ...]:
    config = Config(model=IMAGE, train=TrainConfig(steps=1, global_batch_size=2, freeze=freeze))
    return frozen_of(config, layers).passes


def test_whose_a_parameter_is() -> None:
    assert layer_of("blocks.3.attn.qkv.weight") == "blocks.3"
    assert layer_of("head.fc.bias") == "head"
    for teacher in ("teacher.image.blocks.3", "teacher.text.head", "teacher.pair", "teacher.1.blocks.0"):
        assert layer_of(f"{teacher}.norm1.weight") == teacher
    for layer in LAYERS:
        for name, _ in layer.factory(Build(config=IMAGE).of(layer)).named_parameters():
            assert layer_of(f"{layer.name}.{name}") == layer.name


def test_each_tower_is_as_deep_as_if_it_stood_at_the_end() -> None:
    depths = depths_of(LAYERS)
    assert [depths[name] for name in NAMES] == [6, 7, 8, 9, 5, 6, 7, 8, 9, 9]
    lone = build_layers(IMAGE)
    assert list(depths_of(lone).values()) == [0, 1, 2, 3]
    depths = depths_of(TAUGHT)
    assert [depths[layer.name] for layer in TAUGHT if not layer.is_frozen] == [6, 7, 7, 8, 8, 9]


@pytest.mark.parametrize(
    ("freeze", "passes"),
    [
        ((), [3] * 10),
        (("image",), [1, 1, 1, 1, 3, 3, 3, 3, 3, 3]),  # LiT (Zhai et al. 2022)
        (("text",), [3, 3, 3, 3, 1, 1, 1, 1, 1, 3]),
        (("image.embed", "image.blocks.0", "text.embed", "text.blocks.[01]"), [1, 1, 3, 3, 1, 1, 1, 3, 3, 3]),
        (("image.blocks", "pair"), [3, 2, 2, 3, 3, 3, 3, 3, 3, 2]),
    ],
)  # fmt: skip
def test_gradients_go_where_something_is_trained(freeze: tuple[str, ...], passes: list[int]) -> None:
    """No tower's depends on the other's."""
    assert _passes(*freeze) == tuple(passes)


def test_a_teacher_is_nothing_to_be_frozen() -> None:
    assert _passes("embed", layers=TAUGHT)[:2] == (1, 1)
    with pytest.raises(ConfigError, match=r"train.freeze holds 'teacher', which is the name of no parameter"):
        _passes("teacher", layers=TAUGHT)


def test_what_flows_carries_a_gradient_unless_all_that_made_it_is_frozen() -> None:
    build = Build(config=IMAGE)
    for freeze, expected in ((("image",), [True, False]), (("text",), [False, True]), ((), [True, True])):
        outputs = outputs_of(LAYERS, _passes(*freeze), 4, build)
        place = NAMES.index("text.blocks.1")
        flow = [outputs[maker.name] for maker in makers(LAYERS, place)]
        assert [spec.carries_gradient for spec in flow] == expected
        assert [spec.shape for spec in flow] == [(4 * 7, 24), (4, 10)]
    assert [maker.name for maker in makers(LAYERS, NAMES.index("text.embed"))] == ["image.head"]


def test_formats_are_chosen_in_each_tower() -> None:
    config = PrecisionConfig(dtype="bf16", high_first_blocks=1, high_last_blocks=1, high_layers=("head",))
    high = precision_of(config, LAYERS).high
    assert high == {
        "image.blocks.0", "image.blocks.1", "text.blocks.0", "text.blocks.2", "image.head", "text.head", "pair"
    }  # fmt: skip
    eight = precision_of(replace(config, dtype="fp8", high_last_blocks=0), LAYERS)
    assert eight.fp8 == {"image.blocks.1", "text.blocks.1", "text.blocks.2"}
    assert eight.of_layer("pair") == torch.float32 and eight.of_weight("pair.logit_scale") == torch.float32
    assert "pair" in precision_of(PrecisionConfig(dtype="fp8"), LAYERS).high


def test_a_list_of_save_sets_names_the_blocks_of_both_towers() -> None:
    sets = "all, input, norm, qkv, attention"
    found = assignment(RecomputeConfig(policy=sets), LAYERS, _passes())
    assert [of.name for of in found.values()] == sets.split(", ")
    assert list(found) == [name for name in NAMES if ".blocks." in name]
    found = assignment(RecomputeConfig(policy=sets), LAYERS, _passes("image"))
    assert list(found) == ["text.blocks.0", "text.blocks.1", "text.blocks.2"]
    with pytest.raises(ValueError, match=r"names 2 blocks, but there are 5"):
        assignment(RecomputeConfig(policy="all, input"), LAYERS, _passes())


def test_where_a_layer_is_among_what_rides() -> None:
    head, end = NAMES.index("image.head"), NAMES.index("pair")
    spans = [ride_of(LAYERS, place) for place in range(len(LAYERS))]
    assert spans == [None] * head + [range(head, end + 1)] * (end + 1 - head)

    def where(layer: int, stage: range) -> tuple[bool, bool, bool, bool]:
        place = Place.of(layer, stage, len(LAYERS), spans[layer])
        return place.first, place.last, place.arises, place.joined

    assert where(6, range(3, 7)) == (False, True, True, False)
    assert where(6, range(4, 8)) == (False, False, False, False)
    assert where(9, range(5, 10)) == (False, False, False, True)
    assert where(2, range(10)) == (False, False, False, False)
