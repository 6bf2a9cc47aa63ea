"""`python -m tools.benchmark NAME [options]`, NAME one of BENCHMARKS; each explains itself with --help."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from parallel import parent

if __name__ == "__main__":  # before the imports below, which take seconds
    parent.end_with_launcher()
    parent.end_by_interrupt()
    parent.spin_briefly()

from engine.errors import EXIT_USAGE
from engine.run.launch import run_rank
from parallel.process_group import World

BENCHMARKS = {
    "context": "full attention over ranks that share an image: all-to-all against a ring",
    "messages": "a pipeline's messages between two ranks: shared memory against gloo",
    "precision": "a recipe trained in fp32, bf16, fp16 and fp8 over several seeds",
    "textures": "recipes with full, windowed, linear and mixed attention, trained alike",
    "attention": "each kind of attention against the number of tokens; memory at high resolution; pyramids",
    "step": "a training step of a configuration in a layout: time, communication, memory, utilisation",
    "sweep": "many layouts in turn, a line of JSON for each run; two sweeps compared",
    "schedules": "pipeline schedules on paper: step time, bubble and memory, with jitter and by either policy",
    "pipeline": "schedules with stages that sleep, against formulas; the cost of an action, against torch's",
    "peers": "the same step against plain eager PyTorch, DDP, FSDP2, DeepSpeed, torch's pipelines",
    "contrastive": "contrastive losses and their gradients against open_clip's: time over the GEMM limit, memory",
    "distillation": "a step with teachers against the student's step and their forwards",
    "recompute": "time over memory of what is computed again, against torch's checkpointing",
    "predictions": "what tools.plan says of memory and time, against runs of configurations drawn by seed",
    "checkpoint": "saving and loading a state against the disk's rate and torch.distributed.checkpoint",
    "reshard": "a checkpoint cut for a layout: what that costs, and what loading gains",
    "convert": "weights converted between formats: rate against the disk's, and memory",
    "faithful": "whether maps say what a model goes by: pointing game, insertion, deletion, on digits over textures",
    "retention": "what students keep of their teacher's accuracy: response, features, relations; few labels",
    "seeing": "class-token rollout beyond the forward pass, against hooks on written-out attention in timm",
    "shards": "how soon sets of many shards are opened, and whether reading them keeps memory",
    "decode": "images a second on a core, from JPEGs to training batches, against webdataset, grain and Pillow",
    "augmentations": "what each augmentation, and each way to show held-out images, takes per image",
    "kernels": "each native kernel against torch, and against the memory limit",
}

_ALONE = {
    "precision", "textures", "reshard", "convert", "kernels", "sweep", "schedules", "pipeline", "recompute",
    "predictions", "shards", "contrastive", "seeing", "faithful", "retention", "decode",
    "augmentations", "--against",
}  # with ranks of their own, or none  # fmt: skip


def main(argv: Sequence[str], world: World) -> int | None:
    """Hand over to the benchmark named first; returns its exit code."""
    if not argv or argv[0] not in BENCHMARKS:
        lines = [f"  {name:13} {what}" for name, what in BENCHMARKS.items()]
        print("\n".join(["usage: python -m tools.benchmark NAME [options]", *lines]), file=sys.stderr)
        return EXIT_USAGE
    code: int | None = importlib.import_module(f"tools.benchmark.{argv[0]}").main(argv[1:], world)
    return code


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], "tools.benchmark", alone=bool(_ALONE & set(sys.argv[1:]))))
