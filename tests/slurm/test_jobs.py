"""The batch scripts on a SLURM cluster of two nodes, edited and submitted as a user would.

All jobs run side by side on one cluster, so that their waiting is shared: what a test submits is submitted when the
cluster is there.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.engine.small import flags
from tests.slurm.cluster import Cluster, cluster, wait_for
from tools.inspect_checkpoint.__main__ import main as inspect_checkpoint

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tools" / "slurm"
ENVIRONMENT = f'export PATH={Path(sys.executable).parent}:"$PATH" OMP_NUM_THREADS=1'
STEPS = 200
TWO_NODES = "--nodes=2 --ntasks-per-node=1"
RUNNING = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "PREEMPTED", "NODE_FAIL", ""}
NUMBERS = ("step", "samples", "epoch", "loss", "lr", "grad_norm")
LIST = "# seeds\n\n--train.seed 3\n--train.seed 4 --optimizer.lr '2e-3'\n"

pytestmark = pytest.mark.slow


@dataclass
class Site:
    """Where a user submits: a checkout of this project, and what has been submitted from there."""

    cluster: Cluster
    folder: Path
    jobs: dict[str, str] = field(default_factory=dict)

    def submit(self, name: str, script: str, lines: tuple[str, str], *options: str) -> None:
        """Edit the marked lines (the first and the third; the second is this machine's) and submit, as job `name`."""
        edited = self.folder / f"{name}.sbatch"
        edited.write_text(edit((SCRIPTS / script).read_text(), (f"#SBATCH {lines[0]}", ENVIRONMENT, lines[1])))
        done = self.cluster.call("sbatch", "--parsable", *options, edited, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        self.jobs[name] = done.stdout.strip()

    def train(self, name: str, *options: str, nodes: str = TWO_NODES, **keys: str) -> None:
        """The name of the run's folder stands in a recipe."""
        keys = {"log__interval": "1", "train__steps": str(STEPS), "config": f"{name}.yaml"} | keys
        (self.folder / f"{name}.yaml").write_text(f"run_dir: runs/{name}\n")
        given = shlex.join(flags(**keys))
        self.submit(name, "pretrain_vit.sbatch", (nodes, f"run=(python pretrain_vit.py {given})"), *options)

    def state(self, name: str) -> dict[str, str]:
        return self.cluster.job(self.jobs[name])

    def states(self, name: str) -> list[str]:
        """Of an array's tasks, in order; those that wait together are one of no number."""
        shown = self.cluster.call("scontrol", "-o", "show", "job", self.jobs[name]).stdout
        found = re.findall(r"ArrayTaskId=(\S+) .*?JobState=(\w+)", shown)
        return [state for _, state in sorted(found)]

    def wait(self, name: str, seconds: float = 150.0) -> tuple[str, str]:
        """Until the job has ended: (state, exit code)."""
        self.wait_for(name, lambda: self.state(name).get("JobState", "") not in RUNNING, seconds, "its end")
        return self.state(name)["JobState"], self.state(name)["ExitCode"].partition(":")[0]

    def log(self, name: str) -> str:
        """What the job has printed."""
        own = re.compile(rf".*-{self.jobs[name]}(_\d+)?\.log")
        return "".join(path.read_text() for path in sorted(self.folder.iterdir()) if own.fullmatch(path.name))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Training lines of metrics.jsonl."""
        path = self.folder / "runs" / name / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [line for line in found if line["event"] == "train"]

    def step(self, name: str) -> int:
        return max((line["step"] for line in self.lines(name)), default=0)

    def wait_for_step(self, name: str, step: int, seconds: float = 150.0) -> None:
        self.wait_for(name, lambda: self.step(name) >= step, seconds, f"step {step}")

    def wait_for_restart(self, name: str, restart: int) -> int:
        """Until the job has gone back into the queue so many times: the step after which it last stopped by itself."""
        self.wait_for(name, lambda: int(self.state(name).get("Restarts", 0)) >= restart, 150, f"restart {restart}")
        return int(re.findall(r"stopped after step (\d+) of", self.log(name))[-1])

    def wait_for(self, name: str, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Until something is true of a job, which is shown where it does not come true."""
        try:
            wait_for(condition, seconds, f"job {name}: {what}")
        except pytest.fail.Exception as error:
            pytest.fail("\n".join([str(error), str(self.state(name)), *self.log(name).splitlines()[-40:]]))

    def limit(self, name: str, minutes: int) -> None:
        """Give a job so many minutes from now."""
        hours, passed, _ = map(int, self.state(name)["RunTime"].split(":"))
        limit = f"timelimit={60 * hours + passed + minutes}"
        assert self.cluster.call("scontrol", "update", f"jobid={self.jobs[name]}", limit).returncode == 0


def edit(script: str, lines: tuple[str, str, str]) -> str:
    """The script with each marked line, which is the one after a comment with its number, replaced."""
    for number, line in enumerate(lines, 1):
        script, count = re.subn(rf"(?m)^(# {number}\. .*\n).*$", lambda found, new=line: found[1] + new, script)  # type: ignore[misc]
        assert count == 1
    return script


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    for entry in ROOT.iterdir():
        if entry.name not in (".git", "runs", "logs") and entry.suffix != ".log":
            (folder / entry.name).symlink_to(entry)
    (folder / "list.txt").write_text(LIST)
    with cluster() as made:
        site = Site(made, folder)
        site.train("limited", nodes="--nodes=1 --ntasks-per-node=1", train__steps="100000", log__interval="5")
        site.wait_for_step("limited", 5)
        site.limit("limited", 2)  # SLURM looks at limits every 30 s, and warns at once where less than 150 are left
        site.train("misfit", "--partition=urgent", parallel__tensor_parallel_size="4")
        broken = ("--partition=urgent", "--array=1-2", "--output=%x-%A_%a.log")
        site.submit("broken", "pretrain_vit.sbatch", (TWO_NODES, "run=(bash -c 'exit 7')"), *broken)
        given = shlex.join(flags(train__steps="4", run_dir="runs/sweep"))
        array = ("--array=1-3 --nodes=1 --ntasks-per-node=1", f"list=list.txt run=(python pretrain_vit.py {given})")
        site.submit("sweep", "sweep.sbatch", array, "--partition=urgent")
        sweep = ["sweep", "--grid", "zero=0", "--steps", "2", "--rounds", "1", "--json", "sweep.jsonl", *flags()]
        command = f"run=(python -m tools.benchmark {shlex.join(sweep)})"
        site.submit("benchmark", "benchmark.sbatch", (TWO_NODES, command), "--partition=urgent")
        yield site


def test_a_job_at_its_time_limit_goes_on(site: Site) -> None:
    saved = site.wait_for_restart("limited", 1)
    site.limit("limited", 60)
    site.wait_for_step("limited", saved + 5)
    log = site.log("limited")
    assert f"step-{saved:08d}, step {saved} of" in log and "(SIGUSR1 to rank 0)" in log
    assert site.cluster.call("scancel", site.jobs["limited"]).returncode == 0  # see the last test


def test_tasks_that_the_layout_does_not_fit_are_told_in_one_line(site: Site) -> None:
    assert site.wait("misfit") == ("FAILED", "2") and site.state("misfit")["Restarts"] == "0"
    others = r"srun: |slurmstepd|\[.*job: start|node "
    told = [line for line in site.log("misfit").splitlines() if not re.match(others, line)]
    assert len(told) == 1 and "2 ranks cannot be shared" in told[0]


def test_a_job_that_does_not_get_on_is_given_up(site: Site) -> None:
    """Each task of an array by itself."""
    site.wait_for("broken", lambda: not RUNNING & set(site.states("broken")), 150, "its end")
    for task in (1, 2):
        state = site.cluster.job(f"{site.jobs['broken']}_{task}")
        assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "7:0", "2")
    assert site.log("broken").count("3 starts have not got beyond the start: not requeued") == 2


def test_each_line_of_a_list_is_a_run(site: Site) -> None:
    """The array has a task more than the list has lines."""
    site.wait_for("sweep", lambda: not RUNNING & set(site.states("sweep")), 150, "its end")
    assert site.states("sweep") == ["COMPLETED", "COMPLETED", "FAILED"]
    assert "list.txt has no line 3" in site.log("sweep")
    first, second = (site.lines(f"sweep/{number}")[-1] for number in (1, 2))
    assert first["step"] == second["step"] == 4 and first["loss"] != second["loss"]


def test_layouts_are_measured_on_the_tasks_of_a_job(site: Site) -> None:
    assert site.wait("benchmark") == ("COMPLETED", "0")
    lines = [json.loads(line) for line in (site.folder / "sweep.jsonl").read_text().splitlines()]
    assert [line["ranks"] for line in lines if line.get("status") == "done"] == [2]


def test_a_job_is_preempted_and_loses_a_node_and_has_the_numbers_of_one_that_was_not_disturbed(site: Site) -> None:
    """What is disturbed is in the partition that gives way, and takes most of the nodes' CPUs."""
    site.train("disturbed", "--cpus-per-task=20")
    site.train("undisturbed", "--partition=urgent")
    site.wait_for_step("disturbed", 20)
    asked = time.time()
    room = ("--partition=urgent", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=20", "--output=/dev/null")
    assert site.cluster.call("sbatch", *room, "--wrap", "sleep 1").returncode == 0
    saved = site.wait_for_restart("disturbed", 1)
    site.wait_for_step("disturbed", saved + 10)
    first = next(line for line in site.lines("disturbed") if line["step"] == saved + 1)
    print(f"preemption to first resumed step: {first['wall_time'] - asked:.1f} s")

    assert site.wait("undisturbed") == ("COMPLETED", "0")
    reached, asked = site.step("disturbed"), time.time()
    assert reached < STEPS, "the job has ended before its node"
    site.cluster.hosts.crash(1)
    site.wait_for_restart("disturbed", 2)
    print(f"a dead node is missed after {time.time() - asked:.1f} s")
    site.cluster.hosts.join()
    site.cluster.start_node(1)
    assert site.wait("disturbed") == ("COMPLETED", "0")

    ours, theirs = (
        [[line[key] for key in NUMBERS] for line in site.lines(name)] for name in ("disturbed", "undisturbed")
    )
    assert len(ours) == STEPS and ours == theirs
    ends = [str(site.folder / "runs" / name / "checkpoints") for name in ("disturbed", "undisturbed")]
    assert inspect_checkpoint(ends) == 0  # weights, and the state of the optimizer
    log = site.log("disturbed")
    assert log.count("job: start") == 3 and log.count("node host0: ") == log.count("node host1: ") == 3
    assert f"resume: from runs/disturbed/checkpoints/step-{saved:08d}, step {saved} of" in log
    ranks = site.folder / "logs" / site.jobs["disturbed"]
    assert "step 200/200" in (ranks / "rank-0.log").read_text() and (ranks / "rank-1.log").exists()


def test_a_job_that_is_cancelled_saves_and_does_not_go_on(site: Site) -> None:
    assert site.wait("limited")[0] == "CANCELLED" and site.state("limited")["Restarts"] == "1"
    assert "(SIGTERM to rank 0)" in site.log("limited")
