"""Every way of failing: the exit code of the interface, one readable message, no hang, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import pretrain_vit
from engine.errors import DivergedError, DriftError
from engine.run import launch
from engine.run.launch import run_rank
from parallel import process_group
from parallel.failures import PeerLostError
from parallel.process_group import World
from tests.distributed import free_port
from tests.engine.run.forked import long_run, running, steps_told
from tests.engine.small import flags

ROOT = Path(__file__).parents[3]


# -- one rank, in this process -----------------------------------------------------------------------------------------


class Left(BaseException):
    """A rank has left its process."""


@pytest.fixture
def in_a_world_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is rank 0 of 2, none of which talk to each other; leaving raises."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(launch, "read_world", lambda: World(size=2, local_size=2))
    monkeypatch.setattr(launch.os, "_exit", leave)
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(process_group, "leave_word", lambda *args, **options: None)  # nobody comes for it
    monkeypatch.setattr(process_group, "start", lambda *args: pytest.fail("a process group was made before the check"))


BAD_INPUT = [
    ("train.steps=0", "train.steps is 0: it must be positive"),
    ("train.stesp=1", "unknown key train.stesp: did you mean train.steps?"),
    ("train.steps=few", "train.steps is 'few': it must be an integer or null"),
    ("config=none.yaml", "--config none.yaml cannot be read: No such file or directory"),
    ("parallel.tensor_parallel_size=3", "2 ranks cannot be shared among model replicas of tensor 3"),
    ("model.width=18", "model.num_heads 4 does not divide model.width 18"),
    ("model.num_heads=1 parallel.tensor_parallel_size=2", "model.num_heads 1 cannot be split over"),
    ("model.mlp_dim=1 parallel.tensor_parallel_size=2", "model.mlp_dim 1 cannot be split over"),
    ("parallel.context_parallel_size=3", "2 ranks cannot be shared among model replicas of tensor 1 x pipeline 1 x c"),
    ("model.patch_size=8 parallel.context_parallel_size=2", "parallel.context_parallel_size 2 is more than the 1 row "),
    ("train.micro_batch_size=3", "train.global_batch_size 8 cannot be dealt to 2 data-parallel ranks"),
    ("train.global_batch_size=7", "train.global_batch_size 7 cannot be dealt to 2 data-parallel ranks"),
    ("train.freeze=embed,block.3", "train.freeze holds 'block.3', which is the name of no parameter or layer"),
    ("model.patch_size=0", "model.patch_size is 0: it must be at least 1"),
    ("model.image_size=[8]", "model.image_size is [8]: it must be an integer, a list of 2 integers or null"),
    ("model.attention=[window,full]", "model.attention names 2 layers, but there are 4: give one kind for all"),
    ("model.attention=windows", "model.attention: 'windows' is no kind of attention: choose among full, window"),
    ("model.stages=[1]", "model.stages[0] is 1: it must be a group of keys, of depth, width, num_heads"),
    ("schedule.warmup_steps=5", "schedule.warmup_steps 5 and cooldown_steps 0 do not fit into 1 steps"),
    ("run_dir=null", "run_dir is not set: give the folder for metrics and config, e.g. --run_dir runs/demo"),
    ("run_dir=/dev/null/run", "run_dir /dev/null/run cannot be written to (Not a directory)"),
    ("device=cuda", "device is cuda, but torch sees no CUDA device here: use device auto or cpu"),
    (
        "precision.dtype=fp8 precision.fp8_backend=transformer_engine device=cpu",
        "precision.fp8_backend transformer_engine: Transformer Engine runs on NVIDIA GPUs only, and the device is cpu",
    ),
    ("parallel.zero_stage=3 parallel.reduce_gradients=step", "parallel.reduce_gradients is step, but zero_stage 3"),
    (
        "precision.high_layers=[norms,neck] precision.dtype=bf16",
        "precision.high_layers is 'neck': it must be a list of",
    ),
    ("data.mean=[0.1,0.2]", "data.mean has 2"),
    ("data.kind=image_folder data.size=256 data.path=/none", "data.path"),
    ("data.kind=digits data.size=256 model.num_classes=4", "model.num_classes is 4, but data.kind=digits has 10"),
]


@pytest.mark.parametrize(("given", "expected"), BAD_INPUT)
def test_bad_input_ends_with_code_2_and_one_line_before_ranks_talk(
    given: str,
    expected: str,
    tmp_path: Path,
    in_a_world_of_two: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if given == "device=cuda":
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    argv = [*flags(run_dir=str(tmp_path / "run")), *(f"--{part}" for part in given.split())]
    with pytest.raises(Left) as left:
        run_rank(pretrain_vit.main, argv, "pretrain_vit.py")
    assert left.value.args == (2,)
    shown = capsys.readouterr()
    assert shown.out == "" and len(shown.err.splitlines()) == 1
    assert shown.err.startswith(f"pretrain_vit.py: error: {expected}")


def test_more_stages_than_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*flags(), "--model.depth=1", "--parallel.pipeline_parallel_size=4", "--print_config"]
    code = run_rank(lambda a, w: pretrain_vit.main(a, World(size=4)), argv, "pretrain_vit.py")
    assert code == 2
    assert re.fullmatch(r".*error: .*size 4 is more than the 3 layers.*at most 3 stages.*\n", capsys.readouterr().err)


def test_a_batch_script_may_ask_and_do_what_is_work_for_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert run_rank(lambda argv, world: world.size, [], "prog", alone=True) == 1
    assert run_rank(lambda argv, world: world.size, ["--print_config"], "prog") == 1
    assert run_rank(pretrain_vit.main, ["--help"], "prog") == 0 and "--run_dir" in capsys.readouterr().out
    assert run_rank(lambda argv, world: 77, ["--train.steps=1"], "prog") == 2
    assert re.fullmatch(r"prog: error: this is the batch script .* 4 tasks.*\n", capsys.readouterr().err)


def fails(error: BaseException) -> int:
    def main(argv: Sequence[str], world: World) -> None:
        raise error

    return run_rank(main, [], "prog")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (DivergedError("step 3: loss nan"), 4, r"prog: training diverged: step 3: loss nan\n"),
        (DriftError("step 3: weights differ"), 1, r"prog: step 3: weights differ\n"),
        (PeerLostError("send failed: [/a/pair.cc:3] gone\nmore"), 1, r"prog: .* another rank: send failed: gone\n"),
        (KeyboardInterrupt(), 130, r"prog: interrupted\n"),
        (OSError("disk"), 1, r"prog: rank 0 of 2 failed:\nTraceback[\s\S]*OSError: disk\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, message: str, in_a_world_of_two: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Left) as left:
        fails(error)
    assert left.value.args == (code,)
    assert re.fullmatch(message, capsys.readouterr().err)


def test_only_the_first_rank_speaks(
    in_a_world_of_two: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_group, "first_to_report", lambda kind, rank: False)
    for error in (DivergedError(""), PeerLostError(""), OSError("")):
        with pytest.raises(Left):
            fails(error)
    assert capsys.readouterr().err == ""


def test_a_launcher_that_contradicts_itself_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "zero")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_rank(lambda argv, world: None, [], "prog") == 2
    assert re.fullmatch(
        r"prog: error: the launcher's variables RANK, WORLD_SIZE.*integers.*\n", capsys.readouterr().err
    )


# -- two ranks, each a process -----------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a program ended. seconds: it took."""

    code: int
    error: str
    seconds: float


def environment(**more: str) -> dict[str, str]:
    """This process's, without what a launcher sets."""
    launcher = re.compile(r"(RANK|WORLD_SIZE|MASTER_|LOCAL_|SLURM_|TORCHELASTIC_|OMP_NUM_THREADS)")
    return {k: v for k, v in os.environ.items() if not launcher.match(k)} | {"PYTHONPATH": str(ROOT)} | more


def start(argv: Sequence[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(*processes: subprocess.Popen[str], timeout: float = 120) -> list[Ended]:
    """Wait for all; none of the processes that they started may be left."""
    began, ended = time.monotonic(), []
    try:
        for process in processes:
            _, error = process.communicate(timeout=began + timeout - time.monotonic())
            ended.append(Ended(process.returncode, error, time.monotonic() - began))
        for process in processes:
            with pytest.raises(ProcessLookupError):
                os.killpg(process.pid, 0)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return ended


def two_ranks(launcher: str, script: str | Path, argv: Sequence[str], **more: str) -> Ended:
    return finish(start(["-m", launcher, "--nproc-per-node", "2", str(script), *argv], **more))[0]


def planted(folder: Path, what: str) -> Path:
    """pretrain_vit.py in which rank 1 meets with `what` at its fourth step; the time is noted in the file `when`."""
    script = folder / "planted.py"
    script.write_text(f"""
from parallel import parent

parent.end_with_launcher()

import multiprocessing, os, pathlib, signal, sys, time
import pretrain_vit
from engine.run.launch import run_rank
from engine.run.step import Stepper

train_step, steps = Stepper.train_step, 0

def step(self, *args):
    global steps
    steps += 1
    if self.assembly.grid.rank == 1 and steps == 4:
        pathlib.Path({str(folder / "when")!r}).write_text(str(time.time()))
        {what}
    return train_step(self, *args)

Stepper.train_step = step
sys.exit(run_rank(pretrain_vit.main, sys.argv[1:], "pretrain_vit.py"))
""")
    return script


def seconds_since(folder: Path) -> float:
    return time.time() - float((folder / "when").read_text())


def test_a_config_error_is_told_once(tmp_path: Path) -> None:
    ended = two_ranks("tools.launch", "pretrain_vit.py", flags(run_dir=str(tmp_path), model__widht="3"))
    assert ended.code == 2
    assert ended.error.splitlines() == ["pretrain_vit.py: error: unknown key model.widht: did you mean model.width?"], (
        ended.error
    )


FOURTH = """
import multiprocessing, os, pathlib, signal, time, torch
from engine.run.step import Stepper

def step(self, *args, step=Stepper.train_step):
    if rank == 1 and self.assembly.optimizer.steps == 3:
        pathlib.Path(folder, "when").write_text(str(time.time()))
        {what}
    return step(self, *args)

Stepper.train_step = step
"""


@pytest.mark.slow
def test_weights_that_drift_apart_end_the_run(tmp_path: Path) -> None:
    flip = "next(iter(self.assembly.parameters().values())).data.view(-1)[:1].view(dtype=torch.int32).bitwise_xor_(1)"
    argv = long_run(tmp_path / "run", train__check_interval="6")
    with running(tmp_path, 2, argv, planted=FOURTH.format(what=flip)) as run:
        assert run.codes() == [1, 1], run.said()
    told = re.findall(r"^prog: .*", run.said(), re.MULTILINE)
    assert [line.partition(" and ")[0] for line in told] == [
        "prog: step 6: weights of embed.weight differ between rank 0"
    ], run.said()
    assert steps_told(tmp_path / "run") == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_rank_that_raises_ends_all(tmp_path: Path) -> None:
    argv = long_run(tmp_path / "run")
    with running(tmp_path, 2, argv, planted=FOURTH.format(what="raise ZeroDivisionError('planted')")) as run:
        assert run.codes() == [1, 1], run.said()
        assert seconds_since(tmp_path) < 20
    lines = run.said(1).splitlines()
    lines = lines[lines.index("prog: rank 1 of 2 failed:") :]
    assert lines[-1] == "ZeroDivisionError: planted" and len(lines) < 25, lines
    assert run.said().count("Traceback") == 1 and run.said().count("prog: ") == 1, run.said()


@pytest.mark.slow
def test_a_data_worker_that_is_killed_is_not_taken_for_a_rank(tmp_path: Path) -> None:
    """By the launcher, which ends the other rank and says nothing of its own."""
    script = planted(tmp_path, "os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)")
    ended = two_ranks("tools.launch", script, flags(run_dir=str(tmp_path), train__steps="100000", data__workers="1"))
    assert ended.code == 1 and seconds_since(tmp_path) < 20
    told = r".*: rank 1 of 2 failed:[\s\S]*: a data worker, process \d+, was killed by signal 9 \(Killed\): .*\n"
    assert re.fullmatch(told, ended.error) and ended.error.count("Traceback") == 1, ended.error


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(tmp_path: Path) -> None:
    script = planted(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    ended = two_ranks("tools.launch", script, flags(run_dir=str(tmp_path), train__steps="100000"))
    assert ended.code == 128 + 9 and seconds_since(tmp_path) < 20
    assert ended.error.splitlines() == ["tools.launch: rank 1 was killed by signal 9 (SIGKILL)"], ended.error


@pytest.mark.slow
def test_torchrun_itself_adds_its_report_to_our_one_message(tmp_path: Path) -> None:
    argv = flags(run_dir=str(tmp_path), parallel__tensor_parallel_size="4")
    ended = two_ranks("torch.distributed.run", "pretrain_vit.py", argv, PET_MAX_RESTARTS="1")
    assert ended.code == 1  # torchrun's, whatever the ranks said
    ours, _, page = ended.error.partition("Traceback")
    assert ours.count("pretrain_vit.py: error: 2 ranks cannot be shared among") == 1
    assert ours.count("pretrain_vit.py: the run has ended with code 2, and is not tried again\n") == 1
    cause = page.partition("Root Cause")[2]
    assert "exitcode  : 2" in cause and "traceback : pretrain_vit.py: the run has ended with code 2" in cause
    assert "Traceback" not in page  # but torchrun's own


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while torch is imported", "inside a collective"])
@pytest.mark.parametrize("launcher", ["tools.launch", "torch.distributed.run"])
def test_ranks_end_with_a_killed_launcher(launcher: str, when: str, tmp_path: Path) -> None:
    """Rank 0 waits for rank 1, which sleeps in its fourth step; or neither has come further than its imports."""
    script = planted(tmp_path, "time.sleep(600)")
    argv = flags(run_dir=str(tmp_path), train__steps="100000", parallel__shared_memory="false")
    process = start(["-m", launcher, "--nproc-per-node", "2", str(script), *argv])
    ranks: list[int] = []
    try:
        while len(ranks) < 2 or (when == "inside a collective" and not (tmp_path / "when").exists()):
            assert process.poll() is None
            ranks = children(process.pid)
            time.sleep(0.05)
        time.sleep(0.5)  # for Python to start
        assert all(alive(rank) for rank in ranks)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while any(alive(rank) for rank in ranks):
            assert time.monotonic() < deadline, "a rank trains on"
            time.sleep(0.05)
    finally:
        for pid in (process.pid, *ranks):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def srun(script: str | Path, argv: Sequence[str]) -> list[subprocess.Popen[str]]:
    """Two ranks as srun starts them: no launcher of ours, its variables only."""
    port = free_port()
    job = str(port - 20000 if 20000 <= port < 40000 else 0)
    job_port = {} if job != "0" else {"MASTER_PORT": str(port)}  # the port follows from the job's number where it can
    return [
        start(
            [str(script), *argv],
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(rank),
            SLURM_NTASKS="2",
            SLURM_STEP_TASKS_PER_NODE="2",
            SLURM_STEP_NODELIST="localhost",
            SLURM_JOB_ID=job,
            **job_port,
        )
        for rank in range(2)
    ]


@pytest.mark.slow
def test_srun_starts_ranks_that_train_together(tmp_path: Path) -> None:
    argv = flags(run_dir=str(tmp_path), parallel__tensor_parallel_size="2")
    ranks = srun("pretrain_vit.py", argv)
    shown = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], shown
    assert [error for _, error in shown] == ["", ""]
    assert "x tensor 2 = 2 rank(s)" in shown[0][0] and shown[1][0] == ""
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3  # train, eval, save


@pytest.mark.slow
def test_a_rank_that_is_killed_under_srun_is_missed(tmp_path: Path) -> None:
    script = planted(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    other, killed = finish(*srun(script, flags(run_dir=str(tmp_path), train__steps="100000")))
    assert (other.code, killed.code, killed.error) == (1, -9, "") and seconds_since(tmp_path) < 20
    assert re.fullmatch(
        r"pretrain_vit.py: rank 0 lost contact with another rank: \w+ along the .* axis .*\n", other.error
    )


@pytest.mark.slow
def test_a_mistake_of_one_rank_alone_is_told_under_srun(tmp_path: Path) -> None:
    """Rank 0, which is well, waits for the other; that one finds its store, so it knows that it must speak."""
    script = tmp_path / "planted.py"
    script.write_text("""
import os, sys
import engine.run.device, pretrain_vit
from engine.errors import ConfigError
from engine.run.launch import run_rank

def choose(wanted, world):
    if world.rank == 1:
        raise ConfigError("local rank 1 has no GPU of its own")
    return chosen(wanted, world)

chosen, engine.run.device.choose_device = engine.run.device.choose_device, choose
sys.exit(run_rank(pretrain_vit.main, sys.argv[1:], "pretrain_vit.py"))
""")
    argv = flags(run_dir=str(tmp_path), parallel__timeout="5")
    _, mistaken = finish(*srun(script, argv))
    assert (mistaken.code, mistaken.error) == (2, "pretrain_vit.py: error: local rank 1 has no GPU of its own\n")
