"""Builds the native kernels with CMake; everything else is in pyproject.toml.

The CPU module is always built. The CUDA module is built where nvcc is found, that of pixels on x86-64. No torch is
needed to build them. The memory module is built where torch is installed (an isolated build has none), on Linux, for
that version of it.

    VITRUVIUS_CUDA=0|1          never build the CUDA module | fail where it cannot be built (default: build it if nvcc
    is found)
    VITRUVIUS_CUDA_ARCHS=80;90a the GPU architectures
    VITRUVIUS_SANITIZE=1        AddressSanitizer and UndefinedBehaviorSanitizer (see docs/kernels.md)
"""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def tool(name: str) -> str:
    """The program `name` of the PyPI package of that name, the pinned one, which is on no PATH when the environment is
    not active; else that from PATH."""
    try:
        package = __import__(name)
    except ImportError:
        return shutil.which(name) or name
    return str(Path(package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR) / name)


def nvcc() -> str | None:
    """The CUDA compiler, if the CUDA module is wanted and there is one."""
    if os.environ.get("VITRUVIUS_CUDA", "") == "0":
        return None
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def torch_options() -> dict[str, str]:
    """What CMake is told of the torch that is installed, if there is one, which is not imported."""
    spec = importlib.util.find_spec("torch") if sys.platform == "linux" else None
    if spec is None or spec.origin is None:
        return {}
    return {
        "VITRUVIUS_TORCH_DIR": str(Path(spec.origin).parent),
        "VITRUVIUS_TORCH_VERSION": importlib.metadata.version("torch"),
    }


class CMakeBuild(build_ext):
    """Each extension is one module of the CMake project, named by the last part of its own name."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        module = ext.name.rsplit("_", 1)[-1]
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"native-{module}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "VITRUVIUS_OUTPUT_DIR": str(output),
            "VITRUVIUS_CPU": "ON" if module == "cpu" else "OFF",
            "VITRUVIUS_CUDA": "ON" if module == "cuda" else "OFF",
            "VITRUVIUS_PIXELS": "ON" if module == "pixels" else "OFF",
            "VITRUVIUS_MEMORY": "ON" if module == "memory" else "OFF",
            "VITRUVIUS_SANITIZE": "ON" if os.environ.get("VITRUVIUS_SANITIZE") == "1" else "OFF",
        }
        if module == "memory":
            options |= torch_options()
        if module == "cuda":
            options["CMAKE_CUDA_COMPILER"] = str(nvcc())
            options["CMAKE_CUDA_ARCHITECTURES"] = os.environ.get("VITRUVIUS_CUDA_ARCHS", "80;90a")
        try:
            # --fresh: an isolated build brings its tools in a directory that is gone the next time.
            configure = [tool("cmake"), "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
            subprocess.run([*configure, *(f"-D{k}={v}" for k, v in options.items())], check=True)
            subprocess.run([tool("cmake"), "--build", str(build)], check=True)
        except subprocess.CalledProcessError:
            if module == "cpu" or os.environ.get("VITRUVIUS_CUDA") == "1":
                raise
            hint = " (VITRUVIUS_CUDA=1 makes this an error)" if module == "cuda" else ""
            print(f"vitruvius: the {module} module did not build; going on without{hint}")


modules = [Extension("model.kernels._cpu", sources=[])]
if platform.machine() in ("x86_64", "AMD64"):
    modules.append(Extension("data._pixels", sources=[], optional=True))
if torch_options():
    modules.append(Extension("model.kernels._memory", sources=[], optional=True))
if nvcc():
    modules.append(Extension("model.kernels._cuda", sources=[], optional=True))
setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
