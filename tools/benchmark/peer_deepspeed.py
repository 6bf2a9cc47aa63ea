"""EagerViT under DeepSpeed's ZeRO-3 (Rajbhandari et al. 2020) as a program of `tools.benchmark.peer_programs`.

Runs in the environment of `make peers`: gloo between the ranks, no launcher, MPI or oneCCL.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional as F

from tools.benchmark.eager_vit import EagerSizes, EagerViT, parameter_groups
from tools.benchmark.peer_programs import Step, Task
from tools.benchmark.peer_torch import adamw, compute_again, initial, set_matmul

# Not a requirement of this project, so nothing is known of its types. deepspeed.initialize would import the second
# with all that compiling needs; here it counts among the libraries.
ds: Any = importlib.import_module("deepspeed")
importlib.import_module("deepspeed.compile.backend")
DeepSpeedCPUAdam: Any = importlib.import_module("deepspeed.ops.adam").DeepSpeedCPUAdam


def deepspeed(task: Task) -> Step:
    """deepspeed.initialize of a model whose parameters are cut up as they are made (zero.Init).

    task.settings: cpu_adam, whether the optimizer is DeepSpeed's own for processors rather than torch's fused AdamW;
    zero_optimization, its configuration but for the stage; checkpoint, whether blocks are computed again in backward.
    """
    set_matmul(task)
    ds.init_distributed(dist_backend="gloo")
    batches = list(task.own_batches())
    config = _configuration(task, len(batches[0][1]))
    with ds.zero.Init(config_dict_or_path=config):
        model = EagerViT(EagerSizes(**task.sizes))
    _fill(model, task)
    if task.settings.get("checkpoint"):
        ds.checkpointing.configure(None, partition_activations=False)
        compute_again(model, ds.checkpointing.checkpoint)
    engine, *_ = ds.initialize(model=model, optimizer=_optimizer(model, task), config=config)
    dtype = torch.bfloat16 if task.dtype == "bf16" else torch.float32

    def step(number: int) -> float:
        images, labels = batches[number % len(batches)]
        loss = F.cross_entropy(engine(images.to(dtype)).float(), labels)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def _configuration(task: Task, images: int) -> dict[str, Any]:
    """Gradient clipping is switched off by name: some ways of giving no value end at 1."""
    return {
        "train_micro_batch_size_per_gpu": images,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "bf16": {"enabled": task.dtype == "bf16"},
        "zero_optimization": {"stage": 3, **task.settings["zero_optimization"]},
    }


def _optimizer(model: EagerViT, task: Task) -> Any:
    if not task.settings["cpu_adam"]:
        return adamw(model, task)
    groups = parameter_groups(model.named_parameters(), task.weight_decay)
    return DeepSpeedCPUAdam(groups, lr=task.lr, betas=task.betas, eps=task.eps, adamw_mode=True)


def _fill(model: EagerViT, task: Task) -> None:
    """Initial weights, a parameter at a time: rank 0's copy is cut up over all ranks."""
    for name, parameter in model.named_parameters():
        with ds.zero.GatheredParameters(parameter, modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                parameter.data.copy_(initial(task, name))
