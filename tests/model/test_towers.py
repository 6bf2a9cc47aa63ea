"""Image and text tower: against the plain ones, over ranks, and cut into stages anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model import (
    Build,
    ImageText,
    MicroBatch,
    ModelConfig,
    Precision,
    Stage,
    TextConfig,
    build_layers,
    build_towers,
    makers,
)
from model.text_layers import ends
from parallel import comm
from parallel.comm import single_axis
from parallel.grid import GridShape, make_grid
from parallel.layout import info_of
from parallel.process_group import World
from parallel.tensor import TensorParallel
from tests.distributed import run_ranks
from tests.model.small import real
from tests.parity import plain_towers, plain_vit
from tests.parity.plain_towers import TextShape
from tests.parity.plain_vit import Shape

IMAGE = ModelConfig(width=16, depth=2, num_heads=4, image_size=8, patch_size=2, in_channels=1, drop_path=0.2).resolve()
TEXT = TextConfig(
    width=24, depth=3, num_heads=4, context_length=7, vocabulary_size=11, end_token=9, drop_path=0.2, norm_eps=1e-6
).resolve()
TEXTS = torch.tensor([[1, 5, 9, 9, 0, 0, 3], [9, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 9]])
"""An end token in the midst, twice; at once; none, as where texts are cut without it; at the end."""


def _weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """All of a module drawn anew, in float64."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.double().parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64) / 4)
    return {name: weight.detach().clone().requires_grad_() for name, weight in model.named_parameters()}


def _images(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(len(TEXTS), 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def _plain(weights: dict[str, Tensor], image: ModelConfig, text: TextConfig) -> tuple[Tensor, ...]:
    def shape(config: ModelConfig) -> Shape:
        (stage,) = config.sizes.stages
        return Shape(
            patch=config.sizes.patch, heads=stage.heads, depth=stage.depth, block=str(config.block), kinds=stage.kinds,
            position=str(config.position), pool=str(config.pool), gelu=str(config.gelu), norm=str(config.norm),
            mlp=str(config.mlp), eps=config.norm_eps or 0,
        )  # fmt: skip

    form = shape(text.model(10, "none"))
    left = plain_towers.encode_image(plain_vit.under(weights, "image."), _images(), shape(image))
    of_text = TextShape(form=form, pool=str(text.pool), end_token=text.end_token or 0)
    right = plain_towers.encode_text(plain_vit.under(weights, "text."), TEXTS, of_text)
    return plain_towers.pair(left, right, weights)


CASES: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {"pool": "eos"}, {"bias": -10.0}),
    ({"pool": "cls", "block": "parallel"}, {"pool": "last", "attention": "full"}, {"projection": "mlp"}),
    ({"pool": "gap"}, {"pool": "mean", "attention": "causal, full, causal", "block": "parallel"}, {}),
    (
        {"norm": "rmsnorm", "mlp": "swiglu"},
        {"pool": "map", "attention": "full", "gelu": "tanh", "projection": "linear", "projection_bias": True},
        {"projection": "none", "embedding": 16},
    ),
    (
        {"pool": "cls_gap"},
        {"pool": "eos", "projection": "none", "width": 32, "norm": "rmsnorm", "mlp": "swiglu", "bias": False},
        {"projection": "linear", "embedding": 32},
    ),
]


@pytest.mark.parametrize(("image", "text", "ends"), CASES, ids=str)
def test_towers_are_what_plain_ones_are(image: dict[str, Any], text: dict[str, Any], ends: dict[str, Any]) -> None:
    """Values and gradients, in float64."""
    own_image, own_text = replace(IMAGE, class_tokens=None, **image).resolve(), replace(TEXT, **text).resolve()
    model = ImageText(own_image, own_text, **{"embedding": 10, **ends}).eval()
    weights = _weights(model)
    ours, theirs = model(_images(), TEXTS), _plain(weights, own_image, own_text)
    marks = [torch.randn_like(x) for x in ours]
    exact = {"rtol": 1e-9, "atol": 1e-9}
    for out, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(out, expected, **exact)
    for outputs in (ours, theirs):
        torch.autograd.backward([(x * mark).sum() for x, mark in zip(outputs, marks, strict=True) if x.requires_grad])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, **exact, msg=lambda m, n=name: f"{n}: {m}")
        if not name.endswith("kv.bias"):  # one on keys changes nothing
            assert parameter.grad.any(), name
    torch.testing.assert_close(model.encode_image(_images(), normalize=True), ours[0])
    torch.testing.assert_close(model.encode_text(TEXTS, normalize=True), ours[1])


def test_where_texts_end() -> None:
    assert ends(TEXTS, 9).tolist() == [2, 0, 6, 6]


def test_the_scale_stays_below_its_bound_and_comes_back() -> None:
    model = ImageText(IMAGE, TEXT, embedding=10, temperature=0.01, max_logit_scale=50.0)
    for sign, passes in ((1.0, True), (-1.0, False)):  # a gradient that would have the scale fall, or rise
        model.zero_grad()
        *_, scale, _ = model(_images(torch.float32), TEXTS)
        assert scale.item() == pytest.approx(50)
        (sign * scale).backward()
        assert bool(model.get_parameter("pair.logit_scale").grad) is passes
    fixed = ImageText(IMAGE, TEXT, embedding=10, learn_temperature=False)
    assert not fixed.get_parameter("pair.logit_scale").requires_grad


def test_two_views_are_one_tower() -> None:
    image = replace(IMAGE, pool="gap").resolve()  # a probe's query would be computed once for both views
    layers = build_towers(image, None, embedding=10, bias=1.0)
    lone = build_layers(replace(image, num_classes=10, classifier_bias=False))
    assert [layer.name for layer in layers] == [f"image.{layer.name}" for layer in lone] + ["pair"]
    assert [layer.flops for layer in layers[:-1]] == [2 * layer.flops for layer in lone]
    stage = real(Stage(layers, Build(config=image)))
    views = torch.randn(6, 1, 8, 8)
    left, right, scale, bias = stage((), MicroBatch.of_images(views))
    assert left.shape == right.shape == (3, 10) and scale.item() == pytest.approx(1 / 0.07) and bias == 1
    swapped = stage((), MicroBatch.of_images(torch.cat([views[3:], views[:3]])))
    assert torch.equal(swapped[0], right) and torch.equal(swapped[1], left)


# -- as layers ---------------------------------------------------------------------------------------------------------


def _batch() -> MicroBatch:
    batch = MicroBatch.of(_images(torch.float32), TEXTS)
    return replace(batch, training=True, sample_ids=batch.sample_ids + 7)


def _run(stages: Sequence[Stage], batch: MicroBatch) -> tuple[Tensor, ...]:
    """Stage by stage, as the executor runs them: what is sent is detached."""
    flow, sent = (), list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]()
    for stage in stages:
        given = tuple(x.detach().requires_grad_() for x in flow)
        flow = stage(given, batch)
        sent.append((given, flow))
    grads: Sequence[Tensor] = [torch.ones_like(x) for x in flow]
    for given, out in reversed(sent):
        pairs = [(x, grad) for x, grad in zip(out, grads, strict=True) if x.requires_grad]
        torch.autograd.backward([x for x, _ in pairs], [grad for _, grad in pairs])
        grads = [x.grad for x in given if x.grad is not None]
    return flow


def test_any_cut_into_stages_gives_the_same_bits() -> None:
    layers, build = build_towers(IMAGE, TEXT, embedding=10, bias=-10.0), Build(config=IMAGE)
    whole = real(Stage(layers, build))
    expected = _run([whole], _batch())
    gradients = {name: p.grad for name, p in whole.named_parameters()}
    every = list(range(1, len(layers)))
    for cuts in [[cut] for cut in every] + [every]:
        edges = [0, *cuts, len(layers)]
        stages = [real(Stage(layers[a:b], build)) for a, b in pairwise(edges)]
        found = _run(stages, _batch())
        assert all(torch.equal(*both) for both in zip(found, expected, strict=True)), cuts
        for stage in stages:
            for name, parameter in stage.named_parameters():
                assert torch.equal(parameter.grad, gradients[name]), (cuts, name)


def test_what_flows_is_what_boundaries_say() -> None:
    layers, build = build_towers(IMAGE, TEXT, embedding=10), Build(config=IMAGE)
    flow: tuple[Tensor, ...] = ()
    for place, spec in enumerate(layers):
        sizes = [maker.boundary(4, build) for maker in makers(layers, place)]
        assert [tuple(x.shape) for x in flow] == sizes, spec.name
        flow = real(Stage([spec], build))(flow, _batch())
    assert sum(layer.parameters for layer in layers) == sum(
        p.numel() for p in ImageText(IMAGE, TEXT, embedding=10).parameters()
    )


# -- over ranks --------------------------------------------------------------------------------------------------------


def _over_ranks(world: World) -> None:
    """Tensor ranks, with and without split rows, and context ranks: values, and gradients as they are summed."""
    images, batch = _images(), MicroBatch.of(_images(), TEXTS)
    for pool, projection, axis in (
        ("eos", "linear", "tensor"), ("map", "mlp", "tensor"), ("mean", "linear", "rows"), ("eos", "mlp", "rows"),
        ("last", "linear", "rows"), ("mean", "linear", "context"),
    ):  # fmt: skip
        text = replace(TEXT, pool=pool, attention="causal, full, causal").resolve()
        layers = build_towers(IMAGE, text, embedding=9, projection=projection, bias=-1.0)  # type: ignore[arg-type]
        wide = Precision(dtype=torch.float64)
        whole = real(Stage(layers, Build(config=IMAGE, precision=wide)))
        weights = _weights(whole)
        grid = make_grid(GridShape(**{"context" if axis == "context" else "tensor": world.size}), world)
        tp = TensorParallel(axis=grid.tensor, sequence_parallel=axis == "rows")
        ours = real(Stage(layers, Build(config=IMAGE, tp=tp, context=grid.context, precision=wide))).double()
        for name, parameter in ours.named_parameters():
            parameter.data.copy_(info_of(parameter).layout.local(weights[name].detach()))
        expected, found = whole((), batch), ours((), replace(batch, images=images))
        exact = {"rtol": 1e-9, "atol": 1e-9, "msg": lambda m, of=(pool, projection, axis): f"{of}: {m}"}
        generator = torch.Generator().manual_seed(5)
        marks = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in expected]
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(left, right, **exact)
        sum((x * mark).sum() for x, mark in zip(expected, marks, strict=True)).backward()
        (sum((x * mark).sum() for x, mark in zip(found, marks, strict=True)) / grid.context.size).backward()
        own = dict(ours.named_parameters())
        for name, parameter in whole.named_parameters():
            info, grad = info_of(own[name]), own[name].grad
            if info.partial_over_tensor:
                comm.all_reduce(grad, grid.tensor)
            comm.all_reduce(grad, grid.context)
            assert parameter.grad is not None
            exact["msg"] = lambda m, of=(pool, projection, axis, name): f"{of}: {m}"
            torch.testing.assert_close(grad, info.layout.local(parameter.grad), **exact)


def test_over_ranks_towers_are_as_on_one() -> None:
    run_ranks(2, _over_ranks)


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"preset": "clip_x"}, "text.preset 'clip_x' is unknown: choose one of clip_b, .*"),
        ({"width": 25}, "text.num_heads 4 does not divide text.width 25: use .*"),
        ({"attention": "window"}, "text.attention names window: texts have no map of patches; use causal or full"),
        ({"end_token": 11}, "text.end_token is 11, but text.vocabulary_size 11 has tokens 0 to 10: give one of them.*"),
        ({"context_length": 0}, "text.context_length is 0: it must be 1 to 65536"),
        (
            {"projection": "mlp", "projection_bias": True},
            "text.projection_bias is true, but text.projection is mlp: .*",
        ),
        (
            {"norm": "rmsnorm", "norm_bias": False},
            "text.norm_bias is False, but text.norm is rmsnorm, which has none: .*",
        ),
    ],
)
def test_mistakes_are_told_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TEXT, **keys).resolve()


def test_other_mistakes() -> None:
    with pytest.raises(ValueError, match=r"text.end_token is not set: give the token that ends a text"):
        TextConfig(width=8, depth=1, num_heads=1, vocabulary_size=100).resolve()
    with pytest.raises(ValueError, match=r"projection is none, but the image tower's pooled features are 16 and"):
        build_towers(IMAGE, TEXT, embedding=10, projection="none")
    with pytest.raises(ValueError, match=r"texts have 6 tokens, but the model takes 7: cut or fill"):
        ImageText(IMAGE, TEXT, embedding=10)(_images(torch.float32), TEXTS[:, :6])
    for texts, counts in ((None, "0 texts"), (TEXTS[:1], "1 texts")):
        with pytest.raises(ValueError, match=f"images and {counts}: give one text for each image; encode_image"):
            ImageText(IMAGE, TEXT, embedding=10)(_images(torch.float32), texts)
    assert single_axis("context").size == 1


@pytest.mark.parametrize("preset", ["clip_b", "siglip_so400m"])
def test_presets_have_the_published_numbers(preset: str) -> None:
    embedding = {"clip_b": 512, "siglip_so400m": 1152}[preset]
    text = TextConfig(preset=preset).resolve()
    layers = build_towers(IMAGE, text, embedding=embedding)
    count = sum(layer.parameters for layer in layers if layer.name.startswith("text."))
    # OpenAI's ViT-B/32: 151,277,313, without the image tower's 87,849,216 and the logit scale; SigLIP's by its shapes
    assert count == {"clip_b": 63_428_096, "siglip_so400m": 449_734_896}[preset]
