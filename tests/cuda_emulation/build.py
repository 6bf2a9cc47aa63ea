"""Compiles CUDA sources for the emulator. What is built stays in build/cuda_emulation, under a hash of what went in."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.cuda_emulation.mutations import Mutation, plant
from tests.cuda_emulation.translate import translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_emulation"
KEPT_SECONDS = 7 * 24 * 3600  # what nobody asked for this long is deleted

COMMON = ["-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", "-w", f"-I{HERE / 'include'}"]
# Calls for checks, and not all kinds of undefined behaviour: with them, the norms alone take half a minute to compile.
ADDRESS = ["-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0", "-fno-omit-frame-pointer"]
UNDEFINED = ["-fsanitize=alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero,float-cast-overflow"]
# Options for the kernels, for the emulator itself, and whether the mutations are in (all off until a test wants one).
FLAVOURS = {
    "plain": (["-O1"], ["-O2"], False),
    "sanitized": (["-O1", *ADDRESS, *UNDEFINED], ["-O1", *ADDRESS], True),
}


@functools.cache
def unavailable() -> str:
    """Why kernels cannot be emulated here, "" if they can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"the CUDA emulator is written for Linux on x86-64; this is {platform.system()} on {platform.machine()}"
    if not shutil.which("g++"):
        return "the CUDA emulator needs g++ 12 or later; there is none on PATH"
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    return "" if int(version.split(".")[0]) >= 12 else f"the CUDA emulator needs g++ 12 or later; this is {version}"


def module(flavour: str) -> Path:
    """The kernels and their bindings as a Python module `_cuda`."""
    kernel_options, options, _ = FLAVOURS[flavour]
    with _lock():
        folder = write_sources(flavour)[0]
        units = [Unit(file, (*kernel_options, f"-I{CUDA}")) for file in sorted(folder.glob("*.cpp"))]
        units.append(Unit(CUDA / "bindings.cpp", _binding_options()))
        return _link([*units, *_emulator(options)], (*options, "-shared"), "_cuda.so")


def program(source: Path, flavour: str) -> Path:
    """A CUDA source that has a main function, as a program."""
    kernel_options, options, _ = FLAVOURS[flavour]
    with _lock():
        text = BUILD / "source" / f"{source.name}.cpp"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(translate(source.read_text(), source.relative_to(ROOT)))
        return _link([Unit(text, tuple(kernel_options)), *_emulator(options)], tuple(options), source.stem)


def write_sources(flavour: str) -> tuple[Path, list[Mutation]]:
    """A folder with csrc/cuda in C++, and the mutations in it, by number."""
    folder = BUILD / "source" / flavour
    planted: list[Mutation] = []
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cuh")]):
        text = file.read_text()
        if FLAVOURS[flavour][2]:
            text = plant(text, file.name, planted)
        target = folder / (file.name + ".cpp" * (file.suffix == ".cu"))
        target.write_text(translate(text, file.relative_to(ROOT)))
    return folder, planted


class Unit(NamedTuple):
    source: Path
    options: tuple[str, ...]


def _emulator(options: Sequence[str]) -> list[Unit]:
    return [Unit(file, tuple(options)) for file in sorted((HERE / "source").glob("*.cpp"))]


def _binding_options() -> tuple[str, ...]:
    import pybind11

    python = sysconfig.get_paths()["include"]
    return ("-O0", "-isystem", pybind11.get_include(), "-isystem", python, '-DVITRUVIUS_ARCHS="sm_80, emulated"')


def _link(units: Sequence[Unit], options: Sequence[str], name: str) -> Path:
    """BUILD/<hash>/name; what must be compiled first is, as many files at a time as there are processors."""
    objects = {_object(unit): unit for unit in units}
    missing = [(unit, file) for file, unit in objects.items() if not file.exists()]
    if missing:  # else no threads: who asks for what is built already may be about to fork
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: _compile(*pair), missing))
    for file in objects:
        file.touch()
    target = BUILD / _hash([*options, *map(str, objects)]) / name
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        _gcc([*options, *map(str, objects)], target)
    return target


def _object(unit: Unit) -> Path:
    """Where what a source is compiled to is kept."""
    headers = sorted({*HERE.rglob("*.h"), *unit.source.parent.glob("*.cuh"), *CUDA.parent.rglob("*.h")})
    texts = [file.read_text() for file in (unit.source, *headers)]
    return BUILD / f"{unit.source.name.split('.')[0]}-{_hash([_compiler(), *unit.options, *texts])}.o"


def _compile(unit: Unit, target: Path) -> None:
    _gcc([*COMMON, *unit.options, "-c", str(unit.source)], target)


def _gcc(arguments: Sequence[str], target: Path) -> None:
    """Into another file first: what a build that was broken off leaves is not taken for what it should have made."""
    unfinished = target.with_name(f"unfinished-{target.name}")
    result = subprocess.run(["g++", *arguments, "-o", unfinished], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"the CUDA sources do not build for the emulator:\n{result.stderr[-3000:]}")
    unfinished.replace(target)


@functools.cache
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _lock() -> Iterator[None]:
    """One process builds at a time. What nobody has asked for in a week is deleted."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for file in BUILD.glob("*.o"):
            if file.stat().st_mtime < time.time() - KEPT_SECONDS:
                file.unlink()
        yield
