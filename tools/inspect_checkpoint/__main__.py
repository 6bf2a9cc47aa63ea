"""`python -m tools.inspect_checkpoint PATH [OTHER]`: what is in a checkpoint, whether it is whole; or how two differ.

PATH is the folder of a step, of all steps (then the newest) or of a run. Every checksum is compared, and all damage is
named. With OTHER, tensors are compared bit for bit, whatever layouts they were saved in. Tensors are read part by part:
it takes little memory, and no GPU.

Exit codes: 0 all is well (or all tensors are equal), 1 something is damaged (or differs), 2 PATH is no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

import torch

from engine.errors import EXIT_DONE, EXIT_FAULT
from parallel.checkpoint.manifest import FILE, CheckpointError, NoCheckpointError
from parallel.checkpoint.place import newest
from parallel.checkpoint.read import Reader
from tools.commands import run_command
from tools.inspect_checkpoint.one import inspect, print_damage
from tools.inspect_checkpoint.text import finite
from tools.inspect_checkpoint.two import compare_two


class Refusal(Exception):
    """What was asked for cannot be: exit code 2."""


def main(argv: Sequence[str]) -> int:
    """Print; returns the exit code. Raises Refusal."""
    options = _options(argv)
    torch.set_num_threads(1)  # files are read by threads of their own
    with ExitStack() as stack:
        output = stack.enter_context(_output(options.json)) if options.json else None
        try:
            readers = [stack.enter_context(_open(path)) for path in (options.path, options.other) if path is not None]
        except NoCheckpointError as error:
            raise Refusal(str(error)) from error
        except CheckpointError as error:
            damage = [{"file": FILE, "tensor": None, "why": str(error)}]
            print_damage(damage, checked=True)
            _write(output, {"path": str(options.path), "damage": damage})
            return EXIT_FAULT
        found = compare_two(*readers) if len(readers) > 1 else inspect(readers[0], options)
        _write(output, found)
        return EXIT_FAULT if found["damage"] or found.get("different") else EXIT_DONE


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools.inspect_checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a step, of all steps, or of a run")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another one, to be compared with")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="the same")
    parser.add_argument("--norms", action="store_true", help="Frobenius norm, least, most, count of what is not finite")
    parser.add_argument("--pieces", action="store_true", help="which boxes of each tensor are where")
    parser.add_argument("--config", action="store_true", help="the configuration of the run, too")
    parser.add_argument("--no-check", action="store_true", help="compare no checksums (but of what --norms reads)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all that is found to this file")
    options = parser.parse_args(argv)
    if options.other is not None and options.compare is not None:
        parser.error("OTHER is given twice")
    options.other = options.compare if options.other is None else options.other
    if options.other is not None and (options.norms or options.pieces or options.config or options.no_check):
        parser.error("--norms, --pieces, --config and --no-check are about one checkpoint: leave OTHER out, or them")
    return options


def _output(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8")
    except OSError as error:
        raise Refusal(f"--json {path} cannot be written: {error.strerror}") from error


def _open(path: Path) -> Reader:
    try:
        folder = newest(path)
    except CheckpointError as error:
        raise NoCheckpointError(str(error)) from error
    return Reader(folder, threads=min(os.cpu_count() or 1, 8), whole=False)


def _write(output: TextIO | None, found: Mapping[str, Any]) -> None:
    if output is not None:
        json.dump(finite(found), output, indent=1, allow_nan=False)
        output.write("\n")


if __name__ == "__main__":
    run_command(main, "tools.inspect_checkpoint", Refusal)
