"""EagerViT in plain PyTorch as programs of `tools.benchmark.peer_programs`: one process, or sharded by FSDP2.

Initial weights are filled in parameter by parameter, so that no process holds more of them than its program needs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch.optim would import it with its first optimizer; so it counts among the libraries
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from tools.benchmark.eager_vit import EagerSizes, EagerViT, parameter_groups
from tools.benchmark.peer_programs import Step, Task


def eager(task: Task) -> Step:
    """One process; bf16 by autocast, with fp32 weights."""
    set_matmul(task)
    model = EagerViT(EagerSizes(**task.sizes))
    fill(model, task)
    low = partial(torch.autocast, "cpu", torch.bfloat16)
    return plain_step(model, task, low if task.dtype == "bf16" else nullcontext)


def data_parallel(model: nn.Module) -> nn.Module:
    """Under DDP, over all ranks; where there is one, the model itself."""
    if os.environ["WORLD_SIZE"] == "1":
        return model
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fsdp2(task: Task) -> Step:
    """fully_shard on every block and on the root, built on the meta device.

    task.settings: reshard_after_forward; prefetch, whether the block to come is gathered while one computes;
    checkpoint, whether blocks are computed again in backward.
    """
    set_matmul(task)
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if task.dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.device("meta"):
        model = EagerViT(EagerSizes(**task.sizes))
    if task.settings.get("checkpoint"):
        compute_again(model, partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=task.settings["reshard_after_forward"])
    if task.settings["prefetch"]:
        _prefetch([block for block in model.blocks if isinstance(block, FSDPModule)])
    fill(model.to_empty(device="cpu"), task)
    return plain_step(model, task)


def compute_again(model: EagerViT, how: Callable[..., Any]) -> None:
    """Run every block's forward pass by `how(forward, x)`, within whatever hooks the block will have."""
    for block in model.blocks:
        block.forward = partial(how, block.forward)


def _prefetch(blocks: Sequence[FSDPModule]) -> None:
    for here, following in pairwise(blocks):
        here.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([here])


def plain_step(
    model: nn.Module,
    task: Task,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    keeps_gradients: Callable[[], bool] = lambda: False,
) -> Step:
    """A training step as one writes it.

    Args:
        keeps_gradients: whether their memory stays from this step to the next; else it is given up, as is usual.
    """
    optimizer, batches = adamw(model, task), list(task.own_batches())

    def step(number: int) -> float:
        images, labels = batches[number % len(batches)]
        optimizer.zero_grad(set_to_none=not keeps_gradients())
        with precision():
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def adamw(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """Fused, over the groups that the engine decays and does not."""
    groups = parameter_groups(model.named_parameters(), task.weight_decay)
    return torch.optim.AdamW(groups, lr=task.lr, betas=task.betas, eps=task.eps, fused=True)


def set_matmul(task: Task) -> None:
    """As engine.device.set_matmul."""
    torch.set_float32_matmul_precision("high" if task.matmul == "onednn" else "highest")


def initial(task: Task, name: str) -> Tensor:
    """One initial weight, whole."""
    with np.load(task.weights) as file:  # reads this array alone
        return torch.from_numpy(file[name])


@torch.no_grad()
def fill(model: nn.Module, task: Task) -> None:
    """Initial weights into whole parameters, or into this rank's rows of those that FSDP2 has cut along dim 0."""
    for name, parameter in model.named_parameters():
        whole = initial(task, name)
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            parts = whole.chunk(mesh.size(), 0)
            if mesh.get_local_rank() < len(parts):
                parameter.to_local().copy_(parts[mesh.get_local_rank()])
        else:
            parameter.copy_(whole)
