"""Opens lanes (`post`): decides what carries a pipeline's messages, here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from parallel import comm
from parallel.comm import Axis
from parallel.failures import MismatchError
from parallel.host_sharing import share
from parallel.messages import is_on_host, open_groups, open_on_host
from parallel.pipeline.boundary import Route, Specs, routes_between_ranks
from parallel.pipeline.group_lanes import GroupPost
from parallel.pipeline.host_lanes import HostPost, lanes_bytes
from parallel.pipeline.post import Lane, Post, Tensors

__all__ = ["Lane", "Post", "Tensors", "open_post"]


def open_post(
    stage_to_rank: Sequence[int], boundaries: Sequence[Specs], *, axis: Axis, device: torch.device, ready: bool = False
) -> Post:
    """The lanes of this rank. Collective over the world: all ranks open the same ones, in the same order.

    Lanes that are open along the axis already are given once more; those that were opened for `ready` serve both.

    Args:
        stage_to_rank: the rank of each stage along `axis`. boundaries: entry s describes the inputs of stage s.
        device: where tensors are. ready: whether `has_arrived` and `wait_any` will be called, and lanes used in
            whatever order; else messages are posted in the order of a validated schedule.

    Raises:
        MismatchError: ranks of the axis want to open different ones.
    """
    wanted = tuple(stage_to_rank), tuple(boundaries), device
    found: Post | None = axis.posts.get((*wanted, True)) or axis.posts.get((*wanted, ready))
    if found is None:
        routes = routes_between_ranks(stage_to_rank, boundaries)
        found = axis.posts[*wanted, ready] = _open(routes, stage_to_rank, axis, device, ready=ready)
    return found


def _open(
    routes: Mapping[Route, Specs], stage_to_rank: Sequence[int], axis: Axis, device: torch.device, *, ready: bool
) -> Post:
    if axis.planned or not routes:
        return _on_group(routes, stage_to_rank, axis, device, ready=False)
    _agree(routes, axis)
    if device.type == "cuda":
        return on_pairs(routes, stage_to_rank, axis, device, ready=ready)
    memory = share(axis, lanes_bytes(routes, axis.size))
    if memory is not None:
        return HostPost(routes, stage_to_rank, axis, memory, ready=ready)
    return _on_group(routes, stage_to_rank, axis, device, ready=ready)


def _agree(routes: Mapping[Route, Specs], axis: Axis) -> None:
    everybody = comm.gather_objects(tuple(routes.items()), axis)
    for rank, theirs in enumerate(everybody):
        if theirs != everybody[0]:
            raise MismatchError(
                f"ranks 0 and {rank} of the {axis.name} axis {axis.ranks} have different stages: their messages are "
                f"{dict(everybody[0])} and {dict(theirs)}"
            )


def _on_group(
    routes: Mapping[Route, Specs], stage_to_rank: Sequence[int], axis: Axis, device: torch.device, *, ready: bool
) -> GroupPost:
    """One group for all, of gloo."""
    group = axis
    if routes and not axis.planned and not is_on_host(axis):
        group = open_on_host(axis)
    mine = [
        (route, specs, group if axis.index in (stage_to_rank[route.source], stage_to_rank[route.target]) else None)
        for route, specs in routes.items()
    ]
    return GroupPost(mine, stage_to_rank, axis, device, carrier="gloo", ready=ready, has_waiters=ready)


def on_pairs(
    routes: Mapping[Route, Specs], stage_to_rank: Sequence[int], axis: Axis, device: torch.device, *, ready: bool
) -> GroupPost:
    """Groups of two ranks: one per boundary or, for `ready`, one per route. For NCCL; tests take gloo."""
    of = [route if ready else Route(min(route), max(route)) for route in routes]
    keys = list(dict.fromkeys(of))
    axes = open_groups(axis, [(stage_to_rank[key.source], stage_to_rank[key.target]) for key in keys])
    by = dict(zip(keys, axes, strict=True))
    mine = [(route, specs, by[key]) for (route, specs), key in zip(routes.items(), of, strict=True)]
    backend = "NCCL" if device.type == "cuda" else "gloo"
    return GroupPost(
        mine, stage_to_rank, axis, device, carrier=f"{backend}, {len(keys)} groups of two", ready=ready,
        batches=not ready, has_waiters=ready and backend == "gloo", labels=False,
    )  # fmt: skip
