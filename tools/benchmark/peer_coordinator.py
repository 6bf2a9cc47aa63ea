"""The part of `python -m tools.benchmark peers` that compares whole programs, each in processes of its own.

Only so can peak memory be told per program. All start from the same weights and see the same images, so their losses
must agree, step by step: that they do the same mathematics is printed, not assumed. See tools.benchmark.turns for how
they take turns, tools.benchmark.peer_programs for what they are.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.errors import ConfigError
from tools.benchmark import peer_limit
from tools.benchmark.bench import read_config
from tools.benchmark.peer_inputs import make_task, pipeline_settings
from tools.benchmark.peer_programs import Task
from tools.benchmark.table import Row, show
from tools.benchmark.timing import quartiles
from tools.benchmark.toys import TORCH_SCHEDULES
from tools.benchmark.turns import Answer, Program, ProgramFailedError, Running, started

WARMUP = 2
_MIB = 2**20
# As model.kernels.tune_allocator, which this engine calls: freed blocks stay in the process.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
_PLAIN = {
    "block": "sequential", "norm": "layernorm", "mlp": "gelu", "gelu": "erf", "layer_scale": 0.0, "qk_norm": False,
    "bias": True, "position": "learned_1d", "pool": "cls", "registers": 0, "global_tokens": 0, "attention": "full",
    "drop_path": 0.0, "stages": None, "patch_bias": True, "classifier_bias": True, "pre_norm": False, "class_tokens": 1,
    "class_position": True, "norm_after_pool": False,
}  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """What --against can name; "fp32" is this engine, to compare formats.

    Attributes:
        settings: see the program's module. own_environment: whether `make peers` is needed. dtype: if not that of all.
        in_stages: whether it is a pipeline, with settings of its configuration.
    """

    program: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    own_environment: bool = False
    dtype: str | None = None
    in_stages: bool = False


# Settings are the best of what was tried: gathering the next block ahead; torch's fused AdamW, level with DeepSpeed's
# own; buckets of a few matrices, faster and smaller than the default of 500 million numbers, and no second stream to
# overlap with, which a CPU does not have.
_BUCKETS = {"reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 5_000_000, "overlap_comm": False}
_DEEPSPEED = {"cpu_adam": False, "zero_optimization": _BUCKETS}
PEERS = {
    "fp32": Peer("vitruvius", dtype="fp32"),
    "fsdp2": Peer("fsdp2", {"reshard_after_forward": None, "prefetch": True}),
    "fsdp2_recompute": Peer("fsdp2", {"reshard_after_forward": None, "prefetch": True, "checkpoint": True}),
    "fsdp2_keep": Peer("fsdp2", {"reshard_after_forward": False, "prefetch": True}),
    "torch_pipeline": Peer("torch_pipeline", in_stages=True),
    "deepspeed": Peer("deepspeed", _DEEPSPEED, own_environment=True),
    "deepspeed_recompute": Peer("deepspeed", {**_DEEPSPEED, "checkpoint": True}, own_environment=True),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Those of the benchmark itself.

    Attributes:
        against: of PEERS. ranks: of each program but `eager`. peers_python: interpreter of the environment of `make
            peers`. system_malloc: whether the peers go without the allocator settings of this engine, which make steps
            faster and hand back less memory. json: a file for the rows. memory_limit: bytes above imports that each
            rank may take; `auto` for one that FSDP2 keeps by computing blocks again alone. memory_only: whether to find
            that alone, and the budget by which this engine keeps it.
    """

    against: Sequence[str]
    ranks: int
    rounds: int
    peers_python: Path
    system_malloc: bool = False
    json: str | None = None
    memory_limit: str | None = None
    memory_only: bool = False


@dataclass
class Record:
    """What a program did: a number per step, warm-up included. Of the ranks the largest counts, but for the loss.

    Attributes:
        seconds: wall-clock. cpu: seconds of all threads of a rank. peak, imports: resident bytes, the most there ever
            was, and what the libraries alone take. idle: share of the time of others' steps that it used a CPU.
    """

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    imports: int = 0
    idle: float = 0.0

    @property
    def above_imports(self) -> int:
        """Bytes of the largest rank."""
        return self.peak - self.imports

    def add(self, answers: Sequence[Answer]) -> None:
        """Of a step, from all ranks."""
        self.seconds.append(max(answer["seconds"] for answer in answers))
        self.cpu.append(max(answer["cpu_seconds"] for answer in answers))
        self.losses.append(statistics.fmean(answer["loss"] for answer in answers))
        self.peak = max(answer["peak_bytes"] for answer in answers)
        self.imports = max(answer["imports_bytes"] for answer in answers)
        self.idle = max(answer["waited_cpu_seconds"] / (answer["waited_seconds"] or 1.0) for answer in answers)


def check_plain(config: Config) -> None:
    """Raise ConfigError where EagerViT is not the model of this resolved configuration, or AdamW not its optimizer."""
    model, optimizer = config.model, config.optimizer
    strange = [
        f"model.{name} {getattr(model, name)}" for name, value in _PLAIN.items() if getattr(model, name) != value
    ]
    if strange:
        raise ConfigError(
            f"peers compares models as the presets vit_ti16 to vit_gg14 have them, not with {', '.join(strange)}: "
            "choose one of those, or give --model.block sequential --model.position learned_1d --model.pool cls"
        )
    if config.train.loss != "softmax" or optimizer.head_weight_decay != optimizer.weight_decay:
        raise ConfigError("peers compares with train.loss softmax and one weight decay for body and head")


def compare(options: Options, flags: Sequence[str]) -> None:
    """Measure and print; called in one process, without a launcher.

    Raises:
        ConfigError: a configuration that the peers have no counterpart of, or a program that cannot run.
    """
    options = _without_missing(options)
    in_stages = any(PEERS[name].in_stages for name in options.against)
    flags = _engine_flags(flags, () if in_stages else ("--parallel.zero_stage", "3"))
    config = read_config(flags).resolve(options.ranks)
    check_plain(config)
    if options.memory_limit is not None:
        read_config(peer_limit.with_policy(flags)).resolve(options.ranks)
    (_check_pipeline if in_stages else _check_data_parallel)(config, options)
    with tempfile.TemporaryDirectory(prefix="peers-") as name:
        task, limit = make_task(config, config.grid_shape(options.ranks).data, flags, Path(name)), None
        try:
            if options.memory_limit is not None:
                limit, task = peer_limit.apply(options.memory_limit, task, partial(_peak, options, config, Path(name)))
                if options.memory_only:
                    print("at this limit:", *peer_limit.found(limit, task))
                    return
            programs = _programs(options, config, task)
            with started(programs, Path(name)) as running:
                records = take_turns(running, options.rounds)
        except ProgramFailedError as error:
            raise ConfigError(str(error)) from error
    show([_losses(number, records) for number in range(WARMUP + options.rounds)])
    print()
    rows = [_row(config, program, records) for program in programs]
    show(rows if limit is None else peer_limit.judge(rows, limit), options.json)


def _without_missing(options: Options) -> Options:
    """Those of several peers whose environment is there; the others are told of."""
    if options.peers_python.exists():
        return options
    there = [name for name in options.against if not PEERS[name].own_environment]
    for name in options.against if there else ():
        if name not in there:
            print(f"{name} is left out: it needs an environment of its own, {options.peers_python}: run `make peers`")
    return replace(options, against=there or options.against)


def _check_data_parallel(config: Config, options: Options) -> None:
    one_micro_batch = config.train.micro_batch_size == config.train.global_batch_size // options.ranks
    if config.grid_shape(options.ranks).data != options.ranks or not one_micro_batch:
        raise ConfigError("peers compares data parallelism with one micro-batch: leave the parallel group alone")


def _check_pipeline(config: Config, options: Options) -> None:
    if len(options.against) > 1:
        raise ConfigError(f"--against {','.join(options.against)}: a pipeline is compared with one of torch's alone")
    if config.grid_shape(options.ranks).pipeline != options.ranks:
        raise ConfigError(f"torch_pipeline: give --parallel.pipeline_parallel_size {options.ranks}, as --ranks says")
    if config.parallel.schedule not in TORCH_SCHEDULES:
        raise ConfigError(
            f"parallel.schedule {config.parallel.schedule}: torch is compared in {', '.join(TORCH_SCHEDULES)}"
        )
    if config.precision.dtype != "fp32":
        raise ConfigError(f"precision.dtype {config.precision.dtype}: torch's pipeline is compared in fp32")


def _engine_flags(flags: Sequence[str], stage: Sequence[str]) -> list[str]:
    """Those given, `stage` unless they give one, and no clipping."""
    given = any(flag.startswith("--parallel.zero_stage") for flag in flags)
    return [*flags, *(() if given else stage), "--optimizer.clip_grad", "0"]


def take_turns(running: Sequence[Running], rounds: int) -> dict[str, Record]:
    """One step of each program per round, the others blocked meanwhile; the first WARMUP rounds are extra."""
    records = {one.program.name: Record() for one in running}
    for number in range(WARMUP + rounds):
        for one in running:
            records[one.program.name].add(one.ask({"step": number}))
    return records


def _peak(
    options: Options, config: Config, folder: Path, name: str, task: Task, *, system_malloc: bool | None = None
) -> int:
    """Bytes above imports that the largest rank of a program takes in a few steps, on its own."""
    against = [] if name == "vitruvius" else [name]
    malloc = options.system_malloc if system_malloc is None else system_malloc
    options = replace(options, against=against, system_malloc=malloc)
    with started(_programs(options, config, task)[-1:], folder) as running:
        return take_turns(running, 1)[name].above_imports


# -- what the programs are given ---------------------------------------------------------------------------------------


def _programs(options: Options, config: Config, task: Task) -> list[Program]:
    """The engine, the peers asked for; beside shards, without a limit, one eager process with all threads."""
    threads = max(1, len(os.sched_getaffinity(0)) // options.ranks)
    stages = pipeline_settings(config, options.ranks) if config.grid_shape(options.ranks).pipeline > 1 else {}
    alone = {} if stages or options.memory_limit is not None else {"eager": Peer("eager")}
    peers = {"vitruvius": Peer("vitruvius"), **alone, **{name: PEERS[name] for name in options.against}}
    return [
        Program(
            name=name,
            interpreter=_interpreter(name, peer, options),
            module="tools.benchmark.peer_programs",
            ranks=1 if name == "eager" else options.ranks,
            threads=threads * options.ranks if name == "eager" else threads,
            task=asdict(
                replace(
                    task, program=peer.program, settings={**peer.settings, **stages}, dtype=peer.dtype or task.dtype
                )
            ),
            environment=_environment(peer, options),
        )
        for name, peer in peers.items()
    ]


def _interpreter(name: str, peer: Peer, options: Options) -> str:
    if not peer.own_environment:
        return sys.executable
    if not options.peers_python.exists():
        raise ConfigError(f"{name} needs an environment of its own, {options.peers_python}: run `make peers`")
    return str(options.peers_python)


def _environment(peer: Peer, options: Options) -> dict[str, str]:
    """DeepSpeed is told to use the CPU; it finds ninja beside its interpreter, and keeps there what it compiles."""
    allocator = {} if options.system_malloc else ALLOCATOR
    if not peer.own_environment:
        return allocator
    here = options.peers_python.absolute().parent
    path, extensions = f"{here}:{os.environ.get('PATH', os.defpath)}", here.parent / "torch_extensions"
    for lock in extensions.glob("*/lock"):  # left by a run that was killed, it would be waited for without end
        lock.unlink()
    return {**allocator, "DS_ACCELERATOR": "cpu", "PATH": path, "TORCH_EXTENSIONS_DIR": str(extensions)}


# -- what is reported --------------------------------------------------------------------------------------------------


def _kind(config: Config, program: Program) -> str:
    in_stages = config.grid_shape(program.ranks).pipeline > 1
    return config.parallel.schedule if in_stages else f"ZeRO-{config.parallel.zero_stage}"


def _losses(number: int, records: Mapping[str, Record]) -> Row:
    return {"step": number, **{f"loss_{name}": f"{record.losses[number]:.6f}" for name, record in records.items()}}


def _row(config: Config, program: Program, records: Mapping[str, Record]) -> Row:
    """time_over_vitruvius is the median over rounds of this program's time over ours: above 1, ours is faster."""
    ours, record = records["vitruvius"], records[program.name]
    times = record.seconds[WARMUP:]
    ratios = [a / b for a, b in zip(times, ours.seconds[WARMUP:], strict=True)]
    low, high = quartiles(ratios)
    images = config.train.global_batch_size
    return {
        "model": config.model.preset or f"{config.model.width}x{config.model.depth}",
        "program": f"vitruvius ({_kind(config, program)})" if record is ours else program.name,
        "ranks": program.ranks,
        "threads_per_rank": program.threads,
        "global_batch": images,
        "dtype": program.task["dtype"],
        "matmul": program.task["matmul"],
        "step_time_ms": 1000 * statistics.median(times),
        "images_per_second": images / statistics.median(times),
        "time_over_vitruvius": statistics.median(ratios),
        "lower_quartile": low,
        "upper_quartile": high,
        "cpu_time_ms_per_rank": 1000 * statistics.median(record.cpu[WARMUP:]),
        "peak_memory_MiB_per_rank": record.peak / _MIB,
        "imports_MiB_per_rank": record.imports / _MIB,
        "above_imports_MiB_per_rank": record.above_imports / _MIB,
        "cpu_share_while_waiting": record.idle,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(record.losses, ours.losses, strict=True)),
    }
