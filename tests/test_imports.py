"""Imports point one way (docs/architecture.md), and torch.distributed has two doors only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room may import of the project, its own parts apart. Everything not listed is no room of the project.
ALLOWED = {
    "model.kernels": set[str](),
    "parallel": set[str](),
    "data": set[str](),
    "model": {"model.kernels", "parallel"},
    "engine": {"model", "model.kernels", "parallel", "data"},
    "tools": {"engine", "model", "model.kernels", "parallel", "data"},
    "pretrain_vit": {"engine", "model", "model.kernels", "parallel", "data"},
}
DISTRIBUTED = {
    "parallel/comm.py": "torch.distributed",
    "parallel/departure.py": "torch.distributed",
    "parallel/failures.py": "torch.distributed",  # the types of its errors
    "parallel/grid.py": "torch.distributed",
    "parallel/messages.py": "torch.distributed",
    "parallel/process_group.py": "torch.distributed",
    "parallel/heartbeat.py": "torch.distributed",
    "parallel/rendezvous.py": "torch.distributed",
    "tools/agent.py": "torch.distributed.elastic",
    "tools/launch.py": ("torch.distributed.run", "torch.distributed.launcher", "torch.distributed.elastic"),
    # yardsticks, programs of their own that share no process with the engine
    "tools/benchmark/peer_torch.py": "torch.distributed",
    "tools/benchmark/peer_deepspeed.py": "torch.distributed",
    "tools/benchmark/peer_pipeline.py": "torch.distributed",
    "tools/benchmark/toys_torch.py": "torch.distributed",
    "tools/benchmark/checkpoint_ways.py": "torch.distributed.checkpoint",  # beside the engine, in its process group
}


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room(module: str) -> str | None:
    """The innermost room that a module is in."""
    rooms = [r for r in (*ALLOWED, "tests") if module == r or module.startswith(f"{r}.")]
    return max(rooms, key=len, default=None)


def imported(source: str, file: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands; `from a import b` counts as a.b."""
    package = module_name(file).split(".")
    if not file.endswith("__init__.py"):
        package.pop()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            named = node.args[0] if node.args else None
            if isinstance(named, ast.Constant):
                yield node.lineno, str(named.value)


def violations(file: str, source: str) -> list[str]:
    """Imports of `file` (a path from the root) against the rules, each as `file:line: what is wrong`."""
    own = room(module_name(file))
    assert own in ALLOWED, file
    found = set()
    for line, name in imported(source, file):
        other = room(name)
        if other is not None and other != own and other not in ALLOWED[own]:
            found.add(f"{file}:{line}: {own} must not import {other} ({name})")
        if name.startswith("torch.distributed") and not name.startswith(DISTRIBUTED.get(file, "-")):
            found.add(f"{file}:{line}: torch.distributed is for {', '.join(DISTRIBUTED)} ({name})")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed" and file not in DISTRIBUTED:
            found.add(f"{file}:{node.lineno}: torch.distributed is for {', '.join(DISTRIBUTED)}")
    return sorted(found)


def project_files() -> list[str]:
    rooms = [ROOT / name for name in ALLOWED if "." not in name and name != "pretrain_vit"]
    files = [path for folder in rooms for path in folder.rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in [*files, ROOT / "pretrain_vit.py"])


def test_imports_point_one_way() -> None:
    files = project_files()
    assert {room(module_name(file)) for file in files} == set(ALLOWED)  # every room was looked into
    found = [wrong for file in files for wrong in violations(file, (ROOT / file).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("parallel/planted.py", "import model"),
        ("parallel/planted.py", "from engine.config import Config"),
        ("parallel/tensor/planted.py", "def f():\n    from data import Batch"),
        ("model/planted.py", "import engine.config.cli as cli"),
        ("model/planted.py", "if True:\n    from data.loader import Batch"),
        ("model/kernels/planted.py", "from model.config import ModelConfig"),
        ("model/kernels/planted.py", "from ..config import ModelConfig"),
        ("model/kernels/planted.py", "import parallel.comm"),
        ("data/planted.py", "from parallel import comm"),
        ("data/planted.py", "import importlib\nimportlib.import_module('model.vit')"),
        ("engine/planted.py", "from tools import launch"),
        ("engine/planted.py", "from tests.distributed import run_ranks"),
        ("tools/planted.py", "import pretrain_vit"),
        ("engine/planted.py", "import torch.distributed as dist"),
        ("engine/planted.py", "from torch import distributed"),
        ("model/planted.py", "import torch\nprint(torch.distributed.get_rank())"),
        ("tools/launch.py", "from torch.distributed import all_reduce"),
    ],
)
def test_a_planted_violation_is_found(file: str, source: str) -> None:
    assert len(violations(file, source)) >= 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("model/planted.py", "from model.kernels import layer_norm\nfrom parallel.tensor import RowParallelLinear"),
        ("engine/planted.py", "from data import Batch\nfrom model import ModelConfig\nimport parallel.comm"),
        ("model/kernels/planted.py", "from model.kernels.native import load\nfrom .checks import check"),
        ("parallel/comm.py", "import torch.distributed as dist"),
        ("tools/launch.py", "from torch.distributed import run"),
        ("data/planted.py", "import torch\nfrom datasets import models, engines"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert not violations(file, source)


def named_by(files: dict[str, str]) -> dict[str, set[str]]:
    """Of each folder within a room (engine.config, parallel.tensor), the others of that room which its files name."""
    parts = {".".join(module_name(file).split(".")[:2]) for file in files if file.count("/") > 1}
    graph: dict[str, set[str]] = {part: set() for part in parts}
    for file, source in files.items():
        own = ".".join(module_name(file).split(".")[:2])
        for _, name in imported(source, file) if own in graph else ():
            other = ".".join(name.split(".")[:2])
            if other in graph and other != own and room(own) == room(other):
                graph[own].add(other)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The parts that name each other, directly or through others."""
    left = dict(graph)
    while free := [part for part, named in left.items() if not named & left.keys()]:
        for part in free:
            del left[part]
    return sorted(left)


def test_no_two_parts_of_a_room_name_each_other() -> None:
    """Not for their types alone either."""
    graph = named_by({file: (ROOT / file).read_text() for file in project_files()})
    assert {"engine.config", "engine.run", "parallel.tensor", "parallel.fp8"} <= graph.keys()
    assert graph["parallel.fp8"] == {"parallel.tensor"}
    assert not circle(graph)
    planted = {
        "parallel/a/x.py": "from parallel.b import y",
        "parallel/b/y.py": "import parallel.a.x",
        "parallel/c/z.py": "",
    }
    assert circle(named_by(planted)) == ["parallel.a", "parallel.b"]


def named_within(files: dict[str, str], folder: str) -> dict[str, set[str]]:
    """Of each module that lies in a folder, the others there which it names."""
    own = {module_name(file): file for file in files if file.rpartition("/")[0] == folder}
    graph: dict[str, set[str]] = {}
    for module, file in own.items():
        names = [f"{name}." for _, name in imported(files[file], file)]
        graph[module] = {other for other in own if other != module and any(n.startswith(f"{other}.") for n in names)}
    return graph


@pytest.mark.parametrize("folder", ["data/shards"])
def test_no_two_modules_of_a_folder_name_each_other(folder: str) -> None:
    """Not for their types alone, nor within a function."""
    files = {file: (ROOT / file).read_text() for file in project_files() if file.startswith(f"{folder}/")}
    graph = named_within(files, folder)
    assert any(graph.values()) and not circle(graph)
    planted = {
        "data/shards/a.py": "def f():\n    from data.shards.b import x",
        "data/shards/b.py": "import data.shards.a",
        "data/shards/c.py": "from data.shards.a import x",
    }
    assert circle(named_within(planted, folder)) == ["data.shards.a", "data.shards.b", "data.shards.c"]
