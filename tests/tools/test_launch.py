"""The launcher: exit codes of the ranks it runs, quietly. The scripts here do without torch, so they start at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import launch

ROOT = Path(__file__).parents[2]
Launch = Callable[..., tuple[int, str]]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Launch:
    """Runs a script on some ranks; returns the exit code and what was written to stderr."""
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(source: str, ranks: int = 2) -> tuple[int, str]:
        script = tmp_path / "script.py"
        script.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{source}\n")
        code = launch.main(["--nproc-per-node", str(ranks), str(script)])
        return code, capfd.readouterr().err

    return run


def test_all_well(launched: Launch) -> None:
    assert launched("assert os.environ['WORLD_SIZE'] == '2'") == (0, "")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 77])
def test_the_code_of_the_rank_that_failed_is_ours(launched: Launch, code: int) -> None:
    assert launched(f"time.sleep(60) if rank == 0 else sys.exit({code})") == (code, "")


def test_all_ranks_fail_alike(launched: Launch) -> None:
    assert launched("sys.exit(2)") == (2, "")


def test_what_a_rank_says_comes_through(launched: Launch) -> None:
    assert launched("sys.exit('one readable message' if rank == 1 else 0)") == (1, "one readable message\n")


def test_a_killed_rank_is_named(launched: Launch) -> None:
    code, error = launched("time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)")
    assert (code, error) == (137, "tools.launch: rank 1 was killed by signal 9 (SIGKILL)\n")


def test_ranks_share_the_cores(launched: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert launched("assert os.environ['OMP_NUM_THREADS'] == '6'") == (0, "")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert launched("assert os.environ['OMP_NUM_THREADS'] == '5'") == (0, "")


def test_more_ranks_than_cores_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    launch.share_cores(8)
    assert os.environ.pop("OMP_NUM_THREADS") == "1"


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--nproc-per-node", "many", "script.py"]) == 2
    assert capsys.readouterr().err.startswith("tools.launch: error: ")
    with pytest.raises(SystemExit) as caught:
        launch.main([])
    assert caught.value.code == 2


@pytest.mark.slow
def test_a_request_to_stop_reaches_the_ranks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import pathlib, time\npathlib.Path(__file__).with_suffix('.up').touch()\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "tools.launch", "--nproc-per-node", "2", str(script)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not script.with_suffix(".up").exists():
            assert process.poll() is None
        process.terminate()
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (128 + 15, "")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
