"""The other libraries, imported for what their models compute; none is needed to convert."""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NoReturn

_STOOD_IN = "torchvision"


def library(name: str) -> ModuleType:
    """An installed library by its name: `timm`, `open_clip`, `transformers`.

    timm and open_clip import torchvision when they are imported, for image transforms and convolutional networks, and
    run none of it in a Vision Transformer. Where torchvision is not installed (not every torch has a build of it),
    its names stand for nothing while they are imported: each raises an ImportError when it is used.

    Raises:
        ImportError: it is not installed.
    """
    if name in sys.modules or importlib.util.find_spec(_STOOD_IN) is not None:
        return importlib.import_module(name)
    if importlib.util.find_spec("transformers") is not None:  # open_clip imports it, and it looks once
        importlib.import_module("transformers.utils").is_torchvision_available()
    with _stand_in():
        return importlib.import_module(name)


@contextlib.contextmanager
def _stand_in() -> Iterator[None]:
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m == _STOOD_IN or m.startswith(f"{_STOOD_IN}.")]:
            del sys.modules[module]  # others ask whether it is there


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torchvision and all that is in it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != _STOOD_IN:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "get_graph_node_names":  # asked for to know whether there are graphs of features
            raise AttributeError(name)
        return _Meta(name, (), {"__module__": self.__name__})


class _Meta(type):
    """The class of what stands for torchvision's classes, functions and constants."""

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        _refuse(cls)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Meta(f"{cls.__name__}.{name}", (), {"__module__": cls.__module__})


def _refuse(what: type) -> NoReturn:
    raise ImportError(f"{what.__module__}.{what.__name__} is used, and torchvision is not installed")
