"""`python -m tools.teacher_outputs --config FILE --out FOLDER`: what a teacher makes of the images of a student's run.

In one process, or as many as a layout wants: `python -m tools.launch --nproc-per-node 4 -m tools.teacher_outputs ...
--parallel.tensor_parallel_size 2`, torchrun or srun. The same command goes on where it was ended, in any layout.

Exit codes: 0 done, 2 it cannot be done so.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.assemble import assemble, grid_of
from engine.assembly import Assembly
from engine.config.classes import ClassOrder, class_order
from engine.config.stored import meta_of, with_later_keys
from engine.config.teachers import found_of
from engine.device import describe, memory_share, prepare_cpu, set_matmul
from engine.errors import EXIT_DONE, ConfigError
from engine.precision.precision import check_format
from engine.run.agreement import check_agreement, facts_of
from engine.run.device import device_of
from engine.run.launch import run_rank
from engine.run.run_dir import RunDir, prepare_folder
from engine.run.teachers import load_teacher
from engine.run.trainer import total_steps
from engine.teacher_outputs.meta import FILE, PARTS, Meta, Part, read_meta
from engine.teacher_outputs.shards import begin, has_rows, missing, write_rows
from model import Build, build_teacher
from model.heads import pooled_features
from parallel import comm, process_group
from parallel.grid import Grid, world_axis
from parallel.process_group import World
from tools.evaluate.images import Images, images_of
from tools.evaluate.source import Forward
from tools.teacher_outputs.options import FILE_BYTES, PROGRAM, ROWS_PER_FILE, Request, request_of
from tools.teacher_outputs.writing import Teaching


def main(argv: Sequence[str], world: World) -> int:
    """Write what is missing. Returns the exit code. All that can be refused is, before ranks talk.

    Raises:
        ConfigError: there can be no such outputs, or the folder has others.
    """
    request = request_of(argv, world)
    config, out = request.config, request.options.out
    device = device_of(config, world)
    check_format(f"the dtype of the teacher {request.given.path}", request.given.dtype or "fp32", device)
    classes = request.run.model.sizes.classes
    images, found = images_of(request.run, world, classes), found_of(request.given)
    order = class_order(str(found.path), found.labels, images.train.class_names, classes)
    meta = _meta(request, images, order)

    prepare_cpu(world)
    set_matmul(config.precision, device)
    process_group.start(world, device, config.parallel.timeout)
    facts = {"teacher": meta.teacher, "outputs": meta.fingerprint, "rows": str(meta.rows)}
    check_agreement(facts | facts_of(config, device, images.train, images.test), world_axis(world))
    grid = grid_of(config, world, device)
    lock = RunDir(out, grid.world, key="--out")
    if order.note and grid.world.index == 0:
        print(order.note, flush=True)
    with torch.no_grad():
        assembly = _assembled(request, order, grid, device, world)
        _write(request, meta, images, assembly, lock)
    lock.close()
    comm.barrier(grid.world)  # a rank that has ended has its launcher end the others
    process_group.stop()
    return EXIT_DONE


def _meta(request: Request, images: Images, order: ClassOrder) -> Meta:
    """Of the folder, with as many rows as any run has asked for so far.

    Args:
        order: of the teacher's classes, in which rows have them.

    Raises:
        ConfigError: it has outputs of something else, or cannot be written to.
    """
    options, run = request.options, request.run
    draws = total_steps(run, len(images.train)) * run.train.global_batch_size
    features = pooled_features(Build(config=request.teacher.model)) if options.features else 0
    weights = found_of(request.given).fingerprint + order.fingerprint
    meta = meta_of(
        run, request.teacher, weights, (images.train, images.test),
        kept=options.top_k, features=features, rows=draws, number_format=options.number_format,
        rows_per_file=options.rows_per_file or ROWS_PER_FILE, blocks=options.blocks,
    )  # fmt: skip
    if options.rows_per_file is None:
        meta = replace(meta, rows_per_file=max(1, min(ROWS_PER_FILE, FILE_BYTES // meta.row.itemsize)))
    return _joined(meta, prepare_folder(options.out, "--out"))


def _joined(meta: Meta, out: Path) -> Meta:
    """With the rows that are there. Raises ConfigError if they are, or may be, of something else."""
    if not (out / FILE).exists():
        if has_rows(out):
            raise ConfigError(f"--out {out} has rows, and no {FILE} that says of what: give another, or delete them")
        return meta
    there = read_meta(out)
    if differ := meta.differences(with_later_keys(there, meta.images)):
        raise ConfigError(
            f"--out {out} has outputs of something else: {'; '.join(differ)}. Give another folder, or what these are of"
        )
    return replace(there, rows=max(meta.rows, there.rows))


def _assembled(request: Request, order: ClassOrder, grid: Grid, device: torch.device, world: World) -> Assembly:
    """The teacher on this rank, his classes in the data's order. Collective."""
    config, teacher = request.config, request.teacher
    layers = build_teacher(
        teacher, request.run.model.sizes.image, pooled=request.options.features, blocks=request.options.blocks
    )
    objective = Forward(tuple(layers))
    assembly = assemble(config, grid, device, objective, device_memory=memory_share(device, world))
    load_teacher(assembly, teacher, request.given, order.places)
    return assembly


def _write(request: Request, meta: Meta, images: Images, assembly: Assembly, lock: RunDir) -> None:
    """All files that are missing, by the first rank. Collective.

    Raises:
        ConfigError: on every rank: the folder has got other outputs meanwhile.
    """
    grid, out = assembly.grid, lock.path
    wanted, problem = list[tuple[Part, range]](), ""
    if grid.world.index == 0:
        try:
            meta = _joined(meta, out)  # others may have written before the folder was ours alone
            begin(out, meta)
            wanted = [(part, rows) for part in PARTS for rows in missing(out, meta, part)]
            print(_introduction(request, meta, grid, assembly.device, len(wanted)), flush=True)
        except ConfigError as error:
            problem = str(error)
    wanted, problem = comm.gather_objects((wanted, problem), grid.world)[0]
    if problem:
        raise ConfigError(problem)
    teaching, began, done = Teaching(assembly, meta, (images.train, images.test), request.run.train.seed), 0.0, 0
    for part, span in wanted:
        began = began or time.perf_counter()
        rows = teaching.rows(part, span)
        done += len(span)
        if grid.world.index == 0:
            path = write_rows(out, part, span.start, rows)
            rate = done / (time.perf_counter() - began)
            print(f"  {path.name}: {path.stat().st_size / 1e6:.1f} MB, {rate:.0f} images/s", flush=True)
    if grid.world.index == 0:
        print(f"give it as the teacher: --distillation.teacher {out}", flush=True)


def _introduction(request: Request, meta: Meta, grid: Grid, device: torch.device, files: int) -> str:
    kept = ("all" if meta.keeps_all else f"{meta.kept} of") + f" {meta.classes} classes"
    kept += f" and {meta.features} features" * (meta.features > 0)
    kept += "".join(f", {name} of {patches} patches" for name, (patches, _) in meta.blocks.items())
    size = (meta.rows + meta.held_out_rows) * meta.row.itemsize / 1e6
    layout = " x ".join(f"{axis} {size}" for axis, size in grid.shape.__dict__.items())
    found = found_of(request.given)
    return "\n".join([
        f"teacher     {found.path} ({meta.teacher}), {meta.shown['dtype']}",
        f"layout      {layout}; {describe(device)}",
        f"outputs     {kept} of {meta.rows} {meta.key}s and {meta.held_out_rows} held-out "
        f"images, {size:.1f} MB in all; {files} file(s) to be written",
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], PROGRAM))
