"""`python -m tools.plan`: the best layouts on a machine, or memory of one (command.py), with --measure a cluster file
(measure.py), with --anchors the time model beside published figures (anchors.py).
"""

from __future__ import annotations

import sys

from parallel import parent

if __name__ == "__main__":  # before the imports below, which take seconds
    parent.end_with_launcher()
    parent.end_by_interrupt()

from engine.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from engine.run.launch import run_rank
from tools.benchmark.table import show
from tools.plan import anchors, command, measure


def run(argv: list[str]) -> int:
    """Do what is asked for; returns the exit code."""
    if "--measure" in argv:
        return run_rank(measure.main, argv, "tools.plan", alone=True)
    if argv == ["--anchors"]:
        show(anchors.rows())
        return EXIT_DONE
    try:
        command.main(argv)
    except ConfigError as error:
        print(f"tools.plan: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
