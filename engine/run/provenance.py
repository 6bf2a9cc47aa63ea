"""Where a run comes from: the version and commit of this code, the ranks, the command."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

from engine.config import Config
from engine.device import processor
from engine.run.agreement import code_version
from model.kernels import Kernels
from parallel.checkpoint.manifest import checksum
from parallel.grid import GridShape
from parallel.host import identity, process_status

_ROOT = Path(__file__).resolve().parents[2]


def provenance(shape: GridShape) -> dict[str, str]:
    """What `config.yaml` cannot say in keys, for the comments at its head."""
    axes = f"pipeline {shape.pipeline} x data {shape.data} x context {shape.context} x tensor {shape.tensor}"
    return {
        "version": version(),
        "commit": commit(),
        "ranks": f"{shape.world_size} = {axes}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": _printable(shlex.join(sys.argv)),
    }


def machine(config: Config, device: torch.device) -> dict[str, str | int]:
    """What the very bits of a step hang on beside configuration and layout, as this rank has it."""
    return {
        "code": code_version(),
        "torch": torch.__version__,
        "processor": processor(device),
        "threads": torch.get_num_threads(),
        "kernels": Kernels(config.kernels).describe(device)[0].removeprefix("kernels: "),
        "fp32 products": torch.get_float32_matmul_precision(),
    }


def launcher() -> str | None:
    """Who started this rank, and starts it again: torchrun or tools.launch, as that process on its host; else None."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    since = "".join(process_status(os.getppid())[19:20])  # which no later process of its number shares
    return checksum(f"{identity()} {os.getppid()} {since}".encode())


def _printable(text: str) -> str:
    """With escapes for what YAML's comments cannot hold: ends of lines, control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def version() -> str:
    """Of Vitruvius, as installed."""
    try:
        return metadata.version("vitruvius")
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def commit() -> str:
    """Of the code that runs, and whether it was changed since; "unknown" where it is no checkout of its own."""
    found = _git("rev-parse", "--show-toplevel", "HEAD")
    if found is None or len(lines := found.splitlines()) != 2 or Path(lines[0]).resolve() != _ROOT:
        return "unknown"
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return lines[1] + (" with local changes" if changes else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
