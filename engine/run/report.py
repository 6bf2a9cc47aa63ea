"""The start-up report: what is really applied in this run, gathered from the objects that apply it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

import torch

from engine.assembly import Assembly
from engine.device import describe
from engine.plan import states
from engine.run.decode_sharing import shared_by
from engine.run.recomputed import recompute_lines
from model import ModelConfig, Tower
from model.kernels import Kernels
from parallel import comm
from parallel.fp8 import fp8_means
from parallel.pipeline.actions import peak_activations, recomputed_ahead
from parallel.sharding.units import Unit

_WHEN = {"step": "once per step", "micro_batch": "after each micro-batch"}


def startup_report(assembly: Assembly, *, threads: int, matmul: str, images: Sequence[str]) -> list[str]:
    """Lines for the console. Collective: stages report their own buckets.

    Args:
        threads: per rank. matmul: library of fp32 matrix products on a CPU. images: lines about the data.
    """
    held = {number: _held(units) for number, units in zip(assembly.stages, assembly.store.stages, strict=True)}
    memory = states(assembly) | {"messages": assembly.post.nbytes}
    ranks = comm.gather_objects((held, memory), assembly.grid.pipeline)
    on_cpu = f", fp32 matrix products by {matmul}" if assembly.device.type == "cpu" else ""
    return [
        f"Vitruvius: torch {torch.__version__}, Python {platform.python_version()}, {describe(assembly.device)}, "
        f"{threads} thread(s) per rank{on_cpu}",
        _grid_line(assembly),
        *_model_lines(assembly),
        *images,
        *_batch_lines(assembly),
        *_pipeline_lines(assembly),
        *Kernels(assembly.config.kernels).describe(assembly.device),
        *_stage_lines(assembly, {number: held for stages, _ in ranks for number, held in stages.items()}),
        *recompute_lines(assembly),
        *_precision_lines(assembly),
        _optimizer_line(assembly),
        _sharding_line(assembly),
        _memory_line([memory for _, memory in ranks]),
    ]


def _held(units: Sequence[Unit]) -> tuple[int, int]:
    """(parameters, buckets) of a stage on this rank."""
    buckets = [bucket for unit in units for bucket in unit.buckets]
    return sum(slot.numel for bucket in buckets for slot in bucket.slots), len(buckets)


def _grid_line(a: Assembly) -> str:
    shape = a.grid.shape
    rows = "split by rows" if a.build.tp.splits_rows else "whole"
    return (
        f"grid: pipeline {shape.pipeline} x data {shape.data} x context {shape.context} x tensor {shape.tensor} "
        f"= {shape.world_size} rank(s); activations between linears {rows}"
    )


def _model_lines(a: Assembly) -> Iterator[str]:
    stored = {layer.tower.name for layer in a.layers if layer.tower and "outputs" in layer.reads}
    for tower in dict.fromkeys(layer.tower for layer in a.layers if not layer.joins):
        if tower is not None and tower.name in stored:
            yield f"{tower.name}: no layers but features, which are read from the disk"
        else:
            yield from _tower_lines(a.config.model if tower is None else tower.config, tower)
    parameters, of = sum(layer.parameters for layer in a.layers), "pair" if a.layers[-1].joins else "image"
    if (views := a.layers[-1].per_sample) > 1:
        of = "sample, in two views" + (f" and {views - 2} local crops" if views > 2 else "")
    yield f"size: {parameters:,} parameters, {a.training_flops / 1e9:.3f} GFLOP per {of}, forward and backward"
    if taught := [layer for layer in a.layers if layer.is_frozen and "outputs" not in layer.reads]:
        flops, count = sum(layer.flops for layer in taught), sum(layer.parameters for layer in taught)
        yield f"  of that taught by: {count:,} parameters, {flops / 1e9:.3f} GFLOP, forward alone"
    if a.frozen.names:
        front = f"; nothing goes backward through the first {a.frozen.front} layer(s)" if a.frozen.front else ""
        yield f"  frozen: {a.frozen.count:,} parameters, {len(a.frozen.names)} tensor(s){front}"


def _tower_lines(model: ModelConfig, tower: Tower | None) -> Iterator[str]:
    sizes, of_text = model.sizes, tower is not None and not tower.shares_tokens
    form = f"{model.block} blocks, {model.norm}, {model.mlp}"
    if of_text:
        yield f"{tower.name if tower else ''} tower: {form}; texts of {sizes.tokens} tokens"
    else:
        yield (
            f"{'model' if tower is None else f'{tower.name} tower'}: {form}, position {model.position}, "
            f"pool {model.pool}; "
            f"images {sizes.channels} x {sizes.image[0]} x {sizes.image[1]}, {sizes.prefix} prefix token(s)"
        )
    for stage in sizes.stages:
        name = f"  stage {stage.index} of the pyramid" if model.stages else "  blocks"
        if not stage.depth:
            yield f"{name}: no blocks; tokens are projected to width {stage.width} for the head"
            continue
        kinds = ", ".join(f"{kind} x {len(list(run))}" for kind, run in groupby(stage.kinds))
        patches = "" if of_text else f"{stage.rows} x {stage.cols} patches; "
        yield (
            f"{name}: depth {stage.depth}, width {stage.width}, heads {stage.heads}, mlp {stage.mlp}; "
            f"{patches}attention {kinds}"
        )


def _batch_lines(a: Assembly) -> Iterator[str]:
    train, data = a.config.train, a.grid.shape.data
    count = a.config.num_micro_batches(a.grid.shape)
    yield (
        f"batch: {train.global_batch_size} images = {data} data rank(s) x {count} micro-batch(es) "
        f"x {train.micro_batch_size}"
    )
    if ranks := shared_by(a.config, a.grid.shape):
        yield f"  decoding: each of {ranks} ranks that see the same images decodes a part of each micro-batch"
    if (line := a.objective.describe()) is not None:
        yield line


def _pipeline_lines(a: Assembly) -> Iterator[str]:
    if a.grid.pipeline.size == 1:
        return
    held = [len(a.placement.on(rank)) for rank in range(a.grid.pipeline.size)]
    alive = [f"{peak:.3g}" for peak in peak_activations(a.schedule)]
    yield (
        f"pipeline: {a.schedule.name}, {a.policy}, {_span([str(n) for n in held])} stage(s) per rank; bubble "
        f"{100 * a.predicted.bubble_fraction:.1f} % predicted (times by FLOPs, messages free); micro-batches alive per "
        f"rank {_span(alive)}; messages by {a.post.carrier}"
    )
    if a.schedule.recomputes:
        most = [f"{max(recomputed_ahead(program), default=0)}" for program in a.schedule.ranks]
        yield (
            f"  recompute: {len(a.schedule.recomputes)} of {len(a.placement.layers) * a.schedule.num_micro_batches} "
            f"backwards of stages find it done while their rank waited; {_span(most)} at a time per rank"
        )


def _span(values: Sequence[str]) -> str:
    """Of each rank: one number if they are alike, all of a few, the least and the most of many."""
    if len(set(values)) == 1:
        return values[0]
    few = len(values) <= 8
    return ", ".join(values) if few else f"{min(values, key=float)} to {max(values, key=float)}"


def _stage_lines(a: Assembly, held: Mapping[int, tuple[int, int]]) -> Iterator[str]:
    several = a.placement.last + 1 > a.grid.pipeline.size
    costs = [layer.flops * n for layer, n in zip(a.layers, a.frozen.passes, strict=True)]
    for index, stage in enumerate(a.placement.layers):
        parameters, buckets = held[index]
        where = f" on pipeline rank {a.placement.ranks[index]}" if several else ""
        first, last = (a.layers[i].name for i in (stage.start, stage.stop - 1))
        share = sum(costs[i] for i in stage) / sum(costs)
        yield (
            f"stage {index}{where}: {len(stage)} layer(s), {first if len(stage) == 1 else f'{first} to {last}'}, "
            f"{100 * share:.1f} % of the FLOPs; {parameters:,} parameters per rank "
            f"in {buckets} bucket(s)"
        )


def _precision_lines(a: Assembly) -> Iterator[str]:
    p, kept = a.config.precision, a.build.precision
    high = sorted(kept.high) + ["all norms"] * kept.norms_in_fp32
    yield f"precision: {p.dtype}" + (f"; in fp32: {', '.join(high)}" if high else "") + "; losses and sums in fp32"
    if a.scaler is not None:
        yield (
            f"  loss scale {a.scaler.scale:g}, at least {a.scaler.minimum:g}, doubled after {a.scaler.window} steps, "
            f"halved from overflow {a.scaler.hysteresis} on"
        )
    if a.fp8 is not None:
        blocks = sum(layer.kind == "blocks" and not layer.is_frozen for layer in a.layers)
        yield f"  fp8: {a.fp8.describe()}; {len(kept.fp8)} of {blocks} blocks"
    if kept.fp8_rows:
        yield (
            f"  fp8 of teachers: {len(kept.fp8_rows)} block(s), e4m3, a scale for each token and output feature; "
            f"native, {fp8_means(a.device)} on {a.device}"
        )


def _optimizer_line(a: Assembly) -> str:
    o = a.config.optimizer
    by_layer = f", learning rate by layer x {o.layer_decay:g}" if o.layer_decay != 1 else ""
    average = f"; average of the weights, decay {o.ema_decay:g}" if o.ema_decay is not None else ""
    return f"optimizer: {o.name}{by_layer}{average}"


def _sharding_line(a: Assembly) -> str:
    policy, buckets = a.store.policy, a.store.buckets
    ranks = a.grid.along("data", "context").size
    if not any(bucket.stage for bucket in buckets):
        asked = f" (ZeRO stage {policy.stage} has no effect on one rank)" if policy.stage and ranks == 1 else ""
        return f"sharding: none{asked}; {len(a.store.units)} unit(s), gradients summed {_WHEN[policy.reduce]}"
    line = (
        f"sharding: ZeRO stage {policy.stage} over {ranks} rank(s); {len(a.store.units)} unit(s), gradients summed "
        f"{_WHEN[policy.reduce]}"
    )
    if a.store.gatherer.buffers:
        count = len(a.store.gatherer.buffers)
        line += ", weights gathered " + (
            "and kept until the update" if a.store.gatherer.keeps_all else f"{count} at once"
        )
    return line


def _memory_line(ranks: Sequence[Mapping[str, int]]) -> str:
    largest = max(ranks, key=lambda held: sum(held.values()))
    parts = ", ".join(f"{what} {size / 2**20:.1f}" for what, size in largest.items() if size)
    return f"memory on the largest rank, activations apart: {sum(largest.values()) / 2**20:.1f} MiB ({parts})"
