"""Ranks that do not come together: one line says who is waited for, another ends it in time, and torch says nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist

from parallel.rendezvous import Place, _Meeting, find_store
from tests.distributed import free_port

ROOT = Path(__file__).parents[3]
TIMEOUT = 5.0
HOW = r"start with srun or torchrun"
STOP = "os.kill(os.getpid(), signal.SIGSTOP)"
# what ranks do before they meet, each case with its two ranks; of more, the others never come
CASES: dict[str, tuple[str, str]] = {
    "two never come": ("", ""),
    "one stopped": ("", STOP),
    "stopped with the store": (f"rendezvous._comes = lambda *_: {STOP}", ""),
    "late": ("", f"time.sleep({TIMEOUT * 0.6})"),
    "silent": ("", ""),
    "closing": ("", ""),
}
# One process imports torch; its children are the ranks, as a launcher starts them that leaves the store to rank 0.
SCRIPT = """
import json, os, signal, sys, tempfile, time
import torch
from engine.errors import ConfigError
from engine.run.launch import run_rank
from parallel import departure, process_group, rendezvous

departure.LINGER_SECONDS = 400.0

def main(argv, world):
    exec(argv[0])
    process_group.start(world, torch.device("cpu"), {timeout})
    assert not sys.argv[2], "they have met"
    torch.distributed.barrier()

ranks = []
for name, first, port in json.loads(sys.argv[1]):
    for rank, what in enumerate(first):
        stderr = tempfile.TemporaryFile("w+")
        pid = os.fork()
        if pid == 0:
            os.dup2(stderr.fileno(), 2)
            size = "4" if name == "two never come" else str(len(first))
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size)
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os._exit(run_rank(main, [what], "prog"))
        ranks.append((name, pid, stderr))
ends = {{}}
for name, pid, stderr in ranks:
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        continue
    stderr.seek(0)
    ends.setdefault(name, []).append((os.waitstatus_to_exitcode(status), stderr.read()))
print(json.dumps(ends))
for _, pid, _ in ranks:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
"""


def ends_of(
    ports: dict[str, int], given: dict[str, tuple[str, ...]] | None = None, timeout: float = TIMEOUT
) -> dict[str, list[tuple[int, str]]]:
    """Exit code and stderr of each case's ranks that were not stopped. All at once: they wait most of their time."""
    launcher = re.compile(r"(RANK|WORLD_SIZE|MASTER_|LOCAL_|SLURM_|TORCHELASTIC_)")
    env = {k: v for k, v in os.environ.items() if not launcher.match(k)} | {"OMP_NUM_THREADS": "1"}
    cases = [(name, what, ports.get(name) or free_port()) for name, what in (given or CASES).items()]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(timeout=timeout), json.dumps(cases), "leave" if given else ""],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    ended: dict[str, list[tuple[int, str]]] = json.loads(done.stdout)
    return ended


@contextmanager
def listener(*, closes: bool) -> Iterator[int]:
    """Another program on a port, which says nothing, or closes what it has accepted."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    server.accept()[0].close()
                except OSError:
                    return

        if closes:
            Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_ranks_that_do_not_come_together() -> None:
    with listener(closes=False) as silent, listener(closes=True) as closing:
        ends = ends_of({"silent": silent, "closing": closing})
    waited = rf"waited {TIMEOUT:g} s \(parallel.timeout\) for"
    told(ends["two never come"], rf"waiting for 2 of 4 ranks \(2, 3\): {HOW}\nprog: {waited} 2 of 4 ranks .*: {HOW}\n")
    told(ends["one stopped"], rf"waiting for 1 of 2 ranks \(1\): {HOW}\nprog: {waited} 1 of 2 ranks \(1\): {HOW}\n")
    told(
        ends["stopped with the store"],
        rf"(rank 1 .*is waiting for rank 0 .*\n)?prog: rank 1 of 2 {waited} rank 0 at 127.0.0.1:\d+ .*: {HOW}, .*\n",
    )
    assert [code for code, _ in ends["late"]] == [0, 0]
    assert re.fullmatch(rf"waiting for 1 of 2 ranks \(1\): {HOW}\n", "".join(error for _, error in ends["late"]))
    for name in ("silent", "closing"):
        (first, refused), second = ends[name]
        assert first == 1
        assert re.fullmatch(r"prog: rank 0 cannot listen on 127.*\(another program listens .*MASTER_PORT.*\n", refused)
        notice = rf"rank 1 of 2 is waiting for rank 0 at 127.0.0.1:\d+ \(another program.* listens there\): {HOW}\n"
        told([second], rf"{notice}prog: rank 1 of 2 {waited} rank 0 .*\n")


REFUSES, ASKS = "raise ConfigError('the folder is not here')", "raise SystemExit(0)"
LEAVES: dict[str, tuple[str, ...]] = {
    "one": ("", REFUSES, ""),
    "the first": (REFUSES, "", ""),
    "the first, before others come": (REFUSES, "time.sleep(1.5)", "time.sleep(1.5)"),
    "one, before the first comes": ("time.sleep(1.5)", REFUSES, ""),
    "all": (REFUSES,) * 8,
    "all, the first late": ("time.sleep(1.5); " + REFUSES, REFUSES, REFUSES),
    "one asks": ("", "", ASKS),
    "the first asks": (ASKS, "", ""),
    "one fails": ("", "", "1 / 0"),
}


@pytest.mark.slow
def test_ranks_that_leave_before_all_have_come_end_the_others() -> None:
    """As under srun, where no launcher does. One tells why, and all end with its code, at once."""
    ends = ends_of({}, LEAVES, timeout=400.0)  # whoever is waited for without need is seen: the notice, or a time-out
    for name, what in LEAVES.items():
        codes, said = [code for code, _ in ends[name]], "".join(error for _, error in ends[name])
        if ASKS in what:
            asks = what.index(ASKS)
            assert codes == [0 if rank == asks else 1 for rank in range(3)], name
            assert said == f"rank {asks} of 3 has left before all ranks had come (exit code 0)\n", name
        elif "1 / 0" in what:
            assert codes == [1] * 3 and re.fullmatch(r"prog: rank 2 of 3 failed:\nTraceback[\s\S]*Error: .*\n", said)
        else:
            assert codes == [2] * len(what) and said == "prog: error: the folder is not here\n", (name, codes, said)


def told(ends: list[tuple[int, str]], expected: str) -> None:
    """All have failed, and one has said so; a notice before that may be another one's."""
    assert [code for code, _ in ends] == [1] * len(ends)
    assert re.fullmatch(expected, "".join(sorted((error for _, error in ends), key=lambda e: e.startswith("prog"))))


def test_looking_for_a_store_ends(capfd: pytest.CaptureFixture[str]) -> None:
    for closes in (False, True):
        with listener(closes=closes) as port:
            began = time.monotonic()
            assert find_store("127.0.0.1", port, 0.5) is None and time.monotonic() - began < 5
    assert find_store("127.0.0.1", free_port(), 0.3) is None
    assert capfd.readouterr().err == ""


def test_ranks_that_are_started_again_meet_their_like() -> None:
    """Their launcher's store still has what those before them wrote, some of whom never came."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    earlier = dist.PrefixStore("vitruvius", server)
    earlier.add("rounds", 1)
    for key in ("came/0", "came/2"):
        dist.PrefixStore("1", earlier).add(key, 1)
    dist.PrefixStore("1", earlier).add("number", 2)

    def comes(rank: int) -> _Meeting:
        place, now = Place(host="127.0.0.1", port=server.port, rank=rank, size=3, hosts=False), time.monotonic()
        meeting = _Meeting(place, 60.0, now + 50, now + 60, print)
        meeting.start()
        return meeting

    for number in (2, 3):
        meetings = [comes(1), comes(2)]
        time.sleep(0.5)
        assert all(meeting.is_alive() for meeting in meetings)  # rank 0 of then decides nothing any more
        meetings.append(comes(0))
        for meeting in meetings:
            meeting.join(60)
        assert [(meeting.number, meeting.error) for meeting in meetings] == [(number, None)] * 3
