"""How far a run has come, by which a job is requeued or given up, is what rank 0 has told."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

JOB = Path(__file__).resolve().parents[2] / "tools" / "slurm" / "job.sh"
FOLDER = "runs/a b/checkpoints"  # of the recipe
RESUMED = f"resume: from {FOLDER}/step-00000036, step 36 of 400\n"
SAVED = f" saved {FOLDER}/step-00000212: 0.2 MB in 1.55 s; deleted 36\n"


def shell(tmp_path: Path, lines: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A few lines of a job's script, after the functions that it has; `scontrol` says that the job runs."""
    (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> asked\necho "JobState=RUNNING PreemptTime=None"\n')
    (tmp_path / "scontrol").chmod(0o755)
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **env}
    script = f"source {JOB}\nrun=(python pretrain_vit.py --config own.yaml)\nmkdir -p $logs\n{lines}"
    return subprocess.run(["bash", "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("log", "told"),
    [("", "the start"), (RESUMED, f"{FOLDER}/step-00000036"), (RESUMED + SAVED, f"{FOLDER}/step-00000212")],
)
def test_progress_is_what_rank_0_has_told(tmp_path: Path, log: str, told: str) -> None:
    (tmp_path / "log").write_text(log)
    assert shell(tmp_path, "cp log $logs/rank-0.log; progress").stdout == f"{told}\n"


def test_a_run_that_gets_on_is_requeued_without_end_and_one_that_does_not_is_given_up(tmp_path: Path) -> None:
    lines = "printf '{log}' > $logs/rank-0.log; printf '%s\\n' {starts} > $logs/starts; stop=1; end 3"
    stuck = " ".join(["runs/x/step-00000005"] * 3)
    log = " saved runs/x/step-00000005: 1\\n"
    assert (
        "requeued, goes on from runs/x/step-00000005" in shell(tmp_path, lines.format(log=log, starts="a b c")).stdout
    )
    assert "requeue 7" in (tmp_path / "asked").read_text()
    given_up = shell(tmp_path, lines.format(log=log, starts=stuck))
    assert given_up.returncode == 3 and "3 starts in a row have not got beyond" in given_up.stdout
    nothing = shell(tmp_path, lines.format(log="no", starts="a"))
    assert nothing.returncode == 3 and "nothing was saved" in nothing.stdout
    assert (tmp_path / "asked").read_text().count("requeue") == 1


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    """The last has the number of the whole array."""
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    shell(tmp_path, "echo a > $logs/starts; end 1", **array)
    assert (tmp_path / "asked").read_text() == "--oneliner show job 7_2\nrequeue 7_2\n"
