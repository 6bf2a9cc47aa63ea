"""Ranks on two hosts, with nothing but a link between them: the same numbers."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.run.test_failures import ROOT, environment
from tests.hosts import two_hosts
from tests.parity.cases import Case
from tests.parity.climb import Climb
from tests.parity.test_ladder import assert_same, reference
from tests.tools.restarts import PATIENCE

# Two ranks on each host, of which the outermost axis with more than one crosses the link.
RUNGS = (
    Case("parallel", tensor=2, data=2),
    Case("parallel", tensor=2, pipeline=2, micro_batches=2),
    Case("sequential", tensor=4, sequence_parallel=True),
)
SCRIPT = """
import pickle, sys
from pathlib import Path

import torch

from parallel import grid, process_group
from tests.parity.climb import climb_all

opened = set()

def noted(axis, *given, open_channel=grid._open_channel):
    channel = open_channel(axis, *given)
    opened.add((axis.ranks, channel is not None))
    return channel

grid._open_channel = noted
torch.set_num_threads(1)
world = process_group.read_world()
process_group.start(world, torch.device("cpu"), 120.0)
cases = pickle.loads(bytes.fromhex(sys.argv[1]))
found = climb_all(world, cases)
Path(sys.argv[2], str(world.rank)).write_bytes(pickle.dumps((opened, found)))
process_group.stop()
"""


@pytest.mark.slow
def test_the_ladders_smallest_rung_over_two_hosts(tmp_path: Path) -> None:
    """By torchrun. Ranks of one host use shared memory, those of two never."""
    (tmp_path / "climb.py").write_text(SCRIPT)
    argv = [tmp_path / "climb.py", pickle.dumps(RUNGS).hex(), tmp_path]
    with two_hosts() as hosts:
        meeting = ["--nnodes", "2", "--master-addr", hosts.addresses[0], "--master-port", "29500"]
        launchers = [
            hosts.start(
                host,
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    *meeting,
                    "--nproc-per-node",
                    2,
                    "--node-rank",
                    host,
                    *argv,
                ],
                environment(OMP_NUM_THREADS="1"),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for host in range(2)
        ]
        said = [launcher.communicate(timeout=2 * PATIENCE)[0].decode() for launcher in launchers]
        assert [launcher.returncode for launcher in launchers] == [0, 0], said
    opened, climbs = set[tuple[tuple[int, ...], bool]](), dict[Case, Climb]()
    for rank in range(4):
        seen, found = pickle.loads((tmp_path / str(rank)).read_bytes())
        opened, climbs = opened | seen, climbs | (found or {})
    assert opened and all(shared == (set(ranks) <= {0, 1} or set(ranks) <= {2, 3}) for ranks, shared in opened), opened
    assert {shared for _, shared in opened} == {True, False}
    for case in RUNGS:
        assert_same(climbs[case], reference(case.one_process))
