"""One line about the node that this runs on, before a job trains there: devices, driver, links, clocks, free disk.

The batch scripts run it once per node, with the command of the run: `python tools/slurm/health.py COMMAND...`. Nothing
but Python's standard library is imported, so it takes a fraction of a second. Exit code 10 where the node is not fit:
it has fewer devices than tasks, its driver does not answer, or there is no room where the run writes. 11: it could not
be looked at.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

NOT_FIT, NOT_LOOKED_AT = 10, 11  # exit codes that neither Python, bash nor srun has
LEAST_BYTES = 256 << 20  # in each folder that a run writes to
_QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active"
_ASKED_FOR = ("SLURM_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "JOB_GPUS_PER_TASK")
_HELD_BACK = 0x02 | 0x04 | 0x08 | 0x20 | 0x40 | 0x80  # every reason for a low clock but idleness and its owner's wish
_LINKS = re.compile(r"NV\d+|PIX|PXB|PHB|NODE|SYS")
_PATIENCE = 30.0  # seconds that a driver may take to answer


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Print the line, and one for each thing that is wrong. Returns the exit code."""
    name = socket.gethostname()
    device = flag(argv, "device") or "auto"
    facts, faults = ([], []) if device == "cpu" else gpus(environ, wanted=device == "cuda")
    room, full = disks(argv, environ)
    print(f"node {name}: {', '.join([*facts, *infiniband(), *processor(), *room])}", flush=True)
    for fault in faults + full:
        print(f"node {name} is not fit: {fault}", flush=True)
    return NOT_FIT if faults or full else 0


def flag(argv: Sequence[str], name: str) -> str | None:
    """The value of --NAME in a command, the last if there are several."""
    found = None
    for word, after in zip(argv, [*argv[1:], ""], strict=False):
        if word == f"--{name}":
            found = after
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


def gpus(environ: Mapping[str, str], *, wanted: bool) -> tuple[list[str], list[str]]:
    """(what the driver says of this node's GPUs, what is wrong with them).

    Args:
        wanted: they are needed even if the job has asked SLURM for none.
    """
    wanted = wanted or any(environ.get(name) for name in _ASKED_FOR)
    try:
        told = [
            line.split(", ") for line in ask("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
        ]
    except subprocess.TimeoutExpired:
        silent = f"nvidia-smi does not answer within {_PATIENCE:g} s"
        return [silent], [f"{silent}: leave it out (sbatch --exclude)"] if wanted else []
    rows = [row for row in told if len(row) == len(_QUERY.split(","))]
    said = "".join(f"; nvidia-smi: {', '.join(row)}" for row in told if row not in rows)  # that a GPU is lost
    tasks = tasks_here(environ)
    short = f"{len(rows)} GPU(s) for {tasks} task(s){said}: leave it out (sbatch --exclude), or start fewer tasks on it"
    return _described(rows) if rows else [], [short] if len(rows) < tasks and (rows or wanted) else []


def _described(rows: Sequence[Sequence[str]]) -> list[str]:
    names = [f"{count} x {name}" for name, count in Counter(row[0] for row in rows).items()]
    now, most = ([int(row[column]) for row in rows if row[column].isdigit()] or [0] for column in (2, 3))
    clocks = f"SM clock {min(now)} to {max(now)} of {max(most)} MHz"
    slow = [str(index) for index, row in enumerate(rows) if _bits(row[4]) & _HELD_BACK]
    clocks += f" (GPU {', '.join(slow)} held back: nvidia-smi -q -d PERFORMANCE)" if slow else ""
    return [*names, f"driver {rows[0][1]}", *links(), clocks]


def tasks_here(environ: Mapping[str, str]) -> int:
    """Of the job, on this node; SLURM writes 8(x2),4: tasks of each node."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environ.get("JOB_TASKS_PER_NODE") or "1"):
        counts += [int(number)] * int(times or 1)
    return counts[min(int(environ.get("SLURM_NODEID", "0")), len(counts) - 1)]


def links() -> list[str]:
    """What joins the GPUs of this node, as `nvidia-smi topo` has it: NV18 is NVLink, SYS the processors' own link."""
    told: list[str] = []
    with contextlib.suppress(subprocess.TimeoutExpired):
        told = ask("nvidia-smi", "topo", "-m")
    rows = [row.split()[1:] for row in told if re.match(r"GPU\d+\s", row)]
    kinds = Counter(word for row in rows for word in row[: len(rows)] if _LINKS.fullmatch(word))
    return [f"GPUs joined by {' and '.join(kinds)}"] if kinds else []


def infiniband(root: Path = Path("/sys/class/infiniband")) -> list[str]:
    """Ports of InfiniBand or RoCE by state and rate."""
    ports = Counter(f"{_read(port / 'rate')} {_read(port / 'state')}" for port in sorted(root.glob("*/ports/*")))
    return [f"{count} x InfiniBand {port}" for port, count in ports.items()]


def processor() -> list[str]:
    """Cores of this node, their clock, who sets it; memory that is free."""
    told = Path("/proc/cpuinfo").read_text()
    clocks = [float(clock) for clock in re.findall(r"^cpu MHz\s*: ([\d.]+)", told, re.MULTILINE)]
    name = re.search(r"^model name\s*: (.*)", told, re.MULTILINE)
    governor = _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))
    memory = re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())
    facts = [f"{os.cpu_count()} core(s)" + (f" of {name[1]}" if name else "")]
    facts += [f"{min(clocks):.0f} to {max(clocks):.0f} MHz" + (f" ({governor})" if governor else "")] if clocks else []
    return facts + ([f"{_size(int(memory[1]) << 10)} of memory free"] if memory else [])


def disks(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(free space of the folders that the job writes to, which of them have too little, or cannot be looked at)."""
    facts, faults = [], []
    wanted = [flag(argv, "run_dir") or _of_recipe(flag(argv, "config")), flag(argv, "checkpoint.dir")]
    for folder in dict.fromkeys(filter(None, [*wanted, environ.get("JOB_LOGS"), tempfile.gettempdir()])):
        there = Path(folder)
        try:
            while not there.exists() and there != there.parent:  # the run makes it
                there = there.parent
            free = shutil.disk_usage(there).free
        except OSError as error:
            faults.append(f"{folder} cannot be reached ({error.strerror}: {there})")
            continue
        facts.append(f"{_size(free)} free in {folder}")
        if free < LEAST_BYTES:
            faults.append(
                f"{folder} has {_size(free)} left, less than {_size(LEAST_BYTES)}: make room, or choose another"
            )
    return facts, faults


def ask(*command: str) -> list[str]:
    """Lines that a program prints; none where there is no such program, or it fails. Raises TimeoutExpired."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
        return [line for line in done.stdout.splitlines() if line.strip()]
    return []


def _of_recipe(path: str | None) -> str | None:
    """`run_dir` of a configuration file."""
    found = re.search(r"^run_dir:\s*([^#\n]*[^#\s])", _read(Path(path)) if path else "", re.MULTILINE)
    return found[1].strip("'\"") if found else None


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _bits(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text, 0)
    return 0  # the driver does not say


def _size(count: int) -> str:
    gib = count / 2**30
    return f"{gib:.0f} GiB" if gib >= 10 else f"{gib * 1024:.0f} MiB"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], os.environ))
    except Exception as error:
        print(f"node {socket.gethostname()} cannot be looked at: {type(error).__name__}: {error}", flush=True)
        sys.exit(NOT_LOOKED_AT)
