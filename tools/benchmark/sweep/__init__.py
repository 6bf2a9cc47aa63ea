"""`python -m tools.benchmark sweep`: command.py explains it. Nothing is imported here before it is wanted: ranks, which
run.py is, have things to do before torch is there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel.process_group import World


def main(argv: Sequence[str], world: World) -> int:
    """See `tools.benchmark.sweep.command.main`."""
    from tools.benchmark.sweep import command

    return command.main(argv, world)
