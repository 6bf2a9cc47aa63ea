"""What is kept in host memory comes back of the same bits, in time, and is gone from the device in between."""

from __future__ import annotations

import gc
import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble
from engine.layer_costs import micro_batch
from engine.plan import META, LiveBytes, plan_memory
from engine.recompute import Recompute, offload, save_set
from engine.recompute.config import RecomputeConfig
from model import Build, Stage, build_layers
from parallel.grid import planned_grid
from tests.engine.recompute.meta_pass import bytes_of_a_pass
from tests.model.small import batch_of, real
from tests.parity.cases import MODELS, Case

IMAGES, MICRO_BATCHES = 2, 3


class AsOfAGpu(offload.PlainLink):
    """Copies are where LiveBytes does not see them, and nobody may use one that nobody has waited for.

    Attributes:
        moved: bytes out and back. waited: copies back that computation has waited for.
    """

    def __init__(self) -> None:
        self.moved, self.on_the_way, self.waited = [0, 0], 0, 0

    def out(self, x: Tensor) -> Any:
        self.moved[0] += x.nbytes
        return x.numpy().copy()

    def back(self, copy: Any) -> Tensor:
        self.moved[1] += copy.nbytes
        self.on_the_way += 1
        return torch.empty(copy.shape, dtype=torch.uint8).copy_(torch.from_numpy(copy))

    def after_back(self) -> Any:
        return self.on_the_way

    def wait(self, event: Any) -> None:
        self.waited = max(self.waited, event or 0)


class Trained:
    """Blocks one after the other, several micro-batches forward, then as many backward.

    Attributes:
        gradients: of the inputs. kept: bytes alive after the forwards. peak: the most. link: that was used.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: str, name: str, order: str = "FFFBBB") -> None:
        config = MODELS[model] if MODELS[model].stages else replace(MODELS[model], depth=6)
        specs = [spec for spec in build_layers(config.resolve()) if spec.name not in ("embed", "head")]
        self.link = AsOfAGpu()
        monkeypatch.setattr(offload, "_link", lambda *_, **__: self.link)
        policy = Recompute({spec.name: save_set(name) for spec in specs})
        build = Build(config=config.resolve(), policy=policy)
        torch.manual_seed(0)
        stage = real(Stage(specs, build)).requires_grad_(False)
        shape = specs[0].boundary(IMAGES, build)
        waiting, self.gradients, self.kept = deque[tuple[Tensor, Tensor]](), list[Tensor](), 0
        with LiveBytes() as counter:
            for number, action in enumerate(order):
                if action == "F":
                    x = torch.arange(math.prod(shape)).add(order[:number].count("F")).sin().view(shape).requires_grad_()
                    waiting.append((x, stage((x,), batch_of(list(range(IMAGES))))[0]))
                    del x
                    self.kept = max(self.kept, counter.now)
                    continue
                x, y = waiting.popleft()
                y.backward(torch.ones_like(y))
                del y
                assert x.grad is not None
                self.gradients.append(x.grad)
                del x
            policy.offload.settle()
            gc.collect()
            self.left = counter.now - sum(g.nbytes for g in self.gradients)
        self.peak = counter.peak


@pytest.mark.parametrize("model", ["parallel", "sequential", "pyramid"])
def test_of_several_micro_batches_little_stays_and_all_comes_back(monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    for kept, orders in (("all", ("FFFBBB", "FFBFBB", "FBFBFB")), ("input", ("FFBFBB",))):
        plain = Trained(monkeypatch, model, kept)
        assert plain.link.moved == [0, 0]
        for order in orders:
            sent = Trained(monkeypatch, model, f"{kept}+offload", order)
            assert all(torch.equal(a, b) for a, b in zip(plain.gradients, sent.gradients, strict=True))
            out, back = sent.link.moved
            assert 0 < back <= out and not sent.left
            assert back < out or order != "FBFBFB"  # what backward asks for at once is still there
            assert sent.link.waited == sent.link.on_the_way
            if (
                kept == "all" and order == "FFFBBB" and model != "pyramid"
            ):  # two of three times six blocks, and the next
                assert sent.kept < 0.2 * plain.kept and sent.peak < 0.3 * plain.peak, (sent.kept, plain.kept)


def test_what_blocks_share_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input of a block is the output of the one before it, and a view has the memory of what it is of."""
    sent = Trained(monkeypatch, "sequential", "input+offload")
    rows = sent.gradients[0].nbytes
    blocks = 6 - 1  # the first one's input is held by the stage that was sent it
    assert sent.link.moved[0] == MICRO_BATCHES * blocks * rows


CASES = [
    (Case("parallel", pipeline=2, micro_batches=4, schedule="1f1b"), "all+offload"),
    (Case("sequential", pipeline=2, micro_batches=4, schedule="zb_v", precision="bf16"), "qk_norm+offload"),
    (Case("sequential", micro_batches=2, depth=12), "all+offload"),
    (Case("parallel", data=2, zero=3, micro_batches=2, precision="fp8"), "fc1+offload"),
    (Case("parallel", tensor=2, sequence_parallel=True, micro_batches=2), "norm+gather+offload"),
]


@pytest.mark.parametrize(("case", "sets"), CASES, ids=str)
def test_a_plan_of_a_gpu_has_what_is_in_flight_and_one_of_cpus_saves_nothing(case: Case, sets: str) -> None:
    """To the byte, but that at most two loads are in flight wherever the peak is."""
    config = replace(case.config(), kernels="native", recompute=RecomputeConfig(policy=sets))
    kept = replace(config, recompute=RecomputeConfig(policy=sets.removesuffix("+offload")))
    shape = config.grid_shape(case.ranks)
    for rank in range(case.ranks):
        assembly = assemble(config, planned_grid(shape, rank), META, device_memory=0.0)
        counted, _ = bytes_of_a_pass(assembly)
        plan = plan_memory(config, shape, rank, 0.0)
        images = assembly.to_device(micro_batch(assembly), training=True).images
        planned = plan.activations - (0 if images is None else images.nbytes)
        assert counted <= planned + 4 * case.micro_batches + 8, (counted, planned)
        assert plan.host > 0
        on_cpu = plan_memory(config, shape, rank, 0.0, on_cpu=True)
        assert on_cpu.host == 0
        assert on_cpu.activations >= plan_memory(kept, shape, rank, 0.0, on_cpu=True).activations
        if case.depth == 12:
            assert planned < 1.25 * counted
            assert plan.activations < 0.6 * plan_memory(kept, shape, rank, 0.0).activations
