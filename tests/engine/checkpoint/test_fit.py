"""An image tower beside a text tower from a model that stands alone, and the other way round."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import torch

from engine.checkpoint.fit import Fit, Geometry, fit, is_another_model, resized
from model import ModelConfig, TextConfig, build_layers, build_towers
from model.layers import logical_shapes

SMALL = ModelConfig(
    width=16, depth=2, num_heads=4, image_size=8, patch_size=2, in_channels=1, num_classes=3, position="learned_1d"
).resolve()
LARGE = replace(SMALL, depth=3, image_size=12).resolve()
TEXT = TextConfig(width=24, depth=1, num_heads=4, context_length=7, vocabulary_size=11, end_token=9).resolve()


def _geometry(model: ModelConfig) -> Geometry:
    return Geometry.of(json.loads(json.dumps(asdict(model))))


def _fits(here: ModelConfig, there: ModelConfig, *, towers_there: bool, biased: bool = False) -> dict[str, Fit]:
    alone, both = build_layers, lambda model: build_towers(model, TEXT, embedding=5, projection_bias=biased)
    shapes = [
        logical_shapes(model, (both if towers else alone)(model))
        for model, towers in ((here, not towers_there), (there, towers_there))
    ]
    found = fit(*shapes, _geometry(there), _geometry(here))
    assert not is_another_model(found)
    return {of.name: of for of in found}


def test_a_classifier_is_no_projection_even_of_its_shape() -> None:
    five = replace(SMALL, num_classes=5).resolve()
    for there, start in ((True, ""), (False, "image.")):
        for biased in (False, True):
            found = _fits(five, five, towers_there=there, biased=biased)
            assert {of.how for name, of in found.items() if name.startswith(f"{start}head.fc.")} == {"new"}
    of_clip = replace(five, classifier_bias=False).resolve()  # where it stands alone, the projection is the classifier
    assert _fits(five, of_clip, towers_there=False)["image.head.fc.weight"].how == "taken"
    assert _fits(of_clip, five, towers_there=True)["head.fc.weight"].how == "new"  # of five classes


def test_an_image_tower_from_a_lone_model_and_back() -> None:
    ours = _fits(LARGE, SMALL, towers_there=False)
    own = {name: of for name, of in ours.items() if of.how != "left out"}
    for name, of in own.items():
        tower, _, rest = name.partition(".")
        if tower != "image" or rest.startswith(("blocks.2.", "head.fc")):
            assert of.how == "new", name
        else:
            assert of.source == rest and of.how == ("resized" if rest == "embed.pos" else "taken"), name
    assert {name for name, of in ours.items() if of.how == "left out"} == {"head.fc.bias"}
    ((box, values),) = resized("image.embed.pos", torch.randn(16, 16), _geometry(SMALL), _geometry(LARGE))
    assert box.offset == (0, 0) and values.shape == (36, 16)
    back = _fits(SMALL, LARGE, towers_there=True)
    assert back["blocks.1.attn.qkv.weight"].source == "image.blocks.1.attn.qkv.weight"
    assert back["embed.pos"].how == "resized" and back["head.fc.weight"].how == "new"
    assert {of.how for name, of in back.items() if name.startswith(("text.", "pair"))} == {"left out"}
