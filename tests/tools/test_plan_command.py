"""`python -m tools.plan`: what its own options take, and the exit code of a mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import EXIT_USAGE
from tools.plan import command


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ranks", "0"], "--ranks: is 0"),
        (["--ranks", "-1"], "--ranks: is -1"),
        (["--ranks", "1e3"], "--ranks: is 1e3"),
        (["--ranks", "9" * 5000], "--ranks: is 999"),
        (["--ranks", "1", "--gpu-memory", "nan"], "--gpu-memory: is nan"),
        (["--ranks", "1", "--gpu-memory", "inf"], "--gpu-memory: is inf"),
        (["--ranks", "1", "--gpu-memory", "0"], "--gpu-memory: is 0"),
        (["--ranks", "1", "--gpu-memory", "1e300"], "--gpu-memory: is 1e300"),
        (["--best", "0"], "--best: 0 is not"),
        (["--ranks", "1", "--gpu-memory", "x"], "--gpu-memory: is x"),
        (["--ranks", "1", "--stages", "4"], "--stages: invalid choice: 4"),
    ],
)
def test_options_out_of_range(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(argv)
    assert caught.value.code == EXIT_USAGE and says in capsys.readouterr().err


def test_a_mistake_in_the_configuration_has_the_exit_code_of_training() -> None:
    argv = [sys.executable, "-m", "tools.plan", "--ranks", "1", "--model.width", "x"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == EXIT_USAGE
    assert done.stderr.strip() == "tools.plan: error: model.width is 'x': it must be an integer or null"
