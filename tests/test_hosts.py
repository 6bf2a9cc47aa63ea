"""The two hosts that other tests run on are two, and nothing is left of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from parallel.host import process_status
from tests import hosts as hosts_module
from tests.hosts import Hosts, two_hosts

LISTEN = "import socket; s = socket.create_server(('', 4000)); print('up', flush=True); [s.accept() for _ in range(9)]"
REACH = "import socket, sys; socket.create_connection((sys.argv[1], 4000), timeout=1)"


def says(hosts: Hosts, host: int, source: str, *argv: str) -> tuple[int, str]:
    """(exit code, what it says) of a program of Python."""
    done = subprocess.run(hosts.on(host, [sys.executable, "-c", source, *argv]), capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def left() -> set[Path]:
    """Traces of hosts."""
    return {path for folder in (hosts_module._NAMED, hosts_module._FILES) for path in folder.glob("vitruvius-*")}


def of(pid: int) -> set[Path]:
    return {path for path in left() if path.name.startswith(f"vitruvius-{pid}-")}


def test_hosts_have_names_addresses_and_a_link_that_can_be_cut() -> None:
    """A second pair beside them has the same, and is not seen."""
    with two_hosts() as hosts, two_hosts() as others:
        for host in range(2):
            told = says(hosts, host, "import socket; n = socket.gethostname(); print(n, socket.gethostbyname(n))")
            assert told == (0, f"{hosts.names[host]} {hosts.addresses[host]}\n")
        server = hosts.start(1, [sys.executable, "-c", LISTEN], stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"up\n" and server.pid in hosts.processes()
        assert says(hosts, 0, REACH, hosts.names[1])[0] == 0
        assert "refused" in says(hosts, 0, REACH, "localhost")[1]
        assert says(others, 0, REACH, others.addresses[1])[0] != 0
        hosts.cut()
        assert "timed out" in says(hosts, 0, REACH, hosts.names[1])[1]  # not refused: nobody is told
        hosts.join()
        assert says(hosts, 0, REACH, hosts.names[1])[0] == 0
    assert server.wait(5) == -signal.SIGKILL and not of(os.getpid())
    assert socket.gethostname() not in hosts.names


def test_a_link_has_its_rate() -> None:
    send = "import socket; s = socket.create_connection(('host1', 4000)); s.sendall(bytes(2_000_000)); s.recv(1)"
    take = (
        "import socket; c = socket.create_server(('', 4000)); print('up', flush=True); c = c.accept()[0]\n"
        "n = 0\nwhile n < 2_000_000: n += len(c.recv(65536))\nc.send(b'.')"
    )
    with two_hosts(rate="40mbit") as hosts:
        server = hosts.start(1, [sys.executable, "-c", take], stdout=subprocess.PIPE)
        assert server.stdout is not None and server.stdout.readline() == b"up\n"
        began = time.monotonic()
        assert says(hosts, 0, send)[0] == 0
        assert 0.3 < time.monotonic() - began < 5  # 16 Mbit less a burst of 2; memory would take milliseconds


def test_what_a_killed_run_has_left_is_removed() -> None:
    source = """
        import time
        from tests.hosts import two_hosts
        with two_hosts() as hosts:
            hosts.start(0, ["sh", "-c", "echo $$; exec sleep 60"])
            time.sleep(60)
    """
    argv = [sys.executable, "-c", textwrap.dedent(source)]
    with two_hosts():
        pass  # or this test is skipped
    root = Path(__file__).parents[1]
    killed = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=root)
    assert killed.stdout is not None
    sleeper = int(killed.stdout.readline())
    killed.kill()
    killed.wait()
    assert len(of(killed.pid)) == 4
    with two_hosts():
        assert not of(killed.pid) and process_status(sleeper)[:1] in ([], ["Z"])


def test_the_reason_why_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pytest.skip.Exception, match="namespaces: not root"), monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        two_hosts().__enter__()
    with pytest.raises(pytest.skip.Exception, match=r"no ip .*iproute2"), monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 0)
        patch.setenv("PATH", "/nowhere")
        two_hosts().__enter__()
    with pytest.raises(pytest.skip.Exception, match="namespaces: tc: Cannot find device"):
        hosts_module._try("tc qdisc add dev nodevice root netem")
