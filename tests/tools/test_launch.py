"""The launcher: exit codes of the ranks it runs, quietly. The scripts here do without torch, so they start at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from tools import launch
from tools.agent import Agent

ROOT = Path(__file__).parents[2]
Launch = Callable[..., tuple[int, str]]
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
HANDLED = (*STOPPING, signal.SIGHUP, signal.SIGQUIT)


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Launch]:
    """Runs a script on some ranks; returns the exit code and what was written to stderr."""
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    for number in (number for number, handler in handlers.items() if handler is signal.SIG_IGN):
        signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore them: nohup, a shell's background job
    for name in ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def run(source: str, *options: str) -> tuple[int, str]:
        script = tmp_path / "script.py"
        script.write_text(f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{source}\n")
        code = launch.main(["--nproc-per-node", "2", *options, str(script)])
        return code, capfd.readouterr().err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_all_well(launched: Launch) -> None:
    assert launched("assert os.environ['WORLD_SIZE'] == '2'") == (0, "")


@pytest.mark.parametrize("code", [1, 2, 3, 4, 77])
def test_the_code_of_the_rank_that_failed_is_ours(launched: Launch, code: int) -> None:
    assert launched(f"time.sleep(60) if rank == 0 else sys.exit({code})") == (code, "")


@pytest.mark.parametrize("code", [2, 3, 4])
def test_what_would_end_alike_is_not_tried_again(launched: Launch, code: int) -> None:
    assert launched(
        f"sys.exit({code} if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else 1)", "--max-restarts=2"
    ) == (
        code,
        "",
    )


@pytest.mark.parametrize(
    ("fails", "told"),
    [("sys.exit(1)", "ended with code 1"), ("os.kill(os.getpid(), 9)", "was killed by signal 9 (SIGKILL)")],
)
def test_ranks_start_again_after_a_failure(launched: Launch, fails: str, told: str) -> None:
    source = f"if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': {fails} if rank else time.sleep(60)"
    expected = f"tools.launch: rank 1 {told}: all ranks start again (restart 1 of 3)\n"
    assert launched(source, "--max-restarts=3") == (0, expected)


def test_all_ranks_fail_alike(launched: Launch) -> None:
    assert launched("sys.exit(2)") == (2, "")


def test_what_a_rank_says_comes_through(launched: Launch) -> None:
    assert launched("sys.exit('one readable message' if rank == 1 else 0)") == (1, "one readable message\n")


def test_a_killed_rank_is_named(launched: Launch) -> None:
    code, error = launched("time.sleep(60) if rank == 0 else os.kill(os.getpid(), signal.SIGKILL)")
    assert (code, error) == (137, "tools.launch: rank 1 was killed by signal 9 (SIGKILL)\n")


def test_an_interrupted_rank_is_named(launched: Launch) -> None:
    """A rank of ours keeps quiet then, as the launcher tells of an interrupt that it passes on."""
    assert launched("time.sleep(60) if rank == 0 else sys.exit(130)") == (130, "tools.launch: rank 1 was interrupted\n")


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


WRONG = [
    "--nproc-per-node many",
    "--nproc-per-node 0",
    "--nproc-per-node -3",
    "--nproc-per-node 1000000",
    "--nnodes x",
    "--nnodes -1",
    "--nnodes 3:2",
    "--nnodes 1:2:3",
    "--nnodes 2 --node-rank 2",
    "--max-restarts -1",
    "--monitor-interval nan",
    "--rdzv-backend telepathy",
    "--rdzv-conf hurry",
    "--redirects 9",
    "--signals-to-handle SIGNOTHING",
    "--log-dir /proc/version",
    "--no-python --nnodes 1",
]


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_arguments(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main([*arguments.split(), "/no/such/script.py"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tools.launch: error: ") and len(error.splitlines()) == 1 and len(error) > 40


def test_no_arguments() -> None:
    with pytest.raises(SystemExit) as caught:
        launch.main([])
    assert caught.value.code == 2


def test_hosts_that_never_come(launched: Launch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    meeting = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-conf join_timeout=1"
    assert launch.main([*meeting.split(), "script.py"]) == 1
    error = capfd.readouterr().err
    assert error.startswith("tools.launch: error: the launchers of 2 host(s)") and len(error.splitlines()) == 1


TELL_LAUNCHER = "rank or os.kill(os.getppid(), {0}); time.sleep({1})"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_is_told(launched: Launch, number: signal.Signals) -> None:
    expected = (128 + number, f"tools.launch: stopped by signal {number.value} ({number.name})\n")
    assert launched(TELL_LAUNCHER.format(number.value, 60)) == expected


def test_ranks_that_were_just_being_started_have_not_ended() -> None:
    """A signal interrupts torch's list of them: with no rank on it the launcher must not say that all is done."""
    agent = Agent.__new__(Agent)
    agent._worker_group = Mock(spec_set=["spec"])
    agent._worker_group.spec.local_world_size = 2
    agent._pcontext = None
    assert agent._codes() == [None, None]
    agent._pcontext = Mock(subprocess_handlers={0: Mock(**{"proc.poll.return_value": 3})})
    assert agent._codes() == [3, None]


WHEN_ALL_ARE_UP = """
up = __file__ + ".up"
rank and open(up, "w")
while not rank and not os.path.exists(up):
    time.sleep(0.01)
rank or os.kill(os.getppid(), {0})
time.sleep(60)
"""


@pytest.mark.parametrize("number", STOPPING)
def test_ranks_that_stop_in_order_are_not_started_again(launched: Launch, number: signal.Signals) -> None:
    ready = f"signal.signal({number.value}, lambda *_: sys.exit(3))"
    assert launched(ready + WHEN_ALL_ARE_UP.format(number.value), "--max-restarts=2") == (3, "")


def test_a_warning_while_ranks_begin_is_passed_on_when_they_heed_it(
    launched: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It interrupts neither the launcher, which has not started all of them, nor those that have just begun."""
    begin = SubprocessHandler.__init__

    def slowly(self: SubprocessHandler, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        time.sleep(0.3)

    monkeypatch.setattr(SubprocessHandler, "__init__", slowly)
    handled = "time.sleep(0.7); signal.signal(10, lambda *_: sys.exit(3)); time.sleep(60)"
    assert launched(f"rank or os.kill(os.getppid(), 10); {handled}", "--max-restarts=2") == (3, "")


@pytest.mark.parametrize(
    ("handler", "code", "told"),
    [
        ("sys.exit(rank)", 1, ""),  # saving has failed, which the rank has told
        ("sys.exit(0)", 0, ""),  # it was done anyway
        (
            "None",
            137,
            "stopped by signal 15 (SIGTERM); ranks that did not end in time (--shutdown-timeout) were killed",
        ),
    ],
)
def test_ranks_that_were_to_stop(launched: Launch, handler: str, code: int, told: str) -> None:
    seconds = "1" if handler == "None" else "600"
    ready = f"signal.signal(15, lambda *_: {handler})"
    began = time.monotonic()
    ended = launched(ready + WHEN_ALL_ARE_UP.format(15), "--shutdown-timeout", seconds)
    assert ended == (code, told and f"tools.launch: {told}\n") and time.monotonic() - began < 50


def test_a_signal_that_is_ignored_stays_ignored(launched: Launch) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert launched(TELL_LAUNCHER.format(signal.SIGHUP.value, 0.5)) == (0, "")


def test_no_folder_is_left(launched: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    assert launched("sys.exit(3)") == (3, "")
    assert not any(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("deaf", [False, True])
def test_a_request_to_stop_reaches_the_ranks(deaf: bool, tmp_path: Path) -> None:
    """The second ends those that it does not move, and the launcher."""
    script = tmp_path / "script.py"
    ignore = "import signal; signal.signal(15, signal.SIG_IGN)\n" * deaf
    script.write_text(
        f"{ignore}import pathlib, time\npathlib.Path(__file__).with_suffix('.up').touch()\ntime.sleep(60)\n"
    )
    command = [sys.executable, "-m", "tools.launch", "--nproc-per-node", "1", str(script)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        while not script.with_suffix(".up").exists():
            assert process.poll() is None
        process.terminate()
        if deaf:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            process.terminate()
        _, error = process.communicate(timeout=50)
    finally:
        process.kill()
    assert (process.returncode, error) == (128 + 15, "tools.launch: stopped by signal 15 (SIGTERM)\n")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
