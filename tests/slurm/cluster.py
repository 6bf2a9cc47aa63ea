"""A SLURM cluster of two nodes on one machine: the two hosts of `tests.hosts`, each with a slurmd of its own.

All of it lives under one folder and in the hosts' namespaces: configuration, keys, sockets and ports are its own, so
that clusters stand side by side and the machine's own SLURM is not touched.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.hosts import Hosts, two_hosts

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
GRACE_SECONDS = 60
RATE = "16mbit"  # of the link: a step on both nodes takes its time, and no processor's
# Timers of a real cluster are minutes; those here are as short as SLURM has them. cred_expire is what a job that is
# requeued waits before it starts again (120 s by default).
_CONF = """\
ClusterName=vitruvius
SlurmctldHost={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
ReturnToService=2
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MessageTimeout=5
TCPTimeout=1
SlurmdTimeout=6
KillWait=15
MinJobAge=3600
{nodes}
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Made by `cluster`. Its first host has the controller; `debug`, its default partition, gives way to `urgent`."""

    hosts: Hosts
    folder: Path
    env: Mapping[str, str]

    def call(self, *argv: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a command (sbatch, scontrol, ...) on the first host, as a user who is logged in there would."""
        given: dict[str, object] = {"capture_output": True, "text": True, "timeout": 60, "env": dict(self.env)}
        return subprocess.run(self.hosts.on(0, argv), **given | options)  # type: ignore[call-overload, no-any-return]

    def start_node(self, number: int) -> None:
        """Start the slurmd of a host, which ends with the hosts."""
        log = (self.folder / "log" / f"stderr-{number}").open("ab")
        self.hosts.start(number, ["slurmd", "-D", "-N", self.hosts.names[number]], self.env, stderr=log, stdout=log)

    def states(self) -> list[str]:
        """Of the nodes, in order."""
        return self.call("sinfo", "-h", "-N", "-p", "debug", "-o", "%t").stdout.split()

    def job(self, number: str) -> dict[str, str]:
        """What scontrol shows of a job."""
        shown = self.call("scontrol", "-o", "show", "job", number).stdout
        return dict(part.split("=", 1) for part in shown.split() if "=" in part)


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Look five times a second, and fail with `what` after so many seconds."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            pytest.fail(f"{what}: not within {seconds} s")
        time.sleep(0.2)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start one and wait until both nodes are idle; the test is skipped, with the reason, where that cannot be."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        pytest.skip(f"needs SLURM: no {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)")
    with tempfile.TemporaryDirectory(prefix="vitruvius-slurm-") as name, two_hosts(rate=RATE) as hosts:
        folder = Path(name)
        for part in ("state", "log", "munge"):
            (folder / part).mkdir()
        (folder / "munge").chmod(0o755)
        conf = folder / "slurm.conf"
        conf.write_text(_text(hosts, folder))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # not searched for: `ip netns` hides them
        path = os.environ["PATH"] + ":/usr/sbin:/sbin"
        own = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        made = Cluster(hosts=hosts, folder=folder, env=own | {"SLURM_CONF": str(conf), "PATH": path})
        _start_munge(made)
        log = (folder / "log" / "stderr-controller").open("ab")
        hosts.start(0, ["slurmctld", "-D"], made.env, stderr=log, stdout=log)
        for number in (0, 1):
            made.start_node(number)
        wait_for(lambda: made.states() == ["idle", "idle"], 40, "both nodes idle")
        yield made


def _text(hosts: Hosts, folder: Path) -> str:
    nodes = zip(hosts.names, hosts.addresses, strict=True)
    lines = [f"NodeName={name} NodeAddr={address} CPUs=32 State=UNKNOWN" for name, address in nodes]
    controller = f"{hosts.names[0]}({hosts.addresses[0]})"
    return _CONF.format(controller=controller, folder=folder, nodes="\n".join(lines), grace=GRACE_SECONDS)


def _start_munge(made: Cluster) -> None:
    """Which answers for both hosts: they share this machine's files."""
    folder = made.folder / "munge"
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    flags = [f"--{flag}={folder / file}" for flag, file in files.items()]
    made.hosts.start(0, ["munged", "--foreground", "--force", *flags], made.env, stderr=subprocess.DEVNULL)
    wait_for((folder / "socket").exists, 10, "munged's socket")
