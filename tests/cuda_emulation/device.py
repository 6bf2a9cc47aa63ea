"""The emulated GPU in this process: its module of kernels, and tensors of the CPU that pass for tensors of the GPU."""

from __future__ import annotations

import ctypes
import enum
import functools
import importlib.machinery
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.kernels import native
from tests.cuda_emulation import build

FLAVOUR = "VITRUVIUS_EMULATION"  # the environment variable that names the flavour of build.py; default: plain
MULTIPROCESSORS = (1, 4, 132)


class Order(enum.IntEnum):
    """Of blocks, and of threads where they need not wait for each other."""

    ASCENDING = 0
    DESCENDING = 1
    SHUFFLED = 2


class Device:
    """One emulated GPU; its settings hold for the launches that follow."""

    def __init__(self, flavour: str) -> None:
        path = build.module(flavour)
        # A name of its own: pybind11 and Python would hand out the native module for that of the native one.
        name = f"tests.cuda_emulation.{flavour}._cuda"
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(self.module)
        self._library = ctypes.CDLL(str(path))

    def configure(self, multiprocessors: int = 4, order: Order = Order.ASCENDING) -> None:
        self._library.simt_configure(multiprocessors, int(order))

    def mutate(self, number: int) -> None:
        """Turns on that mutation alone of the sanitized flavour."""
        self._library.simt_mutate(number)

    def allocations(self) -> int:
        """Scratch arrays that are not freed."""
        return int(self._library.simt_allocations())


@functools.cache
def device() -> Device:
    return Device(os.environ.get(FLAVOUR, "plain"))


@contextmanager
def stand_in() -> Iterator[Device]:
    """While this lasts, kernels of CPU tensors run emulated, `.cuda()` changes nothing, and fresh tensors hold NaN."""
    to: Callable[..., Tensor] = Tensor.to
    deterministic = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        # What only the CPU module has (its threads, its instruction sets) stays that module's.
        patch.setattr(native, "cpu", SimpleNamespace(**(vars(native.cpu or device().module) | vars(device().module))))
        patch.setattr(Tensor, "cuda", lambda self: self)
        patch.setattr(Tensor, "to", lambda self, *a, **k: to(self, *("cpu" if x == "cuda" else x for x in a), **k))
        torch.use_deterministic_algorithms(True)  # fills what torch.empty makes
        try:
            yield device()
        finally:
            torch.use_deterministic_algorithms(deterministic)
            device().configure()
