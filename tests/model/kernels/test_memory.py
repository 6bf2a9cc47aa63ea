"""The pool that CPU tensors are made of: what it holds, that no two blocks share a page, threads, forks."""

import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.kernels import give_back, native, pool_state, use_pool

pytestmark = pytest.mark.skipif(not use_pool(), reason=pool_state())
PAGE = 4096
LARGE = 64 * 1024
ROOT = Path(__file__).resolve().parents[3]


def counts() -> dict[str, int]:
    assert native.memory is not None
    found: dict[str, int] = native.memory.counts()
    return found


@pytest.fixture(autouse=True)
def nothing_free() -> Iterator[None]:
    give_back()
    assert counts()["held"] == counts()["live"]
    yield


def block(size: int, value: int = 0) -> Tensor:
    return torch.full((size,), value, dtype=torch.uint8)


def full_of_one(x: Tensor) -> bool:
    """Looked at without a tensor's help, which would be of the pool."""
    numbers = x.numpy()
    return bool((numbers == numbers[0]).all())


def churn(seed: int, rounds: int) -> int:
    """Blocks of random sizes come and go, each full of a number of its own, which is there until it goes; returns the
    most pages' bytes at once."""
    choose = random.Random(seed)
    alive = list[Tensor]()
    now = most = 0
    for value in range(rounds):
        while alive and (now > 2**23 or choose.random() < 0.3):
            goes = choose.randrange(len(alive))
            assert full_of_one(alive[goes])
            now -= -(-len(alive[goes]) // PAGE) * PAGE
            del alive[goes]
        alive.append(block(choose.randrange(LARGE, 40 * LARGE), value % 251))
        now += -(-len(alive[-1]) // PAGE) * PAGE
        most = max(most, now)
    assert all(map(full_of_one, alive))
    return most


def test_it_counts_whole_pages_of_large_tensors_alone() -> None:
    before = counts()["live"]
    kept = [block(LARGE), block(LARGE + 1), block(LARGE - 1), block(0), torch.empty(0)]
    assert counts()["live"] - before == 2 * LARGE + PAGE
    assert all(x.data_ptr() % 64 == 0 for x in kept)
    kept[0].resize_(3 * LARGE)  # a new block beside the old, then the old is freed
    assert counts()["live"] - before == 4 * LARGE + PAGE
    kept.clear()
    assert counts()["live"] == before and counts()["held"] - before == 5 * LARGE + PAGE


def test_what_is_freed_is_used_again() -> None:
    fresh = counts()["fresh"]
    for _ in range(5):
        kept = [block(size * LARGE) for size in (1, 2, 3)]
        del kept
    assert counts()["fresh"] - fresh == 6 * LARGE


def test_free_blocks_are_put_together_without_a_page_fault() -> None:
    """Holes of the wrong size are what a heap would grow for."""
    kept = [block(4 * LARGE, n) for n in range(64)]
    before = counts()
    del kept[::2]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    large = block(128 * LARGE, 77)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 128
    assert {name: counts()[name] for name in ("live", "held", "fresh")} == {
        name: before[name] for name in ("live", "held", "fresh")
    }
    assert counts()["moved"] - before["moved"] == large.nbytes
    assert large.eq(77).all() and all(x.eq(2 * n + 1).all() for n, x in enumerate(kept))


def test_it_holds_no_more_than_was_once_alive() -> None:
    before = counts()["live"]
    most = churn(0, 300)
    assert counts()["held"] - before == most
    give_back()
    assert counts()["held"] == counts()["live"] == before


def test_the_number_of_mappings_is_bounded() -> None:
    """The kernel refuses more than some 65,000."""
    size = 36000
    kept = [torch.empty(LARGE, dtype=torch.uint8) for _ in range(size)]  # no page of them is touched
    held = counts()["held"]
    del kept[::2]
    whole = torch.empty(size // 2 * LARGE, dtype=torch.uint8)
    assert counts()["held"] == held
    assert len(Path("/proc/self/maps").read_text().splitlines()) < 2**16 - 10000
    whole[::PAGE] = 3
    assert whole[::PAGE].eq(3).all()


def test_threads_share_it() -> None:
    failed = list[BaseException]()

    def run(seed: int) -> None:
        try:
            churn(seed, 50)
        except BaseException as error:
            failed.append(error)

    before = counts()["live"]
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert counts()["live"] == before


FORKS = """
import os, threading
import torch
from model.kernels import use_pool
from tests.model.kernels.test_memory import block, churn
torch.set_num_threads(1)
assert use_pool()
kept, done = block(1 << 20, 5), threading.Event()
def others():
    while not done.is_set():
        block(1 << 17)
thread = threading.Thread(target=others)
thread.start()
for n in range(4):
    child = os.fork()
    if child == 0:
        kept.fill_(6)
        churn(n, 10)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert kept.eq(5).all()
done.set()
thread.join()
print("all well")
"""


def test_a_child_goes_on_with_a_copy() -> None:
    """Forked at any moment, while another thread takes and frees."""
    run = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert run.stdout == "all well\n", run.stderr


def test_it_says_why_tensors_are_glibcs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool_state() == "a pool of pages"
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert "this is 1.0" in pool_state() and not use_pool()
    monkeypatch.setattr(native, "memory", None)
    monkeypatch.setattr(native, "memory_error", "no file")
    assert "no file" in pool_state() and native.HOW_TO_BUILD in pool_state() and not use_pool()
    give_back()
    monkeypatch.setitem(os.environ, "VITRUVIUS_POOL", "0")
    assert "VITRUVIUS_POOL=0" in pool_state()
