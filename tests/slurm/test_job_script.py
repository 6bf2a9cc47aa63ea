"""What the batch scripts decide at each end of a job: they run as under SLURM, with programs in place of srun, scontrol
and the look at the nodes that do what the test says.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "tools" / "slurm"
PROGRAMS = {
    # one task, whose processes all have the signals that srun has
    "srun": """for word; do [ "$word" != --version ] || exit 0; done
while [[ $1 == --* ]]; do shift; done
set -m
trap 'if [ "$task" ]; then kill -USR1 -- -$task; else warned=1; fi' USR1
SLURM_PROCID=0 "$@" & task=$!
[ -z "$warned" ] || kill -USR1 -- -$task
while wait $task; code=$?; kill -0 $task 2> /dev/null; do :; done
exit $code""",
    "scontrol": """[ ! -e away ] || exit 1
[ "$1" != requeue ] || touch requeued
echo "JobId=7 $STATE" """,
    "python": 'env > looked; eval "$LOOK"',
    "sleep": "exec /usr/bin/sleep 0.1",
}
SAVES = 'echo "runs/a b/step-5" >> "$VITRUVIUS_CHECKPOINTS"; '
ASKED = "trap : TERM; kill -TERM $PPID; "  # the task's processes have SIGTERM, and the program heeds it
KILLED = "kill -TERM $PPID; kill -TERM $$"
STUCK = {"logs/7/stuck": "the start\nthe start\n"}
STATE = "Requeue=1 Restarts=0 BatchFlag=1 JobState=RUNNING PreemptTime=None"
PREEMPTED = STATE.replace("None", "2026-01-01T00:00:00")


@dataclass(frozen=True, kw_only=True)
class Case:
    """program: what the rank does. look: what the look at the nodes does. state: as scontrol shows it. files: that are
    there. code, told: of the job; None: any code, since it is requeued.
    """

    program: str
    told: str
    code: int | None = None
    look: str = ""
    state: str = STATE
    files: dict[str, str] = field(default_factory=dict)
    restart: int = 1


CASES = {
    # the program ends
    "done": Case(program="exit 0", code=0, told=""),
    "wrong": Case(program="exit 2", code=2, told=""),
    "diverged": Case(program="exit 4", code=4, told=""),
    "no such program": Case(program="exec pyhton", code=127, told="no such program"),
    "a fault": Case(program="exit 7", told="code 7: requeued, goes on from the start"),
    "a fault later": Case(program=SAVES + "exit 7", told="goes on from runs/a b/step-5", files=STUCK),
    "a third that has not got on": Case(program="exit 7", code=7, told="3 starts have not got beyond", files=STUCK),
    "killed": Case(program="kill -KILL $PPID", told="code 137: requeued"),
    "killed, and the others ended by srun": Case(
        program="echo 143 asked > logs/7/ended-1; kill -KILL $PPID", told="code 137: requeued"
    ),
    "its flags": Case(program=SAVES + "exit 3", code=3, told="stopped as its flags say"),
    # it is asked to
    "asked": Case(program=ASKED + SAVES + "exit 3", code=3, told="a signal that was not SLURM's: not requeued"),
    "asked before it could save": Case(program=KILLED, code=3, told="a signal that was not SLURM's: not requeued"),
    "a fault then": Case(program=ASKED + "exit 7", told="code 7: requeued"),
    "preempted": Case(program=ASKED + SAVES + "exit 3", state=PREEMPTED, told="code 3: requeued, goes on from runs/a"),
    "preempted before it could save": Case(
        program=KILLED, state=PREEMPTED, told="before it could save: requeued", files=STUCK
    ),
    "time limit": Case(
        program=f"trap '{SAVES} exit 3' USR1; kill -USR1 $SCRIPT; for i in 1 2 3 4 5; do sleep 1; done; exit 9",
        told="code 3: requeued, goes on from runs/a",
    ),
    "time limit, a third that has not got on": Case(
        program="kill -USR1 $SCRIPT; sleep 1; sleep 1", code=138, told="3 starts have not got beyond", files=STUCK
    ),
    "saves nothing": Case(program="exit 3", code=3, state=PREEMPTED, told="nothing was saved"),
    # SLURM
    "cancelled": Case(program="exit 143", code=143, state=STATE.replace("RUNNING", "CANCELLED"), told=""),
    "may not": Case(
        program="exit 7", code=7, state=STATE.replace("Requeue=1", "Requeue=0"), told="code 7; may not be requeued"
    ),
    "the controller is away": Case(program="touch away; exit 7", code=7, told="controller does not answer"),
    # the look
    "not fit": Case(program="", look="exit 10", code=2, told="a node is not fit"),
    "no look": Case(program="", look="exit 11", code=11, told="cannot be looked at"),
    "no python": Case(program="", look="exit 127", code=127, told="cannot be looked at"),
    "a node is lost": Case(program="", look="exit 1", told="code 1: requeued"),
    "asked at the look": Case(program="", look="kill -TERM $$", code=3, told="a signal that was not SLURM's"),
    "time limit at the look": Case(
        program="exit 0", look="kill -USR1 $SCRIPT", told="ended by a signal before it could save: requeued"
    ),
    # files
    "another cluster's": Case(program="exit 2", code=2, told="", files={"logs/7/ended-0": "0"}, restart=0),
    "of this start": Case(program="exit 2", code=2, told="", files={"logs/7/ended-1": "0"}),
    "a full disk": Case(program="exit 7", code=7, told="cannot be noted in logs/7/stuck: not requeued", files=STUCK),
}


def run(folder: Path, script: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A batch script in its folder, on the first of SLURM's nodes."""
    (folder / "bin").mkdir()
    for name, text in PROGRAMS.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    given = {"PATH": f"{folder}/bin:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"}
    given |= {"SLURM_TASKS_PER_NODE": "1", "LOOK": "", "STATE": STATE} | env
    script = f"export SCRIPT=$$\n{script}"
    return subprocess.run(["bash", "-c", script], cwd=folder, env=given, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_job(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    for path, text in case.files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    if name == "a full disk":
        (tmp_path / "logs/7/stuck").unlink()
        (tmp_path / "logs/7/stuck").symlink_to("/dev/full")
    (tmp_path / "program").write_text(case.program)
    done = run(
        tmp_path,
        f"source {SCRIPTS}/job.sh; on_all_ranks bash program",
        LOOK=case.look,
        STATE=case.state,
        SLURM_RESTART_COUNT=str(case.restart) if case.restart else "",
    )
    said = [line.partition("job: ")[2] for line in done.stdout.splitlines() if "job: " in line][1:]
    assert (tmp_path / "requeued").exists() == (case.code is None), done
    assert case.code in (None, done.returncode), done
    assert len(said) == bool(case.told) and case.told in "".join(said), done


def test_the_program_is_warned_once(tmp_path: Path) -> None:
    """A second signal would end it as it saves."""
    warned = "trap 'echo >> warned' USR1; for i in 1 2 3 4; do kill -USR1 $SCRIPT; sleep 1; sleep 1; done"
    (tmp_path / "program").write_text(warned)
    run(tmp_path, f"source {SCRIPTS}/job.sh; on_all_ranks bash program")
    assert (tmp_path / "warned").read_text() == "\n"


def test_a_look_sees_all_gpus_of_a_node(tmp_path: Path) -> None:
    """Those of the job, and not those of one task; and what it has is not kept from the program."""
    per_task = {"SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "per_task:1", "SLURM_GPUS_PER_NODE": "4"}
    run(tmp_path, f"source {SCRIPTS}/job.sh; on_all_ranks true", **per_task)
    looked = (tmp_path / "looked").read_text().splitlines()
    assert {"JOB_GPUS_PER_TASK=1", "SLURM_GPUS_PER_NODE=4", "SLURM_OVERLAP=1", "JOB_LOGS=logs/7"} <= set(looked)
    assert not [line for line in looked if line.startswith(("SLURM_GPUS_PER_TASK=", "SLURM_GPU_BIND="))]


def test_lines_of_a_list_have_a_shells_quotes(tmp_path: Path) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "tools").symlink_to(SCRIPTS.parent)
    (tmp_path / "own.txt").write_text("""# runs\n--a "x \\"y\\" z" '' b\\ c --d ''\n--a 'x\n""")
    script = (SCRIPTS / "sweep.sbatch").read_text().replace("list=tools/slurm/sweep.txt", "list=own.txt")
    script = script.replace("python pretrain_vit.py", r"printf '<%s>\n'")
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_JOB_ID": "9"}
    done = run(tmp_path, script, SLURM_ARRAY_TASK_ID="1", **array)
    words = ["--a", 'x "y" z', "", "b c", "--d", "", "--run_dir", "runs/sweep/1"]
    assert done.stdout.splitlines()[-len(words) :] == [f"<{word}>" for word in words], done
    bad = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={"SLURM_ARRAY_TASK_ID": "2", **array, "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert bad.returncode == 2 and bad.stderr == "job: No closing quotation: --a 'x\n"


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    """The last has the number of the whole array."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}
    done = run(tmp_path, f'scontrol() {{ echo "$@" >> asked; command scontrol "$@"; }}; source {SCRIPTS}/job.sh; '
               "on_all_ranks bash -c 'exit 1'", **array)  # fmt: skip
    assert (tmp_path / "asked").read_text() == "--oneliner show job 7_2\nrequeue 7_2\n", done
