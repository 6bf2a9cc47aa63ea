"""The start-up report: what is really applied in this run, gathered from the objects that apply it."""

from __future__ import annotations

import platform

import torch

from engine.assemble import Assembly
from engine.device import describe
from model import training_flops
from parallel import comm


def startup_report(assembly: Assembly, *, threads: int, matmul: str, train_images: int, eval_images: int) -> list[str]:
    """Lines for the console. Collective: stages report their own buckets."""
    a, config = assembly, assembly.config
    shape, sizes = a.grid.shape, config.model.sizes
    own = {"parameters": sum(p.numel() for p in a.module.parameters()), "buckets": len(a.gradients.buckets)}
    all_ranks = comm.gather_objects(own, a.grid.pipeline)
    parameters = sum(layer.parameters for layer in a.layers)
    flops = training_flops(a.layers)
    micro, count = config.train.micro_batch_size, config.num_micro_batches(shape)
    rows = "split by rows" if a.tp.splits_rows else "whole"
    lines = [
        f"Vitruvius: torch {torch.__version__}, Python {platform.python_version()}, {describe(a.device)}, "
        f"{threads} thread(s) per rank"
        + (f", fp32 matrix products by {matmul}" if a.device.type == "cpu" else ""),
        f"grid: pipeline {shape.pipeline} x data {shape.data} x context {shape.context} x tensor {shape.tensor} "
        f"= {shape.world_size} rank(s); activations between linears {rows}",
        f"model: {config.model.block} blocks, width {sizes.width}, depth {sizes.depth}, heads {sizes.heads}, mlp {sizes.mlp}, "
        f"{sizes.tokens} tokens, position {config.model.position}, pool {config.model.pool}; "
        f"{parameters:,} parameters, {flops / 1e9:.3f} GFLOP per image and step",
        f"data: {config.data.kind}, {train_images} training and {eval_images} held-out images of "
        f"{sizes.channels} x {sizes.image} x {sizes.image}",
        f"batch: {config.train.global_batch_size} images = {shape.data} data rank(s) x {count} micro-batch(es) x {micro}; "
        f"schedule {a.schedule.name}",
    ]  # fmt: skip
    total = sum(layer.flops for layer in a.layers)
    for index, (stage, report) in enumerate(zip(a.stages, all_ranks, strict=True)):
        names = [a.layers[i].name for i in (stage.start, stage.stop - 1)]
        share = sum(a.layers[i].flops for i in stage) / total
        span = names[0] if len(stage) == 1 else f"{names[0]} .. {names[1]}"
        lines.append(
            f"stage {index}: {len(stage)} layer(s), {span}, {100 * share:.1f} % of the FLOPs; "
            f"{report['parameters']:,} parameters per rank in {report['buckets']} bucket(s)"
        )
    predicted = max(report["parameters"] for report in all_ranks) * 16
    lines.append(
        f"precision: {config.precision.dtype}; optimizer {config.optimizer.name}, fused: weights, gradients and two moments "
        f"{predicted / 2**20:.1f} MiB on the largest rank, activations apart"
    )
    return lines
