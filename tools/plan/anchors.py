"""`python -m tools.plan --anchors`: published step times and rates beside what the time model says of the same work.

- The 22B transformer of Korthikanti et al. 2022 on 8 A100s, tensor parallel, 4 sequences of 2048 tokens: with all of a
  layer computed again 1.42 s, with sequence parallelism and its attention alone computed again 1.10 s. Its attention is
  not fused (scores, softmax, dropout and their mask go through memory): that is priced as it stands, and so are the
  dropouts and the vocabulary's product, which a ViT does not have.
- Megatron-Core's 16B transformer on H100s, tensor parallel 4, 4096 tokens: 489 TFLOP/s per device. Width and depth are
  assumed (6144 and 36), as are 8 data-parallel ranks with 32 sequences each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.clusters import Cluster, read_cluster
from engine.clusters.pricing import Pricer
from engine.config import Config, PrecisionConfig, TrainConfig
from engine.step_time import StepModel, StepTime, predict_step
from model import ModelConfig
from parallel.config import ParallelConfig
from parallel.grid import GridShape
from tools.benchmark.table import Row

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
_META = torch.device("meta")
_WIDTH, _DEPTH, _HEADS, _TOKENS, _SEQUENCES, _TENSOR, _WORDS = 6144, 48, 64, 2048, 4, 8, 51200


def rows() -> list[Row]:
    """One per figure that was published."""
    full, selective = _korthikanti(read_cluster(str(CLUSTERS / "a100_64.yaml")))
    step = predict_step(*_step(6144, 36, 48, 4096, 32, 4, 256, 1, "h100_64"))
    assert step.mfu is not None
    rate = step.mfu * 989
    return [
        _row("22B on 8 A100, all computed again, s", 1.42, full),
        _row("22B on 8 A100, attention computed again, s", 1.10, selective),
        _row("the first over the second", 1.42 / 1.10, full / selective),
        _row("16B on H100, tensor 4, TFLOP/s per device", 489.0, rate),
    ]


def _row(what: str, published: float, predicted: float) -> Row:
    return {"what": what, "published": published, "predicted": predicted, "ratio": predicted / published}


def _step(
    width: int, depth: int, heads: int, tokens: int, world: int, tensor: int, batch: int, micro: int, cluster: str,
    *, splits_rows: bool = True,
) -> tuple[Config, GridShape, Cluster]:  # fmt: skip
    """A transformer of that shape as a ViT with as many patches."""
    model = ModelConfig(
        image_size=(32, tokens // 32), patch_size=1, in_channels=1, width=width, depth=depth, num_heads=heads,
        mlp_dim=4 * width, block="sequential", num_classes=1000, pool="gap", qk_norm=False, bias=True,
    )  # fmt: skip
    config = Config(
        model=model,
        parallel=ParallelConfig(tensor_parallel_size=tensor, sequence_parallel=splits_rows, zero_stage=1),
        train=TrainConfig(steps=1, global_batch_size=batch, micro_batch_size=micro),
        precision=PrecisionConfig(dtype="bf16"),
    ).resolve(world)
    return config, config.grid_shape(world), read_cluster(str(CLUSTERS / f"{cluster}.yaml")).of_ranks(world)


def _korthikanti(cluster: Cluster) -> tuple[float, float]:
    """Seconds of a step: all computed again without, attention with sequence parallelism."""
    found = []
    for splits_rows in (False, True):
        config, shape, machine = _step(
            _WIDTH, _DEPTH, _HEADS, _TOKENS, _TENSOR, _TENSOR, _SEQUENCES, _SEQUENCES, "a100_64",
            splits_rows=splits_rows,
        )  # fmt: skip
        layer = StepModel.of(config, shape, machine).times["blocks.1"]
        attends = sum(_attention(cluster))
        drops = _dropout(cluster, splits_rows)
        fused = layer.forward["attention"], layer.backward["attention"]
        forward = sum(layer.forward.values()) - fused[0] + _attention(cluster)[0] + drops
        both = forward + sum(layer.backward.values()) - fused[1] + _attention(cluster)[1] + drops
        again = _attention(cluster)[0] if splits_rows else forward
        assert attends > sum(fused)
        rest: StepTime = predict_step(config, shape, machine)
        tail = rest.parts["optimizer"] + rest.parts["data"] + _vocabulary(cluster)
        found.append(_DEPTH * (both + again) + tail)
    return found[0], found[1]


def _priced(cluster: Cluster, run: Callable[[], object]) -> float:
    with Pricer(cluster) as pricer:
        run()
    return pricer.clock


def _attention(cluster: Cluster) -> tuple[float, float]:
    """Forward and backward of a layer's, not fused, with dropout, in bf16."""
    heads, features = _HEADS // _TENSOR, _WIDTH // _HEADS
    shape = _SEQUENCES * heads, _TOKENS, features
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device=_META, requires_grad=True) for _ in range(3))
    out: list[Tensor] = []

    def forward() -> None:
        scores = (q @ k.transpose(1, 2)).mul(0.1).softmax(-1)
        out.append(F.dropout(scores, 0.1) @ v)

    return _priced(cluster, forward), _priced(cluster, lambda: out[0].backward(torch.empty_like(out[0])))


def _dropout(cluster: Cluster, splits_rows: bool) -> float:
    """Of both branches of a layer, one way."""
    tokens = _SEQUENCES * _TOKENS // (_TENSOR if splits_rows else 1)
    x = torch.empty(tokens, _WIDTH, dtype=torch.bfloat16, device=_META)
    return 2 * _priced(cluster, lambda: F.dropout(x, 0.1))


def _vocabulary(cluster: Cluster) -> float:
    """The last layer's three products."""
    sizes = _SEQUENCES * _TOKENS, _WORDS // _TENSOR, _WIDTH
    return sum(cluster.product(kind, *sizes, "bf16") for kind in ("forward", "input_gradient", "weight_gradient"))
