"""`python -m tools.convert --to KIND SRC DST`: weights from one format to another, on a CPU, tensor by tensor.

SRC is a checkpoint of this program (a step's folder, that of all steps, of a run), or a file or folder of another
library, whose kind is recognised. Neither library needs to be installed, no model is built, nothing is downloaded, and
nothing in SRC is executed. What DST cannot express is refused by name; what has no part in the model (a text tower) is
kept in a checkpoint of this program for the way back. docs/conversion.md has what each kind carries.

Keys of the model are flags (--model.num_heads 12) for what SRC does not say.

`python -m tools.convert --reshard "tensor=2 data=4 zero=3" SRC DST` rewrites a checkpoint of this program, with all its
state, into the files that ranks of that layout would have written; keys of the configuration are flags.

Exit codes: 0 done; 1 converted, but the two differ (--verify); 2 refused, then nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from engine.config.cli import parse
from engine.device import peak_memory_bytes
from engine.errors import EXIT_DONE, EXIT_FAULT, EXIT_USAGE, ConfigError
from model import ModelConfig
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError
from model.formats.checkpoint import CheckpointWeights
from model.formats.pairs import has_texts
from model.formats.positions import with_table
from model.formats.registry import KINDS, PAIRS, VITRUVIUS, target
from model.formats.weights import Weights
from tools.convert import report, verify
from tools.convert.reshard import reshard
from tools.convert.runners import vitruvius

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str]) -> int:
    """Convert, print, and return the exit code. Raises ConversionError or ConfigError for what is refused."""
    keys, own = _apart(argv)
    options, strange = _parser().parse_known_args(own)
    flags = [*keys, *strange]
    if options.reshard is not None:
        _check_alone(options)
        reshard(options.source, options.destination, options.reshard, flags)
        return EXIT_DONE
    if options.to is None:
        raise ConversionError(f"--to is missing: say which kind {options.destination} is to be: {', '.join(KINDS)}")
    given = _given(flags)
    whole = options.to in (VITRUVIUS, *PAIRS) if options.towers is None else options.towers == "both"
    with open_weights(
        options.source,
        options.kind,
        config=options.source_config,
        given=given,
        leave_out=options.leave_out,
        which="average" if options.weights in ("ema", "average") else "weights",
        whole=whole,
    ) as weights:
        _check_towers(weights, options, whole=whole)
        _check_given(weights, given)
        if options.json is not None:
            _check_file(options.json)
        if options.verify:
            _check_libraries(weights.kind, options.to)
        print("\n".join(report.lines_of(weights)), flush=True)
        started, before = time.perf_counter(), peak_memory_bytes(torch.device("cpu"))
        save_weights(
            weights,
            options.destination,
            options.to,
            dtype=_DTYPES.get(options.dtype),
            leave_out=options.leave_out,
            scan=options.scan,
        )
        done = report.Written(
            options.destination,
            options.to,
            report.size_of(options.destination),
            time.perf_counter() - started,
            peak_memory_bytes(torch.device("cpu")) - before,
        )
        print("\n".join([*report.unsaid(weights, options.to), done.line()]), flush=True)
        found = _verified(weights, options, told=bool(given or options.source_config)) if options.verify else []
        if options.json is not None:
            facts = {"from": weights.kind, "to": done.kind, "bytes": done.bytes, "seconds": done.seconds}
            facts |= {"memory_bytes": done.above, "verified": [asdict(d) for d in found or []]}
            options.json.write_text(json.dumps(facts, indent=1) + "\n")
        return EXIT_DONE if found is not None and all(d.small for d in found) else EXIT_FAULT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    kinds = ", ".join(KINDS)
    parser.add_argument("source", type=Path, metavar="SRC", help="file or folder")
    parser.add_argument(
        "destination", type=Path, metavar="DST", help="folder (big_vision: .npz file) that is not there yet"
    )
    parser.add_argument("--from", dest="kind", metavar="KIND", default="auto", help=f"of SRC: auto (default), {kinds}")
    parser.add_argument("--to", metavar="KIND", help=f"of DST: {kinds}")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the tensors in DST (default: as in SRC)")
    parser.add_argument(
        "--weights", choices=("weights", "average", "ema"), default="weights", help="of a run: average (ema) of them"
    )
    parser.add_argument(
        "--leave_out",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors that may be dropped: 'text_model.*'",
    )
    parser.add_argument(
        "--towers",
        choices=("image", "both"),
        help="of image and text: both (default, where SRC and the kind of DST have two), or that of images alone",
    )
    parser.add_argument("--reshard", metavar="LAYOUT", help="instead: cut for 'tensor=2 pipeline=2 data=4 zero=3'")
    parser.add_argument("--scan", action="store_true", help="to big_vision: layers stacked, for models that scan")
    parser.add_argument("--source_config", type=Path, metavar="FILE", help="config.json of SRC, if it is not beside it")
    parser.add_argument("--verify", action="store_true", help="run both models on photographs and compare, in fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write figures to this file")
    return parser


def _apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Keys of the configuration with their values (`--model.num_heads 12`, `--model.num_heads=12`), and all else."""
    keys, own, words = list[str](), list[str](), iter(argv)
    for word in words:
        if word.startswith("--") and "." in word.partition("=")[0]:
            keys += [word] if "=" in word else [word, *[value for value in [next(words, None)] if value is not None]]
        else:
            own.append(word)
    return keys, own


def _check_alone(options: argparse.Namespace) -> None:
    """Raise ConversionError for what --reshard, which changes no tensor, has no use for."""
    others = ("kind", "to", "dtype", "weights", "leave_out", "towers", "scan", "source_config", "verify", "json")
    for name in others:
        if getattr(options, name) != _parser().get_default(name):
            flag = "from" if name == "kind" else name
            raise ConversionError(f"--{flag} and --reshard, which changes no tensor: give one of the two")


def _given(flags: Sequence[str]) -> dict[str, Any]:
    """Keys of the model among the flags. Raises ConfigError for any other flag."""
    for flag in flags:
        if flag.startswith("--") and not flag.startswith("--model."):
            raise ConfigError(
                f"{flag.partition('=')[0]} is no flag of tools.convert: see --help; of keys, --model.* are"
            )
    model = parse([*flags], "tools.convert")[0].model
    values = {f.name: getattr(model, f.name) for f in fields(ModelConfig)}
    return {f.name: values[f.name] for f in fields(ModelConfig) if values[f.name] != f.default}


def _check_given(weights: Weights, given: dict[str, Any]) -> None:
    model = weights.description.model
    for key, value in given.items():
        if (there := getattr(model, key)) != value:
            raise ConversionError(
                f"{weights.path} says that model.{key} is {there}, not {value}: leave --model.{key} out"
            )


def _check_towers(weights: Weights, options: argparse.Namespace, *, whole: bool) -> None:
    """Raise ConversionError where not as many towers are there as are asked for, or one would go unsaid."""
    pair = weights.description.pairing is not None
    if options.towers == "both" and not pair:
        raise ConversionError(f"--towers both: {weights.path} has one tower, of images")
    ours = isinstance(weights, CheckpointWeights) and has_texts(weights.manifest.config)
    if ours and not whole and options.towers is None:
        target(options.to, pair=True)


def _check_file(path: Path) -> None:
    """Raise ConversionError where a file cannot be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise ConversionError(f"--json {path} cannot be written: {error.strerror}") from error


def _check_libraries(*kinds: str) -> None:
    for kind in kinds:
        if (name := verify.missing_library(kind)) is not None:
            raise ConversionError(f"--verify runs {kind} by {name}, which is not installed: pip install {name}")


def _verified(weights: Weights, options: argparse.Namespace, *, told: bool) -> list[verify.Difference] | None:
    """Compare, and print each difference; None where the other library does not run what was written.

    Args:
        told: whether something was said on the command line that SRC does not say.
    """
    inputs = verify.inputs_for(weights.description)
    if options.dtype is None and options.weights == "weights":
        source, what = verify.source_outputs(weights, inputs, told=told), weights.kind
    else:  # the same numbers, which SRC has not
        same = weights if options.to == VITRUVIUS else with_table(weights)  # rounded as what is written
        source = vitruvius.run_weights(same, *inputs, dtype=_DTYPES.get(options.dtype))
        what = f"{VITRUVIUS} with {options.weights} of SRC" + (f" in {options.dtype}" if options.dtype else "")
    try:
        written = verify.outputs(options.destination, options.to, *inputs)
    except Exception as error:  # of that library
        print(f"verify    the class that {options.to} is for does not run it: {error}")
        return None
    found = list(verify.differences(source, written))
    print("\n".join(report.verified(found, what, options.to)))
    return found


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConversionError, ConfigError) as refused:
        print(f"tools.convert: {refused}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
