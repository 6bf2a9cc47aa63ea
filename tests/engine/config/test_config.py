"""What a configuration resolves to, and that each impossible one is refused with the value, the cause and a cure."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from data import DataConfig
from engine.config import Config, LogConfig, OptimizerConfig, PrecisionConfig, ScheduleConfig, TrainConfig
from engine.config.cli import parse
from engine.config.limits import divisors
from engine.config.without_effect import without_effect
from engine.errors import ConfigError
from engine.optimizers.schedules import check_schedule
from engine.run.trainer import total_steps
from model import ModelConfig, StageConfig
from parallel.config import ParallelConfig
from tests.engine.small import small

STAGES = (
    StageConfig(depth=2, width=16, num_heads=4),
    StageConfig(depth=2, width=24, num_heads=2, attention=("window", "full"), window_size=3),
)


def layout(
    tensor: int = 1, pipeline: int = 1, context: int = 1, schedule: str = "1f1b", v: int | None = None, **train: Any
) -> Config:
    parallel = ParallelConfig(
        tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, context_parallel_size=context, schedule=schedule,
        virtual_stages=v,
    )  # fmt: skip
    return small(parallel=parallel, train=TrainConfig(**{"steps": 1, "global_batch_size": 16, **train}))


def cut(*layers: int) -> Config:
    return small(parallel=ParallelConfig(pipeline_parallel_size=2, layers_per_stage=layers))


def pyramid(**changes: Any) -> Config:
    return small(**{"width": None, "depth": None, "num_heads": None, "stages": STAGES} | changes)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "context", "world", "given", "size", "count"),
    [
        (1, 1, 1, 1, None, 16, 1),
        (1, 1, 1, 4, None, 4, 1),  # the data-parallel size is what remains of the world
        (2, 2, 1, 8, None, 4, 2),  # one micro-batch per stage
        (1, 4, 1, 4, None, 4, 4),
        (1, 1, 1, 2, 2, 2, 4),
        (2, 1, 1, 2, 16, 16, 1),
        (3, 1, 1, 3, None, 16, 1),  # of 4 heads, 2 on the first rank
        (1, 1, 2, 4, None, 8, 1),
        (2, 2, 2, 16, 2, 2, 4),
    ],
)
def test_micro_batches(
    tensor: int, pipeline: int, context: int, world: int, given: int | None, size: int, count: int
) -> None:
    config = layout(tensor, pipeline, context, micro_batch_size=given).resolve(world)
    assert config.train.micro_batch_size == size
    assert config.num_micro_batches(config.grid_shape(world)) == count
    assert config.grid_shape(world).data == world // tensor // pipeline // context


def test_resolving_fills_in_what_follows() -> None:
    config = small().resolve(1)
    assert config.model.mlp_dim == 4 * 16 and config.model.head_bias == 0.0
    assert config.optimizer.head_weight_decay == config.optimizer.weight_decay
    assert config.resolve(1) == config
    sigmoid = small(train=TrainConfig(steps=1, loss="sigmoid")).resolve(1)
    assert sigmoid.model.head_bias == -10.0
    assert small(classifier_bias=False).resolve(1).model.head_bias is None  # there is none to begin with
    decay = small(optimizer=OptimizerConfig(head_weight_decay=3.0)).resolve(1)
    assert decay.optimizer.head_weight_decay == 3.0


REFUSED = [
    # configuration, world, what the message must name: the value, the cause and the cure
    (
        layout(tensor=2),
        3,
        ["3 ranks", "tensor 2 x pipeline 1", "start 2 or 4 ranks", "parallel.tensor_parallel_size"],
    ),
    (layout(tensor=2, pipeline=2), 2, ["2 ranks", "tensor 2 x pipeline 2 = 4", "start 4 ranks"]),
    (layout(tensor=0), 1, ["parallel.tensor_parallel_size is 0", "at least 1"]),
    (layout(pipeline=-1), 1, ["parallel.pipeline_parallel_size is -1", "at least 1"]),
    (layout(tensor=5), 5, ["model.num_heads 4", "parallel.tensor_parallel_size 5", "at most 4"]),
    (layout(tensor=2, context=2), 6, ["6 ranks", "tensor 2 x pipeline 1 x context 2 = 4", "start 4 or 8 ranks"]),
    (layout(context=0), 1, ["parallel.context_parallel_size is 0", "at least 1"]),
    (layout(context=3), 3, ["parallel.context_parallel_size 3", "2 rows", "at most 2", "larger images"]),
    (layout(tensor=3, context=2), 6, ["context_parallel_size 2", "4 heads", "tensor_parallel_size 3", "at most 1"]),
    (
        pyramid(parallel=ParallelConfig(tensor_parallel_size=3)),
        3,
        ["model.stages[1].num_heads 2", "parallel.tensor_parallel_size 3", "at most 2"],
    ),
    (
        pyramid(parallel=ParallelConfig(pipeline_parallel_size=8)),
        8,
        ["8 is more than the 7 layers", "(embedding, 4 blocks, 1 patch merge, head)", "at most 7 stages"],
    ),
    (pyramid(width=16), 1, ["model.stages stands in the place of model.width"]),
    (
        small(attention="[window, full] * 3"),
        1,
        ["model.attention names 6 layers", "there are 4", "'[window, full] * 2'"],
    ),
    (layout(pipeline=8), 8, ["pipeline_parallel_size 8", "6 layers", "at most 6 stages", "deeper model"]),
    (
        layout(pipeline=4, schedule="zb_v"),
        4,
        ["size 4 with 2 stages per rank (parallel.schedule zb_v) is 8 stages", "6 layers", "at most 3 ranks", "zb_h1"],
    ),
    (
        layout(pipeline=2, schedule="interleaved", v=4),
        2,
        ["2 with 4 stages per rank", "is 8 stages", "6 layers", "at most 3 parallel.virtual_stages", "deeper model"],
    ),
    (
        cut(3, 2, 1),
        2,
        ["layers_per_stage [3, 2, 1] is for 3 stages", "pipeline has 2", "such as [3, 3]", "leave it out"],
    ),
    (
        cut(3, 4),
        2,
        ["layers_per_stage [3, 4] has 7 layers", "6 layers of the model (embedding, 4 blocks, head)", "to 6"],
    ),
    (layout(), 3, ["global_batch_size 16", "3 data-parallel ranks", "15 or 18"]),
    (layout(micro_batch_size=3), 1, ["global_batch_size 16", "micro-batches of 3", "15 or 18", "1, 2, 4, 8, 16"]),
    (layout(micro_batch_size=32), 1, ["global_batch_size 16", "micro-batches of 32", "32", "1, 2, 4, 8, 16"]),
    (layout(pipeline=3), 3, ["global_batch_size 16", "3 micro-batches", "15 or 18", "1, 2, 4, 8, 16"]),
    (small(train=TrainConfig()), 1, ["train.steps or train.epochs", "neither is set"]),
    (small(train=TrainConfig(steps=1, epochs=1.0)), 1, ["train.steps or train.epochs", "both are set"]),
    (small(width=18), 1, ["model.num_heads 4", "model.width 18", "[2, 3, 6] heads", "multiple of 4"]),
    (small(image_size=0), 1, ["model.image_size is 0", "at least 1"]),
    (small(drop_path=1.0), 1, ["model.drop_path is 1.0", "below 1"]),
    (small(registers=-1), 1, ["model.registers is -1", "0 or more"]),
    (
        small(data=DataConfig(labels_per_class=5)),
        1,
        ["data.labels_per_class is 5", "supervised", "data.images_per_class"],
    ),
    (small(num_classes=0), 1, ["model.num_classes is 0", "no classifier", "supervised", "number of classes"]),
    (small(num_classes=1, num_heads=2, tensor=2), 2, ["model.num_classes 1", "tensor_parallel_size 2", "at most 1"]),
    (small(preset="vit_b61"), 1, ["model.preset 'vit_b61'", "unknown", "vit_b16"]),
    (Config(train=TrainConfig(steps=1)), 1, ["model.width is not set", "model.preset"]),
    (small(position="sincos_2d", width=6, num_heads=2), 1, ["model.width 6", "multiple of 4", "sincos_2d"]),
]


@pytest.mark.parametrize(("config", "world", "parts"), REFUSED, ids=lambda v: v[0] if isinstance(v, list) else None)
def test_what_cannot_be_is_refused(config: Config, world: int, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        config.resolve(world)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: TrainConfig(global_batch_size=0), ["train.global_batch_size is 0", "positive"]),
        (lambda: TrainConfig(micro_batch_size=-1), ["train.micro_batch_size is -1", "positive"]),
        (lambda: TrainConfig(steps=0), ["train.steps is 0", "positive"]),
        (lambda: TrainConfig(epochs=-0.5), ["train.epochs is -0.5", "positive"]),
        (lambda: TrainConfig(seed=-1), ["train.seed is -1", "0 or more"]),
        (lambda: TrainConfig(eval_interval=-1), ["train.eval_interval is -1", "0 or more"]),
        (lambda: TrainConfig(max_bad_steps=0), ["train.max_bad_steps is 0", "positive"]),
        (lambda: OptimizerConfig(lr=-1.0), ["optimizer.lr is -1.0", "or more"]),
        (lambda: OptimizerConfig(eps=float("nan")), ["optimizer.eps is nan", "or more"]),
        (lambda: OptimizerConfig(eps=0.0), ["optimizer.eps is 0.0", "1e-20 or more", "usual is 1e-8"]),
        (lambda: OptimizerConfig(clip_grad=-1.0), ["optimizer.clip_grad is -1.0", "or more"]),
        (lambda: OptimizerConfig(head_weight_decay=-3.0), ["optimizer.head_weight_decay is -3.0", "or more"]),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), ["optimizer.betas is (0.9, 1.0)", "below 1"]),
        (lambda: ScheduleConfig(warmup_steps=-1), ["schedule.warmup_steps", "0 or more"]),
        (lambda: ScheduleConfig(timescale=0.0), ["schedule.timescale is 0.0", "positive"]),
        (lambda: TrainConfig(global_batch_size=2**31), ["train.global_batch_size is 2147483648", "at most 1000000000"]),
        (lambda: TrainConfig(steps=10**9 + 1), ["train.steps is 1000000001", "at most 1000000000"]),
        (lambda: TrainConfig(epochs=1e308), ["train.epochs is 1e+308", "at most 1000000000"]),
        (lambda: Config(train=TrainConfig(seed=2**63)), ["train.seed is 9223372036854775808", "below 2^63"]),
        (lambda: Config(optimizer=OptimizerConfig(lr=1e39)), ["optimizer.lr is 1e+39", "at most 3.4e+38"]),
        (lambda: Config(optimizer=OptimizerConfig(lr=float("inf"))), ["optimizer.lr is inf", "a finite number"]),
        (lambda: PrecisionConfig(dtype="fp8", fp8_history=10**9), ["precision.fp8_history is 1000000000", "65536"]),
        (lambda: ParallelConfig(bucket_mib=1e308), ["parallel.bucket_mib is 1e+308", "at most 1048576"]),
        (lambda: ParallelConfig(timeout=1e10), ["parallel.timeout is 10000000000.0", "to 1000000"]),
        (lambda: ParallelConfig(timeout=1e-300), ["parallel.timeout is 1e-300", "from 0.01"]),
        (lambda: ParallelConfig(timeout=float("nan")), ["parallel.timeout is nan", "from 0.01"]),
        (lambda: ScheduleConfig(name="wsd", timescale=5.0), ["timescale 5.0", "no effect", "wsd", "use rsqrt"]),
        (lambda: ScheduleConfig(name="cosine", cooldown_steps=3), ["cooldown_steps 3", "no effect", "rsqrt or wsd"]),
        (lambda: ParallelConfig(schedule="1f2b"), ["'1f2b'", "unknown", "1f1b", "zb_v", ".csv"]),
        (lambda: ParallelConfig(layers_per_stage=(3, 0)), ["parallel.layers_per_stage is [3, 0]", "1 layer at least"]),
        (lambda: ParallelConfig(virtual_stages=2), ["parallel.virtual_stages is 2", "1f1b", "interleaved"]),
        (lambda: ParallelConfig(schedule="zb_v", virtual_stages=3), ["virtual_stages is 3", "zb_v", "interleaved"]),
        (lambda: ParallelConfig(schedule="interleaved", virtual_stages=0), ["virtual_stages is 0", "2 or more"]),
        (lambda: LogConfig(interval=0), ["log.interval is 0", "at least 1"]),
        (lambda: ParallelConfig(timeout=0.0), ["parallel.timeout is 0.0", "positive"]),
        (lambda: DataConfig(path="x"), ["data.path is 'x'", "no effect with data.kind=digits", "image_folder"]),
    ],
)
def test_values_out_of_range_are_refused(make: Any, parts: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_steps_follow_from_epochs() -> None:
    config = small(train=TrainConfig(epochs=2.5, global_batch_size=100))
    assert total_steps(config, 1000) == 25
    assert total_steps(config, 1001) == 26  # the last epoch is finished
    assert total_steps(small(train=TrainConfig(steps=7)), 1000) == 7


def test_epochs_of_more_steps_than_can_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs 1000000\.0 are \d+ steps: at most 1000000000"):
        total_steps(small(train=TrainConfig(epochs=1e6)), 10**6)


def test_a_large_batch_is_refused_at_once_with_what_divides_it() -> None:
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"micro_batch_size among 1, 2, 4, 5, .*, 1000000000$"):
        layout(global_batch_size=10**9, micro_batch_size=3).resolve(1)
    assert time.process_time() - start < 2
    assert [divisors(n) for n in (1, 2, 12, 16)] == [[1], [1, 2], [1, 2, 3, 4, 6, 12], [1, 2, 4, 8, 16]]


def test_a_saved_configuration_serves_another_number_of_ranks(tmp_path: Path) -> None:
    for given, again in ((None, 4), (2, 2)):
        config = layout(micro_batch_size=given)
        (tmp_path / "config.yaml").write_text(text := config.resolve(1).to_yaml(config))
        assert ("micro_batch_size: null  # here 16\n" in text) == (given is None)
        read, _ = parse(["--config", str(tmp_path / "config.yaml")])
        assert read.resolve(4).train.micro_batch_size == again
        assert read.resolve(1) == config.resolve(1)


def test_warm_up_and_cool_down_must_fit() -> None:
    config = ScheduleConfig(name="wsd", warmup_steps=6, cooldown_steps=4)
    check_schedule(config, 10)
    with pytest.raises(ConfigError, match=r"warmup_steps 6 and cooldown_steps 4 do not fit into 9 steps: shorten"):
        check_schedule(config, 9)


@pytest.mark.parametrize("resolved", [False, True])
def test_a_written_configuration_reads_back_the_same(tmp_path: Path, resolved: bool) -> None:
    config = replace(
        small(tensor=2, preset="vit_ti16"),
        optimizer=OptimizerConfig(lr=3e-7, betas=(0.8, 0.95), eps=1e-12, head_weight_decay=3.0),
        data=DataConfig(kind="synthetic", size=7, mean=(0.1, 0.2, 0.3), std=(1e-3, 2.0, 3.0), flip=True),
        schedule=ScheduleConfig(name="rsqrt", warmup_steps=3, cooldown_steps=2, timescale=1e4),
        run_dir="0123",  # a text that looks like a number
    )
    config = config.resolve(2) if resolved else config
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse(["--config", str(file)]) == (config, False)
    assert set(yaml.safe_load(config.to_yaml())) >= {"model", "data", "parallel", "train", "optimizer", "schedule"}


@pytest.mark.parametrize("resolved", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "linear"},
        {"attention": "[window, full] * 2"},
        {"attention": "window * 3, full"},
        {"attention": ("window", "grid", "linear", "full")},
        {"attention": ("window * 3", "full")},
        {"attention": ("[window, full] * 2",)},
        {"image_size": (8, 12)},
        {"stages": STAGES},
        {
            "stages": (replace(STAGES[0], attention="window, grid", grid_size=2, mlp_dim=3), *STAGES[1:]),
            "layer_scale": 1e-5,
        },
        {"preset": "swin_t", "image_size": 224, "patch_size": 4},
        {"preset": "dinov3_7b"},
    ],
    ids=str,
)
def test_shapes_and_kinds_of_attention_read_back_the_same(
    tmp_path: Path, changes: dict[str, Any], resolved: bool
) -> None:
    if "stages" in changes or "preset" in changes:
        changes = {"width": None, "depth": None, "num_heads": None} | changes
    config = small(**changes)
    config = config.resolve(1) if resolved else config
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    again = parse(["--config", str(file)])[0]
    assert again == config
    assert again.resolve(1) == config.resolve(1)


def test_a_preset_needs_nothing_else() -> None:
    config = Config(model=ModelConfig(preset="vit_b16"), train=TrainConfig(steps=1)).resolve(1)
    assert (config.model.width, config.model.depth, config.model.num_heads) == (768, 12, 12)


def test_keys_that_do_nothing_in_this_run_are_told() -> None:
    alone = ParallelConfig(
        layers_per_stage=(3, 2),
        schedule="interleaved",
        virtual_stages=3,
        sequence_parallel=False,
        zero_stage=3,
        gather_memory=4.0,
        shared_memory=False,
    )
    config = small(parallel=alone, precision=PrecisionConfig(cpu_matmul="mkl")).resolve(1)

    def told(device: str) -> list[str]:
        return [line.split()[0] for line in without_effect(config, config.grid_shape(1), device, 10)]

    keys = ("layers_per_stage", "schedule", "virtual_stages", "sequence_parallel", "zero_stage", "gather_memory")
    parallel = [f"parallel.{key}" for key in keys]
    assert told("cpu") == [*parallel, "parallel.shared_memory"]
    assert told("cuda") == [*parallel, "precision.cpu_matmul", "parallel.shared_memory"]
    shared = replace(alone, layers_per_stage=(1,) * 6, tensor_parallel_size=2, pipeline_parallel_size=2)
    eight = replace(config, parallel=shared, train=TrainConfig(steps=1, global_batch_size=8)).resolve(8)
    assert without_effect(eight, eight.grid_shape(8), "cpu", 10) == []
    assert without_effect(small().resolve(1), small().grid_shape(1), "cpu", 1) == []
