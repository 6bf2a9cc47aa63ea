"""Marks: tests that need a GPU are skipped, with the reason, where torch sees none, or run on an emulated one; files
with slow tests come first.
"""

import os
from collections.abc import Iterator

import pytest

from parallel import parent

# Before torch is imported: files of tests that run at a time share the cores, and so do the ranks of each. Of two
# threads on a busy core one waits for the other at each small product: 10 ms instead of 20 us.
parent.spin_briefly()
if (files := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // files)))

import torch  # noqa: E402

from tests.cuda_emulation import build  # noqa: E402

for name in [name for name in os.environ if name.startswith("SLURM_")]:
    del os.environ[name]  # tests are no tasks of the job that they run in


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`gpu(multiprocessors=[...])`, on a test of kernels: on which emulated GPUs it runs where there is no real one."""
    mark = metafunc.definition.get_closest_marker("gpu")
    if mark and mark.kwargs and not torch.cuda.is_available():
        metafunc.fixturenames.append("emulated_gpu")
        metafunc.parametrize("emulated_gpu", mark.kwargs["multiprocessors"], indirect=True, ids=lambda n: f"{n}sm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # so that no long file is begun when the other worker is done
    for item in items:
        if mark := item.get_closest_marker("gpu"):
            if reason := _unfit(of_kernels=bool(mark.kwargs)):
                item.add_marker(pytest.mark.skip(reason=reason))
            elif not torch.cuda.is_available():
                item.fixturenames.insert(0, "emulated_gpu")


def _unfit(of_kernels: bool) -> str:
    """Why a test that is marked `gpu` cannot run here, "" if it can."""
    if torch.cuda.is_available():
        from model.kernels import native

        return f"CUDA module not built: {native.cuda_error}" if of_kernels and native.cuda is None else ""
    reason = "needs a CUDA device; tools/gpu_check.sh runs it where there is one"
    if not of_kernels:
        return reason
    return build.unavailable() and f"{reason}; {build.unavailable()}"


@pytest.fixture
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """CPU tensors pass for those of a GPU with so many multiprocessors; every scratch array is given back."""
    from tests.cuda_emulation.device import stand_in

    with stand_in() as device:
        device.configure(request.param)
        yield
        assert device.allocations() == 0
