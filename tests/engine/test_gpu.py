"""The engine on a CUDA device: the same numbers as on a CPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from data import TrainStream, build_datasets
from engine.assemble import assemble
from engine.config import RecomputeConfig
from engine.device import choose_device
from engine.recompute import Recompute, save_set
from engine.run.step import Stepper
from model import Build, MicroBatch, ModelConfig, Stage, build_layers
from parallel.grid import make_grid
from parallel.process_group import World
from tests.model.small import real
from tests.parity.cases import MODELS, Case


def train(model: str, device: str, recompute: str = "none") -> tuple[list[float], list[float]]:
    """Losses and gradient norms of three steps."""
    config = replace(Case(model, micro_batches=2).config(), recompute=RecomputeConfig(policy=recompute))
    assembly = assemble(config, make_grid(config.grid_shape(1)), choose_device(device, World()))
    stepper = Stepper(assembly)
    place: dict[str, Any] = {"micro_batch_size": config.train.micro_batch_size, "data_rank": 0, "data_size": 1}
    sizes = config.model.sizes
    shape: dict[str, Any] = {"image_size": sizes.image, "channels": sizes.channels, "num_classes": sizes.classes}
    images, _ = build_datasets(config.data, **shape, seed=0)
    stream = TrainStream(images, config=config.data, global_batch_size=16, seed=0, **place)
    results = [stepper.train_step(batches, 1e-3) for batches in islice(stream.steps(0), 3)]
    return [r.loss for r in results], [r.grad_norm for r in results]


@pytest.mark.gpu
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_trains_to_the_numbers_of_a_cpu(model: str) -> None:
    gpu, cpu = train(model, "cuda"), train(model, "cpu")
    assert gpu[0] == pytest.approx(cpu[0], rel=1e-5)
    assert gpu[1] == pytest.approx(cpu[1], rel=1e-4)


@pytest.mark.parametrize(
    ("model", "device"),
    [
        *(pytest.param(model, "cuda", marks=pytest.mark.gpu) for model in MODELS),
        *((model, "cpu") for model in ("parallel", "pyramid")),  # the ladder does all of them
    ],
)
def test_what_is_computed_again_has_the_same_bits(model: str, device: str) -> None:
    kept = train(model, device)
    for recompute in ("selective", "fc1", "full", "all+offload", "input+offload"):
        assert train(model, device, recompute) == kept, recompute


@pytest.mark.gpu
def test_a_gpu_holds_less_of_what_is_in_host_memory() -> None:
    """Of twelve blocks three, and what is not theirs."""
    model = ModelConfig(preset="vit_b16", depth=12).resolve()
    specs = [spec for spec in build_layers(model) if spec.name.startswith("blocks.")]
    peaks, gradients = list[int](), list[Tensor]()
    for name in ("all", "all+offload"):
        build = Build(config=model, policy=Recompute({spec.name: save_set(name) for spec in specs}))
        stage = real(Stage(specs, build)).requires_grad_(False).cuda()
        x = torch.ones(specs[0].boundary(8, build), device="cuda").requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):  # memory is used again while copies may be under way
            x.grad = None
            (y,) = stage((x,), MicroBatch.of_images(torch.empty(8, 3, 224, 224), training=True))
            y.square().sum().backward()
        assert x.grad is not None
        peaks.append(torch.cuda.max_memory_allocated() - before)
        gradients.append(x.grad)
    assert torch.equal(*gradients) and peaks[1] < 0.4 * peaks[0], peaks


def test_auto_takes_the_gpu_where_there_is_one() -> None:
    assert choose_device("auto", World()).type == ("cuda" if torch.cuda.is_available() else "cpu")
