"""The kernels' tests in emulation under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of their own:

    python -m tests.cuda_emulation.sanitized [--mutations [NUMBER ...]] [PYTEST ARGUMENTS]

With --mutations, every mistake of mutations.py (or those numbers) in turn is put into the kernels, and the first test
that notices is told. Exit code 1 if a test fails; with --mutations, if a mistake that is not harmless goes unnoticed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from tests.cuda_emulation import build

KERNEL_TESTS = ["tests/model/kernels/test_cuda.py", "tests/model/kernels/test_linear_attention.py"]
LIBRARIES = ("libasan.so", "libstdc++.so")  # the first must be there before anything else is loaded


def environment() -> dict[str, str]:
    """Of a Python process that can load the sanitized module."""
    paths = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in LIBRARIES
    ]
    options = (
        "detect_leaks=0:redzone=512:max_redzone=2048"  # a pack beyond a row of another array is in no array's middle
    )
    own = {"LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": options, "VITRUVIUS_EMULATION": "sanitized"}
    return os.environ | own | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(build.ROOT)}


class Mutate:
    """Runs the collected tests with each mutation, in a process forked after collection, until one fails."""

    def __init__(self, numbers: list[int]) -> None:
        self.mutations = build.write_sources("sanitized")[1]
        self.numbers = numbers or range(len(self.mutations))
        self.unnoticed = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        from tests.cuda_emulation.device import device

        device()  # loaded before the forks
        for number in self.numbers:
            mutation = self.mutations[number]
            items = [i for i in session.items if ("attention" in i.name) == mutation.file.startswith("attention")]
            notice = _notice(items, number)
            self.unnoticed += not notice and not mutation.harmless
            verdict = f"noticed by {notice}" if notice else mutation.harmless or "NOT NOTICED"
            print(f"{number} {mutation}: {verdict}", flush=True)
        return True


def _notice(items: list[pytest.Item], number: int) -> str:
    """The name of the test that fails, and why; "" if none does."""
    # A thread, even one that is ending, may hold a lock of AddressSanitizer's: the child would wait for it for ever.
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "this process has threads: it cannot be forked"
    with tempfile.TemporaryFile("w+") as output:
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            return _why(output.read()) if code else ""
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        try:
            _run_until_one_fails(items, number)
        finally:
            os._exit(2)
    return ""


def _run_until_one_fails(items: list[pytest.Item], number: int) -> None:
    from tests.cuda_emulation.device import device

    device().mutate(number)
    for item in items:
        os.write(1, f"running {item.name}\n".encode())
        for report in runtestprotocol(item, log=False):
            if report.failed:
                os.write(1, f"{report.longrepr}\n".encode())
                os._exit(1)
    os._exit(0)


def _why(output: str) -> str:
    """The last test that ran, and the line that says most."""
    test = output.rpartition("running ")[2].partition("\n")[0]
    marks = ("ERROR: AddressSanitizer", "simt: ", "AssertionError")
    lines = [line.strip() for mark in marks for line in output.splitlines() if mark in line]
    return f"{test}: {(lines or ['crashed'])[0][:160]}"


def main() -> int:
    """In a process that was started with `environment()`; starts it if this is none."""
    if os.environ.get("VITRUVIUS_EMULATION") != "sanitized":
        build.module("sanitized")
        command = [sys.executable, "-m", "tests.cuda_emulation.sanitized", *sys.argv[1:]]
        return subprocess.run(command, env=environment(), cwd=build.ROOT).returncode
    arguments, plugins = sys.argv[1:], []
    if arguments[:1] == ["--mutations"]:
        count = next((i for i, a in enumerate(arguments[1:]) if not a.isdecimal()), len(arguments) - 1)
        plugins = [Mutate([int(a) for a in arguments[1 : 1 + count]])]
        arguments = arguments[1 + count :]
    code = pytest.main(["-m", "gpu", "-s", "-p", "no:cacheprovider", *KERNEL_TESTS, *arguments], plugins)
    return bool(plugins[0].unnoticed) if plugins else int(code)


if __name__ == "__main__":
    sys.exit(main())
