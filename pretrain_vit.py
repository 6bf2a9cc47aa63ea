"""Train a Vision Transformer: `torchrun`, `srun` or plain `python` with this file. `--help` lists every option."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Sequence

from parallel import parent

if __name__ == "__main__":  # before the imports below, which take seconds
    parent.end_with_launcher()
    parent.end_by_interrupt()
    parent.hold_warnings()
    parent.spin_briefly()

from engine.config.cli import parse
from engine.errors import EXIT_DONE
from engine.run.launch import run_rank
from engine.run.trainer import pretrain
from parallel.process_group import World


def main(argv: Sequence[str], world: World) -> int:
    """Parse the command line and train, or print the resolved configuration. Returns the exit code."""
    quiet = contextlib.nullcontext() if world.rank == 0 else contextlib.redirect_stdout(io.StringIO())
    with quiet:  # --help on rank 0 alone
        config, only_print = parse(argv)
    if not only_print:
        return pretrain(config, world)
    if world.rank == 0:
        print(config.resolve(world.size).to_yaml(config), end="")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(run_rank(main, sys.argv[1:], "pretrain_vit.py"))
