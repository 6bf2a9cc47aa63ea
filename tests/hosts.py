"""Two hosts on one machine: network namespaces with a host name, an address and a link of their own.

Nothing but the link connects them: they share no loopback, and no port of one is taken on the other. They do share
processes, memory and files, so what tells them apart can only be what they are called, or the network.

Names (of namespaces, under /run/netns and /etc/netns) hold the process that made them, so that test runs side by side
do not meet; what one has left that was killed is removed by the next.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from parallel.host import process_status

NAMES = ("host0", "host1")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "eth0"
_PREFIX = "vitruvius"
_NOBODY = "02:00:00:00:00:99"  # an address of the link layer that no host has
_NAMED, _FILES = Path("/run/netns"), Path("/etc/netns")  # as `ip netns` has it: files of the second are laid over /etc
_COUNT = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Two hosts, number 0 and 1, made by `two_hosts`.

    Attributes:
        names, addresses: of each; both resolve on both. spaces: their network namespaces.
    """

    spaces: tuple[str, str]
    names: tuple[str, str] = NAMES
    addresses: tuple[str, str] = ADDRESSES

    def on(self, host: int, argv: Sequence[str | Path]) -> list[str]:
        """The command that runs `argv` on a host: it becomes `argv`, with the same process number."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.names[host])
        return ["ip", "netns", "exec", self.spaces[host], *named, *map(str, argv)]

    def start(
        self, host: int, argv: Sequence[str | Path], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a program, or a daemon, which ends with the hosts at the latest, and what it has started too.

        Args:
            env: its whole environment, by default ours. options: of subprocess.Popen.
        """
        given = {"stdin": subprocess.DEVNULL, "start_new_session": True} | options
        return subprocess.Popen(self.on(host, argv), env=env, **given)

    def cut(self) -> None:
        """From now on whatever is sent over the link vanishes; nobody is told."""
        for space, other in zip(self.spaces, reversed(self.addresses), strict=True):
            _run(f"ip -n {space} neighbour replace {other} lladdr {_NOBODY} dev {DEVICE} nud permanent")

    def join(self) -> None:
        """The link is as it was."""
        for space, other in zip(self.spaces, reversed(self.addresses), strict=True):
            _run(f"ip -n {space} neighbour delete {other} dev {DEVICE}")

    def crash(self, host: int) -> None:
        """All that runs on a host is gone, and the link with it; nobody is told."""
        self.cut()
        _kill(self.spaces[host])

    def processes(self) -> list[int]:
        """What runs on either host."""
        return [int(pid) for space in self.spaces for pid in _pids(space)]


@contextlib.contextmanager
def two_hosts(*, rate: str | None = None, delay_ms: float = 0.0) -> Iterator[Hosts]:
    """Two hosts and a link; afterwards nothing is left of them, or of what was started there. The test is skipped,
    with the reason, where they cannot be made.

    Args:
        rate: of the link each way, as tc writes it (`1gbit`). delay_ms: each way.
    """
    _skip_if(os.geteuid() != 0, "not root")
    for program in ("ip", "unshare", *(["tc"] if rate or delay_ms else [])):
        _skip_if(shutil.which(program) is None, f"no {program} (Debian: apt-get install iproute2 util-linux)")
    _remove_leftovers()
    own = f"{_PREFIX}-{os.getpid()}-{_since(os.getpid())}-{next(_COUNT)}"
    hosts = Hosts(spaces=(f"{own}-a", f"{own}-b"))
    try:
        _make(hosts)
        for space in hosts.spaces if rate or delay_ms else ():
            _shape(space, rate or "100gbit", delay_ms)
        yield hosts
    finally:
        for space in hosts.spaces:
            _remove(space)


def _make(hosts: Hosts) -> None:
    first, second = hosts.spaces
    for space in hosts.spaces:
        _try(f"ip netns add {space}")
    _try(f"ip link add {DEVICE} netns {first} type veth peer name {DEVICE} netns {second}")
    known = "".join(f"{a} {n}\n" for a, n in zip(hosts.addresses, hosts.names, strict=True))
    for space, address in zip(hosts.spaces, hosts.addresses, strict=True):
        (_FILES / space).mkdir(parents=True)
        (_FILES / space / "hosts").write_text(f"127.0.0.1 localhost\n{known}")
        _run(f"ip -n {space} address add {address}/24 dev {DEVICE}")
        for device in ("lo", DEVICE):
            _run(f"ip -n {space} link set {device} up")


def _shape(space: str, rate: str, delay_ms: float) -> None:
    root = f"tc -n {space} qdisc add dev {DEVICE}"
    _try(f"{root} root handle 1: tbf rate {rate} burst 256kb latency 200ms")
    if delay_ms:
        _try(f"{root} parent 1:1 handle 10: netem delay {delay_ms}ms limit 20000")


def _remove_leftovers() -> None:
    """Of test runs that were killed."""
    for space in {path.name for folder in (_NAMED, _FILES) for path in folder.glob(f"{_PREFIX}-*-*-*")}:
        _, pid, since, *_ = space.split("-")
        if _since(int(pid)) != since:
            _remove(space)


def _remove(space: str) -> None:
    """The namespace, with all that runs there, and its files."""
    _kill(space)
    subprocess.run(["ip", "netns", "delete", space], capture_output=True)  # there may be none
    shutil.rmtree(_FILES / space, ignore_errors=True)
    with contextlib.suppress(OSError):  # others' are there
        _FILES.rmdir()


def _kill(space: str) -> None:
    until = time.monotonic() + 10.0
    while (_NAMED / space).exists() and (pids := _pids(space)) and time.monotonic() < until:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _pids(space: str) -> list[str]:
    """That live: a process that has ended, and that nobody has asked for, is in none."""
    return subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()


def _since(pid: int) -> str:
    """When a process was started: with its number it names it for all times."""
    return "".join(process_status(pid)[19:20])


def _run(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


def _try(command: str) -> None:
    """What not every machine allows, or can."""
    done = subprocess.run(command.split(), capture_output=True, text=True)
    _skip_if(done.returncode != 0, f"{command.partition(' ')[0]}: {done.stderr.strip().partition(chr(10))[0]}")


def _skip_if(condition: bool, reason: str) -> None:
    if condition:
        pytest.skip(f"two hosts need root, iproute2 and network namespaces: {reason}")
