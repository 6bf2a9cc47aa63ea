"""Predictions beside measurements, for `python -m tools.benchmark predictions`: rows of a table, what they come to."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from engine.clusters import Cluster
from engine.config import Config, RecomputeConfig
from engine.plan import MemoryPlan, plan_memory
from engine.step_time import predict_step
from parallel.grid import GridShape
from parallel.pipeline import Timeline
from tools.benchmark.draws import Draw
from tools.benchmark.prediction_ranks import PROBE
from tools.benchmark.table import Row

_MIB = 2**20
_SHARED = "shared memory"
"""What a plan calls the memory through which ranks of a host talk; where it does not count it, neither do we."""


def row(one: Draw, lines: Mapping[str, Row], cluster: Cluster | None) -> Row:
    """Of a configuration: the rank whose peak is predicted worst, and the time of a step; None where it is not known.

    Args:
        lines: measurements by their kind. cluster: of the machine where times were measured.
    """
    return {**about(one), **_memory(one, lines.get("memory")), **_time(one, lines.get("time"), cluster)}


def about(one: Draw) -> Row:
    """What it is, in short."""
    config = one.config.resolve(one.ranks)
    shape, model, parallel, micro = config.grid_shape(one.ranks), config.model, config.parallel, config.train
    gathers = {"always": "3", "never": "3 never"}.get(parallel.reshard_after_forward, "")
    return {
        "draw": one.name,
        "grid_p_d_c_t": "x".join(map(str, shape.sizes)),
        "model": model.preset or f"{model.block} {model.width}x{model.depth} {one.keys['model.attention']}",
        "dtype": config.precision.dtype,
        "zero": gathers if parallel.zero_stage == 3 and gathers else str(parallel.zero_stage),
        "schedule": parallel.schedule if shape.pipeline > 1 else "-",
        "recompute": one.keys.get("recompute.policy", "none") if one.share is None else f"auto {one.share}",
        "micro_batches": f"{config.num_micro_batches(shape)} x {micro.micro_batch_size}",
    }


def _as_run(one: Draw, line: Row) -> tuple[Config, GridShape]:
    """The configuration, with the save sets that the run had, and its cut into stages."""
    config, found = one.config.resolve(one.ranks), line["ranks"][0]
    policy = found["policy"] if isinstance(found["policy"], str) else tuple(found["policy"])
    recompute = replace(config.recompute, policy=policy, memory_budget="auto", ahead=found["ahead"])
    counts = found["layers_per_stage"] and tuple(found["layers_per_stage"])
    parallel = replace(config.parallel, layers_per_stage=counts)
    return replace(config, recompute=recompute, parallel=parallel), config.grid_shape(one.ranks)


# -- memory ------------------------------------------------------------------------------------------------------------


def _memory(one: Draw, line: Row | None) -> Row:
    names = ("rank", "predicted_MiB", "measured_MiB", "memory_error_percent", "shared_MiB", "live_tensors_MiB")
    if line is None:
        return dict.fromkeys(names)
    config, shape = _as_run(one, line)
    plans = _plans(config, shape)
    worst = max(range(one.ranks), key=lambda rank: abs(error_of(plans[rank], line["ranks"][rank])))
    plan, found = plans[worst], line["ranks"][worst]
    return {
        "rank": worst,
        "predicted_MiB": plan.peak / _MIB,
        "measured_MiB": measured_bytes(plan, found) / _MIB,
        "memory_error_percent": 100 * error_of(plan, found),
        "shared_MiB": found["shared_bytes"] / _MIB,
        "live_tensors_MiB": found["tensor_bytes"] / _MIB,
    }


def _plans(config: Config, shape: GridShape) -> list[MemoryPlan]:
    """Of every rank."""
    ranks = shape.world_size
    host_share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks
    return [plan_memory(config, shape, rank, host_share, on_cpu=True) for rank in range(ranks)]


def budget_of(one: Draw) -> int:
    """Bytes that a rank of a draw with policy auto may take."""
    assert one.share is not None
    return budget_between(one.config.resolve(one.ranks), one.config.grid_shape(one.ranks), one.share)


def budget_between(config: Config, shape: GridShape, share: float) -> int:
    """What is planned for a rank of this resolved configuration with everything computed again, and a share of what is
    planned beyond that when all is kept.
    """
    of = (replace(config, recompute=RecomputeConfig(policy=policy)) for policy in ("full", "none"))
    low, high = (max(plan.peak for plan in _plans(one, shape)) for one in of)
    return int(low + share * (high - low))


def measured_bytes(plan: MemoryPlan, found: Row) -> int:
    """What a rank was measured to take, of what the plan counts."""
    peak: int = found["peak_bytes"]
    return peak if _SHARED in plan.states else peak - found["shared_bytes"]


def error_of(plan: MemoryPlan, found: Row) -> float:
    """Of the prediction, as a share of what was measured."""
    return plan.peak / measured_bytes(plan, found) - 1


# -- time --------------------------------------------------------------------------------------------------------------


def _time(one: Draw, line: Row | None, cluster: Cluster | None) -> Row:
    """Medians over steps, of the slowest rank. paced: as they would be if the machine were as fast as when its cluster
    file was measured. shares: whether there were more ranks than cores.
    """
    found: Row = dict.fromkeys(("predicted_seconds", "measured_seconds", "time_error_percent", "cpu_seconds"))
    found |= dict.fromkeys(("paced_seconds", "paced_error_percent", "shares"))
    if line is None:
        return found
    found |= {"measured_seconds": _slowest(line, "seconds"), "cpu_seconds": _slowest(line, "cpu_seconds")}
    if cluster is not None:
        config, shape = _as_run(one, line)
        found["predicted_seconds"] = seconds = predict_seconds(config, shape, cluster)
        found["time_error_percent"] = 100 * (seconds / found["measured_seconds"] - 1)
        found["shares"] = one.ranks > cluster.devices_per_node
        if all("probe_seconds" in rank for rank in line["ranks"]):
            found["paced_seconds"] = paced = _slowest(_at_pace_of(cluster, line), "seconds")
            found["paced_error_percent"] = 100 * (seconds / paced - 1)
    return found


def _at_pace_of(cluster: Cluster, line: Row) -> Row:
    """The seconds of all steps by what the probe took beside them in the median, and takes by the cluster file."""
    rows, inner, columns = PROBE
    usual = cluster.product("forward", rows, columns, inner, "fp32") - cluster.launch_seconds
    pace = usual / statistics.median(probe for rank in line["ranks"] for probe in rank["probe_seconds"])
    return {**line, "ranks": [{**rank, "seconds": [pace * each for each in rank["seconds"]]} for rank in line["ranks"]]}


def _slowest(line: Row, name: str) -> float:
    """The median over steps of the rank with the largest."""
    return float(max(statistics.median(rank[name]) for rank in line["ranks"]))


def together(first: Mapping[str, Row], again: Mapping[str, Row]) -> dict[str, Row]:
    """Measurements by kind, with the steps of both where times were measured twice with the same save sets."""
    if not ("time" in first and "time" in again) or _chosen(first["time"]) != _chosen(again["time"]):
        return dict(first)
    ranks = [
        {**a, **{name: [*a[name], *b[name]] for name in ("seconds", "cpu_seconds", "probe_seconds") if name in a}}
        for a, b in zip(first["time"]["ranks"], again["time"]["ranks"], strict=True)
    ]
    return {**first, "time": {**first["time"], "ranks": ranks}}


def _chosen(line: Row) -> list[Any]:
    return [(rank["policy"], rank["ahead"], rank["layers_per_stage"]) for rank in line["ranks"]]


def predict_seconds(config: Config, shape: GridShape, cluster: Cluster) -> float:
    """Of a step on one host of the cluster. Ranks beyond its devices share these: while more of them compute than there
    are devices, each is slowed alike.
    """
    devices, ranks = cluster.devices_per_node, shape.world_size
    step = predict_step(config, shape, replace(cluster, nodes=1, devices_per_node=max(devices, ranks)))
    return shared_seconds(step.timeline, ranks // shape.pipeline, devices)


def shared_seconds(timeline: Timeline, ranks: int, devices: int) -> float:
    """A step's seconds if each rank of the pipeline stands for `ranks` processes, and `devices` compute at a time."""
    changes = [(t, ranks) for starts in timeline.starts for t in starts]
    changes += [(t, -ranks) for ends in timeline.ends for t in ends]
    seconds, before, busy = 0.0, 0.0, 0
    for t, change in sorted(changes):
        seconds += (t - before) * max(1.0, busy / devices)
        before, busy = t, busy + change
    tail = timeline.step_time - timeline.makespan  # norm and optimizer, of all ranks at once
    return seconds + tail * max(1.0, len(timeline.starts) * ranks / devices)


# -- what it comes to --------------------------------------------------------------------------------------------------


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A line of memory, of time where each rank had a core, of all times, and of the first choice among rivals."""
    known = [row for row in rows if row["predicted_MiB"] is not None]
    if known:
        yield f"memory: {_errors(known, 'memory_error_percent')}"
    timed = [row for row in rows if row["predicted_seconds"] is not None]
    alone = [row for row in timed if not row["shares"]]
    for what, of in (("time, a core for each rank", alone), ("time, ranks share cores or not", timed)):
        if len(of) > 1 and (of is alone or len(of) > len(alone)):
            yield f"{what}: {_errors(of, 'time_error_percent')}, {_tau(of)}"
            if all(row.get("paced_seconds") for row in of):
                tau = _tau(of, "paced_seconds")
                yield f"  at the pace of the cluster file: {_errors(of, 'paced_error_percent')}, {tau}"
    rivals = [row for row in timed if row["draw"].startswith("rival")]
    for name, pace in (("measured_seconds", ""), ("paced_seconds", " (at the pace of the cluster file)")):
        if rivals and all(row.get(name) for row in rivals):
            first, best = (min(rivals, key=lambda row: row[key]) for key in ("predicted_seconds", name))
            yield (
                f"first choice{pace}: {first['draw']} of {len(rivals)} layouts, which takes "
                f"{first[name] / best[name]:.3f} of the time of the quickest, {best['draw']}"
                + (f"; {_tau(rivals, name)} among them" if len(rivals) > 1 else "")
            )


def repeated(known: Mapping[str, Mapping[str, Row]], again: Mapping[str, Mapping[str, Row]]) -> Iterator[str]:
    """A line of what one finds who predicts times by having measured them before."""
    rows = list[Row]()
    for name in known:
        if "time" in known[name] and "time" in again.get(name, {}):
            first, second = (_slowest(of[name]["time"], "seconds") for of in (known, again))
            error = 100 * (first / second - 1)
            rows.append({"predicted_seconds": first, "measured_seconds": second, "time_error_percent": error})
    if len(rows) > 1:
        yield f"times measured twice, the first as prediction: {_errors(rows, 'time_error_percent')}, {_tau(rows)}"


def _errors(rows: Sequence[Row], name: str) -> str:
    errors = [abs(row[name]) for row in rows]
    median, most = statistics.median(errors), max(errors)
    return f"{len(rows)} configurations, error {median:.1f} % in the median, {most:.1f} % at most"


def _tau(rows: Sequence[Row], measured: str = "measured_seconds") -> str:
    from scipy.stats import kendalltau  # takes a second

    pairs: list[Any] = [(row["predicted_seconds"], row[measured]) for row in rows]
    return f"Kendall's tau {kendalltau(*zip(*pairs, strict=True))[0]:.2f}"
