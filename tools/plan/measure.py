"""`python -m tools.plan --measure --out configs/clusters/this.yaml`: a cluster file of the machine at hand.

A rank on each core or GPU (or --nproc-per-node of them) measures products, attention and passes over memory in each
format, all at once, as in a run, and then collectives and messages as the engine moves data; medians over rounds in
which everything takes its turn. It takes a minute or two. More nodes than one, and links between them, are added to the
file by hand: `between_nodes` is measured over TCP within this host.

Started by tools.launch it measures with the ranks that there are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from engine.clusters import read_cluster
from engine.device import choose_device, peak_tflops, prepare_cpu, processor, set_matmul
from engine.device import memory_share as memory_of
from engine.precision.config import PrecisionConfig
from parallel import comm, process_group
from parallel.grid import world_axis
from parallel.process_group import World
from tools.options import COUNT, number
from tools.places import check_place
from tools.plan.rates import measure_device
from tools.plan.wires import measure_links


def main(argv: Sequence[str], world: World) -> int:
    """Measure, and write the file; returns the exit code.

    Raises:
        ConfigError: the file cannot be written.
    """
    parser = argparse.ArgumentParser(prog="tools.plan --measure", description=__doc__)
    parser.add_argument("--measure", action="store_true", required=True)
    parser.add_argument("--out", type=Path, required=True, help="the cluster file to write")
    parser.add_argument("--nproc-per-node", type=number(COUNT), help="ranks (default: a GPU or a core each)")
    parser.add_argument("--rounds", type=number(COUNT), default=7, help="of each measurement")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    check_place(options.out)
    if "WORLD_SIZE" not in os.environ:
        return _launched(options, argv)
    device = choose_device(options.device, world)
    threads = prepare_cpu(world) if device.type == "cpu" else 1
    library = set_matmul(PrecisionConfig(), device)
    process_group.start(world, device, 600.0)
    try:
        found = describe(world, device, options.rounds)
        found["name"] = f"{world.size} of {processor(device)}" + f", {threads} thread(s) each" * (device.type == "cpu")
        if world.rank == 0:
            write(options.out, found, f"measured, products by {library}, {options.rounds} rounds")
    finally:
        process_group.stop()
    return 0


def _launched(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """The same with a rank on each core or GPU."""
    cuda = options.device != "cpu" and torch.cuda.is_available()
    ranks = options.nproc_per_node or (torch.cuda.device_count() if cuda else len(os.sched_getaffinity(0)))
    launch = [sys.executable, "-m", "tools.launch", "--nproc-per-node", str(ranks), "-m", "tools.plan"]
    return subprocess.run([*launch, *argv], check=False).returncode


def describe(world: World, device: torch.device, rounds: int) -> dict[str, Any]:
    """The fields of a cluster file, but for sources. Collective."""
    axis = world_axis(world)
    comm.barrier(axis)
    own = measure_device(device, rounds)
    every = comm.gather_objects(own, axis)
    found = _median(every)
    peak = {
        name: max(rate for curve in rates.values() for _, rate in curve) for name, rates in found["products"].items()
    }
    return {
        "name": "",
        "device_type": device.type,
        "nodes": 1,
        "devices_per_node": world.size,
        "memory": {"gb": memory_of(device, world) / 1e9},
        "peak": {"tflops": {name: peak_tflops(device, name) or rate for name, rate in peak.items()}},
        "products": {"rates": found["products"]},
        "attention": {"rates": found["attention"]},
        "passes": {"rates": found["passes"]},
        "launch": {"microseconds": found["launch"] * 1e6},
        **measure_links(world, device, rounds),
        "host": {"gb_per_second": found["host"]},
    }


def _median(values: Sequence[Any]) -> Any:
    """Of numbers in the same places."""
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_median(parts) for parts in zip(*values, strict=True)]
    return statistics.median(values)


def write(file: Path, found: dict[str, Any], source: str) -> None:
    """As a file that is read again."""
    for name, group in found.items():
        if isinstance(group, dict):
            group["source"] = f"{source}, over TCP within this host" if name == "between_nodes" else source
    text = yaml.safe_dump(_rounded(found), sort_keys=False, width=118, default_flow_style=None)
    file.write_text(f"# Written by python -m tools.plan --measure\n{text}")
    print(f"{file}: {read_cluster(str(file)).name}")


def _rounded(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
