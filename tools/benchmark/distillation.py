r"""`python -m tools.benchmark distillation`: a step with teachers against one of the student alone and their forwards.

The three take turns in one process group: what counts is the median of the ratios of neighbours. The options are those
of pretrain_vit.py, with objective distillation; --teacher KEYS writes a teacher of random weights first, of the
student's model with these keys:

    python -m tools.benchmark distillation --data.kind synthetic --model.preset vit_ti16 --model.image_size 64 \
        --model.num_classes 100 --train.global_batch_size 16 --train.micro_batch_size 8 \
        --teacher '{width: 384, depth: 12, num_heads: 6, mlp_dim: 1536}'

`teacher_MiB` are bytes of their weights on a rank, `share_MiB` what an even share of them would be: over tensor ranks
and, at ZeRO stage 3, over data and context ranks, each with what it holds of the pipeline.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

import yaml

from engine.assemble import assemble
from engine.assembly import Assembly
from engine.config import Config
from engine.config.distillation import DistillationConfig
from engine.config.teachers import teachers_of
from engine.errors import ConfigError
from engine.plan import states
from engine.run.step import Stepper
from model import VisionTransformer, student_layers
from model.formats.checkpoint import model_of
from parallel import comm
from parallel.process_group import World
from tools.benchmark.bench import Bench, read_config, seconds, started
from tools.benchmark.table import Row, show
from tools.options import COUNT, add_json, number


def main(argv: Sequence[str], world: World) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="tools.benchmark distillation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=number(COUNT), default=7, help="measured, after one that warms up (default 7)")
    parser.add_argument("--teacher", help="keys of the model, in YAML, of a teacher of random weights")
    add_json(parser)
    options, flags = parser.parse_known_args(argv)
    config = read_config([*flags, "--objective", "distillation"])
    if options.teacher is not None:
        config = replace(config, distillation=_taught(config, options.teacher))
    _check_images(config.resolve(world.size))
    with started(config, world) as bench:
        row = measure(bench, options.rounds)
        if world.rank == 0:
            show([row], options.json)


def measure(bench: Bench, rounds: int) -> Row:
    """Collective."""
    a, batches = bench.assembly, bench.batches[0]
    alone = replace(bench.config, objective="supervised", distillation=DistillationConfig())
    both, student = Stepper(a), Stepper(assemble(alone, a.grid, a.device))
    teachers = [assemble(replace(alone, model=of.model), a.grid, a.device) for of in teachers_of(bench.config)]
    runs: list[Callable[[], object]] = [
        lambda: both.train_step(batches, 1e-4),
        lambda: student.train_step(batches, 1e-4),
        lambda: _forwards(teachers, bench),
    ]
    times = [[seconds(run, bench.device) for run in runs] for _ in range(rounds + 1)][1:]
    step, own, theirs = (statistics.median(each) for each in zip(*times, strict=True))
    held = sum(comm.gather_objects(states(a).get("teacher", 0), a.grid.world)) / a.grid.shape.world_size
    return {
        "grid_p_d_c_t": "x".join(map(str, a.grid.shape.sizes)),
        "zero": bench.config.parallel.zero_stage,
        "student_parameters": sum(layer.parameters for layer in student_layers(a.layers)),
        "teacher_parameters": sum(layer.parameters for layer in a.layers if layer.is_frozen),
        "step_ms": 1000 * step,
        "student_step_ms": 1000 * own,
        "teacher_forward_ms": 1000 * theirs,
        "ratio": statistics.median(whole / (one + other) for whole, one, other in times),
        "teacher_MiB": held / 2**20,
        "share_MiB": _share(a) / 2**20,
    }


def _forwards(teachers: Sequence[Assembly], bench: Bench) -> None:
    for a in teachers:
        micro_batches = [a.to_device(batch, training=False) for batch in bench.batches[0]]
        a.forwards(len(micro_batches)).run(micro_batches, lambda outputs, batch: outputs[0])


def _share(a: Assembly) -> float:
    """Bytes of an even share of the teachers' weights, mean over ranks."""
    numbers = sum(
        layer.parameters * a.build.precision.of_weight(f"{layer.name}.weight").itemsize
        for layer in a.layers
        if layer.is_frozen
    )
    shape = a.grid.shape
    copies = 1 if a.config.parallel.zero_stage == 3 else shape.data * shape.context
    return numbers * copies / shape.world_size


def _check_images(config: Config) -> None:
    """Raise ConfigError where a teacher is shown other images than the student, which its forwards alone are given."""
    size = config.model.sizes.image
    for teacher in teachers_of(config):
        if teacher.model.sizes.image != size:
            raise ConfigError(
                f"the {teacher.name} is shown images of {teacher.model.sizes.image} and the student of {size}, but "
                "here both are timed on the same ones: set model.image_size or distillation.teacher_image_size (of "
                "several teachers the image_size of each) so that they are alike"
            )


def _taught(config: Config, keys: str) -> DistillationConfig:
    """With a teacher of random weights, written once for all ranks of a host."""
    own = {name: value for name, value in asdict(config.model.resolve()).items() if name not in ("preset", "head_bias")}
    try:
        model = model_of(own | yaml.safe_load(keys))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--teacher {keys}: {error}") from error
    name = blake2b(repr(model).encode(), digest_size=8).hexdigest()
    path = Path(tempfile.gettempdir()) / f"vitruvius-teachers-{os.getuid()}" / f"random-{name}"
    while not path.exists():
        try:
            VisionTransformer(model).save_pretrained(path)
        except ValueError as error:  # another rank is at it
            if "being written" not in str(error) and not path.exists():
                raise ConfigError(f"--teacher: {error}") from error
    return replace(config.distillation, teacher=str(path))
