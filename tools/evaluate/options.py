"""The command line of tools.evaluate: its own options, and keys of the configuration that say something here."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from engine.errors import ConfigError
from engine.evaluation import clusters, fewshot, knn, probe, sgd
from parallel.pipeline.costs import Limit
from tools.options import COUNT, Parser, add_json, add_weights, number, several

PROGRAM = "tools.evaluate"
TASKS = {
    "supervised": "loss and accuracy of the model's own classifier, as its run has evaluated it",
    "knn": "the vote of the nearest training images, by cosine",
    "probe": "a linear classifier on the features, by L-BFGS and by SGD",
    "fewshot": "regularised least squares on a few images of each class",
    "clustering": "clusters of training images, as many as classes and named at best (zero-label transfer)",
    "zero_shot": "classes described by texts (contrastive models)",
    "retrieval": "texts of images and images of texts (contrastive models)",
}
OF_FEATURES = ("knn", "probe", "fewshot", "clustering")
OF_TEXTS = ("zero_shot", "retrieval")
_ONLY_FOR = {
    "k": ("knn",), "temperature": ("knn",),
    "solver": ("probe",), "standardise": ("probe",), "l2_range": ("probe",), "l2_count": ("probe",),
    "l2_finest": ("probe",), "max_iterations": ("probe",), "tolerance": ("probe",), "lr": ("probe",),
    "weight_decay": ("probe",), "epochs": ("probe",), "batch": ("probe",),
    "shots": ("fewshot",), "seeds": ("fewshot",), "l2": ("fewshot",),
    "starts": ("clustering",),
    "features": OF_FEATURES,
}  # fmt: skip
_GROUPS = ("model.", "data.", "parallel.", "precision.", "text.")
_KEYS = ("train.micro_batch_size", "train.seed", "train.loss", "kernels", "device")
_POSITIVE = Limit(1e-300, 1e300)


def parse_options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options of this command, flags that are keys of the configuration).

    Raises:
        ConfigError: an option that is none, has a wrong value, or says nothing of this task.
    """
    parser = make_parser()
    options, flags = parser.parse_known_args(argv)
    for name, tasks in _ONLY_FOR.items():
        if options.task not in tasks and getattr(options, name) != parser.get_default(name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is of task {' and '.join(tasks)}, and --task is {options.task}: leave it "
                "out"
            )
    low, high = options.l2_range
    if low > high:
        raise ConfigError(f"--l2-range {low:g},{high:g} begins above its end: give the smaller number first")
    if low < high and options.l2_count == 1:
        raise ConfigError(
            f"--l2-count is 1, but --l2-range {low:g},{high:g} has two ends, which both are tried: give 2 or more, or "
            f"--l2-range {low:g},{low:g}"
        )
    _check_flags(flags)
    return options, flags


def _check_flags(flags: Sequence[str]) -> None:
    for flag in flags:
        key = flag.removeprefix("--").partition("=")[0]
        if flag.startswith("--") and not key.startswith(_GROUPS) and key not in _KEYS:
            raise ConfigError(
                f"--{key} is no option of an evaluation: see --help; of keys, those of model, text, data, parallel "
                f"and precision are, and {', '.join(_KEYS)}"
            )


def make_parser() -> argparse.ArgumentParser:
    """Of the options; all else is left over."""
    tasks = "\n".join(f"  {name:<11}{what}" for name, what in TASKS.items())
    parser = Parser(
        prog=PROGRAM,
        description=f"What a checkpoint's model is worth, in any layout, each image once.\n\ntasks:\n{tasks}",
        epilog="Keys of the configuration are flags of the same name: --data.path, --parallel.tensor_parallel_size, "
        "...; all that is not given is as in the checkpoint, but for the layout.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH",
        help="folder of a step, of all steps, or of a run; or what tools.convert reads",
    )  # fmt: skip
    parser.add_argument("--task", required=True, choices=TASKS, metavar="TASK", help=f"one of {', '.join(TASKS)}")
    add_weights(parser)
    parser.add_argument(
        "--features", choices=("pooled", "embedding"), default="pooled",
        help="what the classifier or projection is given (default), or what a contrastive projection gives",
    )  # fmt: skip
    add_json(parser)
    group = parser.add_argument_group("knn")
    group.add_argument("--k", type=several(number(COUNT)), metavar="K,K", help="neighbours (default: up to 200)")
    group.add_argument("--temperature", type=number(_POSITIVE), default=knn.TEMPERATURE, help="of weighted votes")
    _add_probe(parser.add_argument_group("probe"))
    group = parser.add_argument_group("fewshot")
    group.add_argument("--shots", type=several(number(COUNT)), default=list(fewshot.SHOTS), help="images of a class")
    group.add_argument("--seeds", type=several(number(Limit(0, 2**31, True))), default=list(fewshot.SEEDS))
    group.add_argument("--l2", type=several(number(_POSITIVE)), default=list(fewshot.GRID), help="strengths")
    group = parser.add_argument_group("clustering")
    group.add_argument("--starts", type=number(COUNT), default=clusters.STARTS, help="of k-means, the best counts")
    return parser


def _add_probe(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--solver", choices=("lbfgs", "sgd", "both"), default="both")
    group.add_argument("--standardise", action="store_true", help="each feature to mean 0 and deviation 1")
    powers = [10**power for power in (probe.STRENGTHS[0], probe.STRENGTHS[-1])]
    group.add_argument(
        "--l2-range", type=_pair, default=powers, metavar="LOW,HIGH", help="L-BFGS: ends of the sweep of l2"
    )
    group.add_argument("--l2-count", type=number(COUNT), default=len(probe.STRENGTHS), help="tried at first")
    group.add_argument(
        "--l2-finest", type=number(_POSITIVE), default=probe.FINEST, help="decades between the last that are tried"
    )
    group.add_argument("--max-iterations", type=number(COUNT), default=1000, help="of a fit by L-BFGS")
    group.add_argument(
        "--tolerance", type=number(_POSITIVE), default=1e-6, help="largest gradient of a fit's mean loss"
    )
    group.add_argument("--lr", type=several(number(_POSITIVE)), default=list(sgd.LEARNING_RATES), help="SGD: all tried")
    group.add_argument(
        "--weight-decay", type=several(number(Limit(0, 1e300))), default=list(sgd.WEIGHT_DECAYS), help="SGD: all tried"
    )
    group.add_argument("--epochs", type=number(_POSITIVE), default=sgd.EPOCHS, help="SGD: 1000 steps at least")
    group.add_argument("--batch", type=number(COUNT), default=sgd.BATCH, help="SGD: images of a step")


def _pair(text: str) -> list[float]:
    values = several(number(_POSITIVE))(text)
    if len(values) != 2:
        raise argparse.ArgumentTypeError(f"{text} is not two numbers, such as 1e-6,1e6")
    return values


def powers_of(options: argparse.Namespace) -> tuple[float, ...]:
    """Decimal logarithms of the l2 that are tried first: evenly spaced."""
    low, high = (math.log10(end) for end in options.l2_range)
    if low == high:
        return (low,)
    return tuple(low + (high - low) * i / (options.l2_count - 1) for i in range(options.l2_count))
