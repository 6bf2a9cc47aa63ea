"""Who a process is by its launcher's variables: those that SLURM 22.05 gave when it was asked, and torchrun's."""

from __future__ import annotations

import pytest

from parallel import slurm
from parallel.process_group import World, read_world
from parallel.slurm import NotATaskError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
_JOB = "SLURM_JOB_ID=9 SLURM_JOB_NUM_NODES=2 SLURM_NNODES=2 SLURM_TASKS_PER_NODE=2(x2) SLURM_NTASKS=4"
_STEP = "SLURM_STEP_ID=0 SLURM_STEP_NODELIST=node[1-2] SLURM_STEP_NUM_NODES=2 SLURM_LAUNCH_NODE_IPADDR=127.0.0.1"
_FIRST = "SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0"
_ONE = "SLURM_STEP_ID=0 SLURM_STEP_NODELIST=node1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1"
_ALL = "SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE=2(x2)"


def env(*parts: str) -> dict[str, str]:
    """Of lines as `env` prints them."""
    return dict(item.split("=", 1) for part in parts for item in part.split())


TASKS = {
    "the first of srun": (env(_JOB, _STEP, _ALL, _FIRST), World(rank=0, size=4, local_rank=0, local_size=2)),
    "the last of srun": (
        env(_JOB, _STEP, _ALL, "SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1"),
        World(rank=3, size=4, local_rank=1, local_size=2),
    ),
    "srun -m cyclic": (
        env(_JOB, _STEP, _ALL, "SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NODEID=1"),
        World(rank=1, size=4, local_rank=0, local_size=2),
    ),
    "alone on the second host": (
        env(_STEP, "SLURM_NTASKS=3 SLURM_TASKS_PER_NODE=2,1 SLURM_STEP_NUM_TASKS=3 SLURM_STEP_TASKS_PER_NODE=2,1")
        | env("SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_NODEID=1"),
        World(rank=2, size=3, local_rank=0, local_size=1),
    ),
    "hosts of many kinds": (
        env("SLURM_NTASKS=12 SLURM_STEP_TASKS_PER_NODE=4(x2),3,1 SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NODEID=2"),
        World(rank=9, size=12, local_rank=1, local_size=3),
    ),
    "srun --pty bash of all tasks": (
        env(_JOB, _STEP, _ALL, _FIRST, "SLURM_PTY_PORT=43493"),
        World(rank=0, size=4, local_rank=0, local_size=2),
    ),
}
ALONE = {
    "srun --ntasks 1 in a job of four": env(
        "SLURM_JOB_ID=9 SLURM_NNODES=1 SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=1 SLURM_NTASKS_PER_NODE=2", _ONE, _FIRST,
        "SLURM_TASKS_PER_NODE=1",
    ),
    "srun --pty bash": env("SLURM_NTASKS=1 SLURM_TASKS_PER_NODE=1 SLURM_PTY_PORT=42131", _ONE, _FIRST),
    "a batch script of one task": env("SLURM_JOB_ID=3 SLURM_NTASKS=1 SLURM_TASKS_PER_NODE=1", _FIRST),
    "so, where nothing was asked for": env("SLURM_JOB_ID=4 SLURM_NNODES=1 SLURM_TASKS_PER_NODE=1", _FIRST),
    "so, submitted from a task of four": env("SLURM_NTASKS=1 SLURM_TASKS_PER_NODE=1", _STEP, _ALL, _FIRST),
    "no SLURM": {},
}  # fmt: skip
OUTSIDE = {
    "a batch script": env(_JOB, _FIRST),
    "so, of an array": env("SLURM_ARRAY_TASK_ID=0 SLURM_JOB_ID=8 SLURM_NTASKS=2 SLURM_TASKS_PER_NODE=2", _FIRST),
    "so, by --ntasks-per-node": env(_JOB, _FIRST, "SLURM_NTASKS_PER_NODE=2"),
    "so, of --nodes 2 alone": env("SLURM_JOB_ID=6 SLURM_NNODES=2 SLURM_TASKS_PER_NODE=1(x2)", _FIRST),
    "so, submitted from a shell that was a task": env(_JOB, _ONE, _FIRST),
    "salloc's shell": env(_JOB),
    "so, on the first node": env(_JOB, _ONE, _FIRST, "SLURM_STEP_ID=4294967290 SLURM_PTY_PORT=39193"),
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks_of_srun(name: str) -> None:
    environ, expected = TASKS[name]
    assert read_world(environ) == expected
    assert read_world(environ | {"WORLD_SIZE": "4"}) == expected  # what job scripts export beside srun
    assert read_world(environ | {"PMI_SIZE": str(expected.size), "PMI_RANK": str(expected.rank)}) == expected


@pytest.mark.parametrize("name", ALONE)
def test_one_process(name: str) -> None:
    assert read_world(ALONE[name]) == World()


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_batch_script_is_not_one_of_its_tasks(name: str) -> None:
    """It neither takes the place of the first, nor trains alone."""
    with pytest.raises(NotATaskError, match=r"of a job of [24] tasks.*: start with srun or torchrun"):
        read_world(OUTSIDE[name])


@pytest.mark.parametrize(
    "environ", [{}, *(environ for environ, _ in TASKS.values()), *ALONE.values(), *OUTSIDE.values()]
)
def test_torchrun_wins(environ: dict[str, str]) -> None:
    assert read_world(environ | TORCHRUN) == World(rank=5, size=8, local_rank=1, local_size=4)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "first"}, "variables RANK, .* must all be integers"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, "variables RANK, .* must all be integers"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "variables RANK, .* must all be integers"),
        ({"WORLD_SIZE": "2"}, "variables RANK, .* must all be integers"),
        (env(_JOB, _STEP, _ALL, _FIRST) | {"SLURM_NTASKS": "many"}, "SLURM_PROCID, .* make no sense together"),
        (
            env(_JOB, _STEP, _ALL, _FIRST) | {"SLURM_STEP_TASKS_PER_NODE": "x"},
            "SLURM_PROCID, .* make no sense together",
        ),
        (env(_JOB, _STEP, _ALL, "SLURM_PROCID=0"), "SLURM_PROCID, .* make no sense together"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, r"one of 4 processes \(OMPI_COMM_WORLD_SIZE\).*srun or torchrun, not mpirun"),
        (env(_JOB, _STEP, _ALL, _FIRST) | {"PMI_SIZE": "16"}, "one of 16 processes"),
    ],
    ids=str,
)
def test_variables_that_make_no_sense(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_world(environ)


def test_steps_that_run_at_once_meet_at_ports_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "123456")
    ports = []
    for step in range(20):
        monkeypatch.setenv("SLURM_STEP_ID", str(step))
        ports.append(slurm.port())
    assert ports[0] == 23456 and len(set(ports)) == 20 and all(20000 <= port < 40000 for port in ports)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node3", "node3"),
        ("a1,b2", "a1"),
        ("node[3-7,9]", "node3"),
        ("node[003-007]", "node003"),
        ("node[9,11],other[1-2]", "node9"),
        ("a1,b[2-3]", "a1"),
        ("ip-10-0-1-[5-6]", "ip-10-0-1-5"),
        ("gpu[1-2].example.org,x", "gpu1.example.org"),
        ("r[1-2]n[3-4]", "r1n3"),
    ],
)
def test_first_slurm_host(nodes: str, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(slurm, "_resolves", lambda _: True)
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.7")  # where srun was called, maybe elsewhere
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    assert slurm.first_host() == first
    monkeypatch.setenv("SLURM_STEP_NODELIST", "step[1-2]")  # the step may have fewer hosts than the job
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4(x2)")
    assert slurm.first_host() == "step1"
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "4")  # all on one host, of whatever name
    assert slurm.first_host() == "127.0.0.1"


def test_host_outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.first_host() == "127.0.0.1"
