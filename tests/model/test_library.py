"""The model in a user's own code: calls, other image sizes, training loops, number formats, compilers and exporters."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from model import ModelConfig, StageConfig, VisionTransformer
from parallel.process_group import World
from parallel.tensor import products
from tests.distributed import run_ranks
from tests.model.small import TINY

CLASSIC = replace(TINY, position="learned_1d", pool="cls", qk_norm=True)
EVERYTHING = replace(
    TINY, image_size=(8, 12), depth=6, block="parallel", norm="rmsnorm", mlp="swiglu", layer_scale=0.5, qk_norm=True,
    position="rope_2d", pool="cls", registers=2, global_tokens=3, linear_conv=3, window_size=3, grid_size=2,
    attention="linear, window, shifted_window, grid, global_tokens, full",
)  # fmt: skip
PYRAMID = ModelConfig(
    image_size=(16, 24), patch_size=2, num_classes=5, window_size=3,
    stages=(
        StageConfig(depth=2, width=8, num_heads=2, attention="window, shifted_window"),
        StageConfig(depth=1, width=16, num_heads=2, attention="full"),
    ),
)  # fmt: skip
FEATURES = replace(TINY, pool="cls_gap", position="none", pre_norm=True, patch_bias=False, num_classes=0)
SWIN = replace(
    PYRAMID, relative_position=True, window_size=4, position="none",
    stages=tuple(replace(stage, attention=f"[shifted_window] * {stage.depth}") for stage in PYRAMID.stages or ()),
)  # fmt: skip
MODELS = {
    "map": TINY, "classic": CLASSIC, "everything": EVERYTHING, "pyramid": PYRAMID, "features": FEATURES, "swin": SWIN
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def images_for(model: VisionTransformer, count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.sizes.channels, *model.sizes.image, generator=generator)


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    found = [p.grad for p in model.parameters()]
    assert all(g is not None and g.dtype == p.dtype for g, p in zip(found, model.parameters(), strict=True))
    return [g for g in found if g is not None]


def away(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def same_size(model: VisionTransformer, size: tuple[int, int]) -> VisionTransformer:
    """A model made for images of this size, with the same weights, resized."""
    other = VisionTransformer(replace(model.config, image_size=size), seed=1)
    other.load(dict(model.named_parameters()), model.config)
    return other.eval()


# -- images ------------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("change", [(0, 1, 0), (0, 0, -1), (0, 8, 8), (0, 0, 40), (1, 0, 0)], ids=str)
def test_images_of_another_shape_are_refused(name: str, change: tuple[int, int, int]) -> None:
    model = VisionTransformer(MODELS[name])
    given = [side + more for side, more in zip((3, *model.sizes.image), change, strict=True)]
    shown, wanted = (" x ".join(map(str, shape)) for shape in (given, (3, *model.sizes.image)))
    for call in (model, model.logits, model.features):
        with pytest.raises(ValueError, match=rf"^images are {shown}, but .* {wanted}: .*dynamic_image_size=True$"):
            call(torch.zeros(2, *given))
    with pytest.raises(ValueError, match=r"^images are "):
        model(torch.zeros(given))


@pytest.mark.parametrize(
    ("name", "position"),
    [("classic", "learned_1d"), ("classic", "learned_2d"), ("map", "sincos_2d"), ("map", "rope_2d"),
     ("everything", "rope_2d"), ("pyramid", "learned_2d"), ("swin", "none")],
)  # fmt: skip
def test_on_request_positions_are_resized(name: str, position: Any) -> None:
    """As in a model that is made for the size, with the weights loaded; and what is learned learns from it."""
    model = VisionTransformer(replace(MODELS[name], position=position), dynamic_image_size=True).eval()
    for size in ((20, 14), (7, 9), (20, 14)):
        images, other = torch.randn(2, 3, *size), same_size(model, size)
        torch.testing.assert_close(model(images), other(images))
        for (found, stride), (expected, expected_stride) in zip(
            model.features(images), other.features(images), strict=True
        ):
            torch.testing.assert_close(found, expected)
            assert stride == expected_stride
    assert all(g.any() for g in gradients(model, model(torch.randn(2, 3, 20, 14)).square().sum()))
    images = images_for(model)
    assert torch.equal(model(images), VisionTransformer(model.config).eval()(images))  # its own size
    with pytest.raises(ValueError, match=r"^images are 1 x 20 x 14, but the model takes .* of 3 x 20 x 14"):
        model(torch.randn(2, 1, 20, 14))


# -- training ----------------------------------------------------------------------------------------------------------


def test_drop_path_draws_anew_at_each_call() -> None:
    model = VisionTransformer(replace(TINY, drop_path=0.5))
    images = images_for(model, 16)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append([model(images) for _ in range(3)])
    assert not torch.equal(draws[0][0], draws[0][1]) and not torch.equal(draws[0][1], draws[0][2])
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))  # by torch's generator
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(images), model(images))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_plain_training_loop() -> None:
    model = VisionTransformer(replace(TINY, drop_path=0.1))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    images, labels, losses = images_for(model, 10), torch.arange(10) % 5, []
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def _data_parallel(world: World) -> list[Tensor]:
    model = VisionTransformer(EVERYTHING)
    images, parallel = images_for(model, 4).chunk(world.size)[world.rank], DistributedDataParallel(model)
    return gradients(model, parallel(images).square().mean())


def test_distributed_data_parallel() -> None:
    model = VisionTransformer(EVERYTHING)
    expected = gradients(model, model(images_for(model, 4)).square().mean())
    for found in run_ranks(2, _data_parallel):
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@every_model
def test_copies(name: str) -> None:
    model = VisionTransformer(MODELS[name], dynamic_image_size=True).eval()
    images, file = images_for(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(images), model(images))
        assert torch.equal(other(F.pad(images, (0, 2))), model(F.pad(images, (0, 2))))


# -- number formats ----------------------------------------------------------------------------------------------------

FORMATS = {torch.float64: 1e-6, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@every_model
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_another_format(name: str, dtype: torch.dtype) -> None:
    model = VisionTransformer(MODELS[name], dynamic_image_size=True)
    images, other = images_for(model), copy.deepcopy(model).to(dtype)
    found, expected = other(images.to(dtype)), model(images)
    assert found.dtype == dtype and away(found, expected) < FORMATS[dtype]
    loss, expected_loss = (y.double().square().sum() for y in (found, expected))
    for ours, theirs in zip(gradients(other, loss), gradients(model, expected_loss), strict=True):
        assert away(ours, theirs) < 10 * FORMATS[dtype]
    wide = F.pad(images, (0, 2))
    assert away(other(wide.to(dtype)), model(wide)) < FORMATS[dtype]
    tables = [table for table in other.buffers() if table.is_floating_point()]
    assert all(table.dtype == torch.float32 for table in tables)  # of positions: no format of weights


@every_model
def test_autocast(name: str) -> None:
    """What the model gives in that format, with gradients for fp32 weights."""
    model = VisionTransformer(MODELS[name], dynamic_image_size=True)
    images, other, wide = images_for(model), copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()
    with torch.autocast("cpu", torch.bfloat16):
        found, padded = model(images), model(F.pad(images, (0, 2)))
        assert wide(images).dtype == torch.float64  # autocast leaves it alone
    expected = other(images)
    assert torch.equal(found, expected)
    loss, expected_loss = (y.double().square().sum() for y in (found, expected))
    for ours, theirs in zip(gradients(model, loss), gradients(other, expected_loss), strict=True):
        assert torch.equal(ours, theirs.float())
    assert padded.dtype == torch.bfloat16  # its positions are resized before they are rounded
    assert away(padded, model(F.pad(images, (0, 2)))) < FORMATS[torch.bfloat16]


# -- compilers and exporters -------------------------------------------------------------------------------------------


def check_compiled(model: VisionTransformer, images: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, model):
        torch.manual_seed(0)
        y = call(images)
        results.append([y, *gradients(model, y.float().square().sum())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("config", "kernels"),
    [(replace(CLASSIC, drop_path=0.3), "auto"), (PYRAMID, "reference"), (EVERYTHING, "auto")],
    ids=["classic", "pyramid", "everything"],
)
def test_it_compiles_to_one_graph(config: ModelConfig, kernels: Any) -> None:
    model = VisionTransformer(config, kernels=kernels)
    check_compiled(model, images_for(model))


def test_it_compiles_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FLAGS", frozenset())  # attention and products through fp32
    model = VisionTransformer(replace(TINY, depth=1))
    with torch.autocast("cpu", torch.bfloat16):
        check_compiled(model, images_for(model))


@pytest.mark.parametrize("name", ["everything", "pyramid"])
def test_export(name: str) -> None:
    model = VisionTransformer(MODELS[name], kernels="reference").eval()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (images_for(model),), dynamic_shapes=batch)
    assert not any("vitruvius" in str(node.target) for node in program.graph.nodes)  # plain PyTorch
    images = images_for(model, 5, seed=1)
    torch.testing.assert_close(program.module()(images), model(images))


@pytest.mark.filterwarnings("ignore")
def test_onnx() -> None:
    from onnx.reference import ReferenceEvaluator

    model = VisionTransformer(replace(CLASSIC, depth=1), kernels="reference").eval()
    batch = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (images_for(model),), dynamo=True, dynamic_shapes=batch, verbose=False)
    assert program is not None
    images, graph = images_for(model, 5, seed=1), program.model_proto
    (found,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach())


def test_kernels_are_a_choice() -> None:
    with pytest.raises(ValueError, match=r"^kernels: 'fast' is not one of auto, native, reference, apex$"):
        VisionTransformer(TINY, kernels="fast")  # type: ignore[arg-type]
