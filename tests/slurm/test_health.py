"""The line about a node: what a driver says, what is not fit.

The driver is a small program that prints what a real one does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tools.slurm import health
from tools.slurm.health import NOT_FIT

ROOT = Path(__file__).resolve().parents[2]
H100 = "NVIDIA H100 80GB HBM3, 570.86.15, {clock}, 1980, 0x{reasons:016x}"
TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tPIX\t0-47\t0
GPU1\tNV18\t X \tSYS\t0-47\t0
NIC0\tPIX\tSYS\t X
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on the PATH whose nvidia-smi knows two GPUs, the second of which is hot."""
    rows = "\n".join([H100.format(clock=1980, reasons=1), H100.format(clock=1200, reasons=0x20)])
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!/bin/sh\nif [ $1 = topo ]; then cat <<'END'\n{TOPOLOGY}END\nelse cat <<'END'\n{rows}\nEND\nfi"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def test_gpus_are_told_with_driver_link_and_clocks(driver: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"JOB_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "1"}
    assert health.main(["python", "pretrain_vit.py", "--run_dir", "runs/x"], environ) == 0
    told = capsys.readouterr().out
    for part in ("2 x NVIDIA H100 80GB HBM3", "driver 570.86.15", "GPUs joined by NV18,", "1200 to 1980 of 1980 MHz"):
        assert part in told
    assert "(GPU 1 held back" in told and "free in runs/x" in told and told.count("\n") == 1


def test_a_node_with_fewer_gpus_than_tasks_is_not_fit(driver: Path, capsys: pytest.CaptureFixture[str]) -> None:
    environ = {"JOB_TASKS_PER_NODE": "2(x2),4", "SLURM_NODEID": "2"}
    assert health.main([], environ) == NOT_FIT
    assert "2 GPU(s) for 4 task(s)" in capsys.readouterr().out
    assert health.main(["--device", "cpu"], environ) == 0
    driver.write_text("#!/bin/sh\nexit 9")  # as where the driver does not talk to the kernel
    assert health.main([], {"SLURM_GPUS_PER_NODE": "4"}) == health.main(["--device=cuda"], {}) == NOT_FIT
    assert health.main([], {}) == 0


def test_a_node_without_room_is_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folders need not be there yet."""
    disk = shutil.disk_usage
    usage = {True: SimpleNamespace(free=5 << 20), False: disk("/tmp")}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage[str(path) == "/dev"])
    assert health.main(["--run_dir=/dev/not/there", "--device", "cpu"], {}) == NOT_FIT
    (tmp_path / "own.yaml").write_text("run_dir: /dev/elsewhere  # of all\n")
    assert health.main(["--config", str(tmp_path / "own.yaml")], {"JOB_LOGS": "logs/7"}) == NOT_FIT
    told = capsys.readouterr().out
    assert "not fit: /dev/not/there has 5 MiB left, less than 256 MiB" in told and "free in logs/7" in told


def test_what_cannot_be_looked_at_is_told_in_a_line(
    driver: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver that says other things than rows, or nothing; a folder of other people."""
    row, job = H100.format(clock=1980, reasons=1), {"JOB_GPUS_PER_TASK": "1", "JOB_TASKS_PER_NODE": ""}
    for said, count in (("No devices were found", 0), (f"{row}\nGPU 0000:3B:00.0: GPU is lost", 1)):
        driver.write_text(f"#!/bin/sh\necho '{said}'")
        assert health.main([], job | {"JOB_TASKS_PER_NODE": "2"}) == NOT_FIT
        assert f"{count} GPU(s) for 2 task(s); nvidia-smi: {said.splitlines()[-1]}: " in capsys.readouterr().out
    driver.write_text("#!/bin/sh\nexec sleep 9")
    monkeypatch.setattr(health, "_PATIENCE", 0.1)
    assert health.main([], job) == NOT_FIT
    assert "not fit: nvidia-smi does not answer within 0.1 s" in capsys.readouterr().out

    def refuses(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(shutil, "disk_usage", refuses)
    assert health.main(["--run_dir", "/data/theirs", "--device", "cpu"], {}) == NOT_FIT
    assert "not fit: /data/theirs cannot be reached (Permission denied" in capsys.readouterr().out


def test_a_fault_of_its_own_is_told_apart_from_a_node_that_is_not_fit() -> None:
    broken = {"JOB_TASKS_PER_NODE": "1", "SLURM_NODEID": "first", "SLURM_GPUS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "tools/slurm/health.py"], cwd=ROOT, env=broken, capture_output=True, text=True
    )
    assert done.returncode == 11 and done.stdout.count("\n") == 1 and not done.stderr


def test_it_takes_no_torch() -> None:
    code = "import sys, runpy; runpy.run_path('tools/slurm/health.py', run_name='x'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
