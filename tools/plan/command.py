"""python -m tools.plan --config FILE --cluster FILE [--ranks N]       the best layouts of a configuration on a machine
python -m tools.plan --config FILE --cluster FILE --explain LAYOUT  one layout: where its time and memory go
python -m tools.plan --config FILE --ranks N [--gpu-memory GB]      memory at each ZeRO stage, without a machine
python -m tools.plan --measure --out FILE                           a cluster file of this machine (--measure --help)
python -m tools.plan --anchors                                      the time model beside published figures

A layout is written tensor=8,pipeline=4,schedule=1f1b,zero=1,micro_batch=2; there are also sequence=on|off, context,
virtual and data; what it leaves out is as in the configuration. Options that are not the planner's own are those of
pretrain_vit.py. The batch is that of the configuration (--train.global_batch_size). docs/planning.md tells more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.clusters import read_cluster
from engine.config import Config
from engine.config.cli import parse
from engine.errors import ConfigError
from tools.benchmark.table import show
from tools.options import COUNT, number
from tools.places import check_place
from tools.plan import memory, refusals, words, written
from tools.plan.bounds import Misfit
from tools.plan.evaluate import Evaluator, Prediction
from tools.plan.layouts import Space, read_layout, read_values
from tools.plan.picture import draw
from tools.plan.refusals import room
from tools.plan.search import Search

_CLUSTER = "configs/clusters/h100_64.yaml"


def main(argv: Sequence[str]) -> None:
    """Plan and print.

    Raises:
        ConfigError: what is asked for cannot be.
    """
    options, flags = _parser().parse_known_args(argv)
    given = [*(part for file in options.config for part in ("--config", file)), *flags]
    if options.json is not None:
        check_place(Path(options.json))
    if options.cluster is None:
        alone = {f"--{name}": getattr(options, name) for name in ("explain", "only", "out", "picture", "best")}
        alone["--cut"] = options.cut or None
        if idle := [name for name, given in alone.items() if given is not None]:
            raise ConfigError(f"{idle[0]} is for the search, which needs a machine: give --cluster, such as {_CLUSTER}")
        if options.ranks is None:
            raise ConfigError(
                f"give --cluster FILE (such as {_CLUSTER}) to search for layouts, or --ranks N for the memory of "
                "this one"
            )
        config, _ = parse([*written.ANY_DATA, *given], "tools.plan")
        rows = memory.rows(config, options.ranks, options.gpu_memory or 80.0, options.stages or range(4))
        show(rows, options.json)
        return
    for name in ("gpu_memory", "stages"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} has no effect with --cluster, which says how much memory there is, and "
                "whose search tries all ZeRO stages: leave it out (--only zero=1 for one)"
            )
    for name in ("only", "best", "picture"):
        if options.explain is not None and getattr(options, name) is not None:
            raise ConfigError(f"--{name} is for the search, and --explain tells of one layout: leave one of both out")
    _search(options, given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", metavar="FILE", action="append", default=[], help="of the run, as of pretrain_vit.py"
    )
    parser.add_argument("--ranks", type=_ranks, help="world size to plan for (default: the machine's devices)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to this file")
    search = parser.add_argument_group("search for layouts")
    search.add_argument("--cluster", metavar="FILE", help=f"the machine, such as {_CLUSTER}")
    search.add_argument("--explain", metavar="LAYOUT", help="tell of this layout alone")
    search.add_argument("--only", metavar="LAYOUT", help="look at layouts alone that have these values")
    search.add_argument("--best", type=number(COUNT), metavar="N", help="arrangements of ranks to show (default 5)")
    search.add_argument(
        "--cut", action="store_true",
        help="cut layers into stages together with save sets where ranks have several stages, too: some minutes",
    )  # fmt: skip
    search.add_argument("--out", metavar="FILE", help="write the configuration that runs the best (or explained) one")
    search.add_argument("--picture", metavar="FILE.png", help="draw the least step time over memory")
    alone = parser.add_argument_group("memory without a machine")
    alone.add_argument("--gpu-memory", type=_gigabytes, help="GB of each device (default 80)")
    alone.add_argument("--stages", type=int, nargs="+", choices=range(4), help="ZeRO (default: all)")
    return parser


def _ranks(text: str) -> int:
    if not (text.isdecimal() and 1 <= len(text) <= 7 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"is {text}: it must be a number of ranks from 1 to 9999999")
    return int(text)


def _gigabytes(text: str) -> float:
    try:
        if 0 < (size := float(text)) <= 1e9:
            return size
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"is {text}: it must be a positive number of GB, at most 1e9")


def _search(options: argparse.Namespace, given: Sequence[str]) -> None:
    if options.out is not None:
        check_place(Path(options.out))
    if options.picture is not None:
        from tools.figures import check_place as check_picture  # which takes half a second to import

        check_picture(Path(options.picture))
    config, _ = parse([*written.ANY_DATA, *given], "tools.plan")
    refusals.check_objective(config)
    cluster = read_cluster(options.cluster)
    ranks = options.ranks or cluster.devices
    evaluator = Evaluator(config, cluster.of_ranks(ranks), ranks)
    print(f"{ranks} ranks of {cluster.name}, {config.train.global_batch_size} images per step, {room(evaluator)}")
    if unread := words.found_anyway(config):
        print(f"whatever is given, these are found for each layout: {unread}")
    if options.explain is not None:
        found: Sequence[Prediction] = [_explained(options, config, evaluator)]
    else:
        found = _found(options, config, evaluator)
    if options.json:
        written.show_json(found, options.json)
    if options.out:
        written.write(found[0], given, Path(options.out), options.cluster)
        print(f"{options.out} runs {'it' if options.explain else 'the first'} on {ranks} ranks")


def _explained(options: argparse.Namespace, config: Config, evaluator: Evaluator) -> Prediction:
    layout = read_layout(options.explain, config, evaluator.ranks, "--explain")
    found = evaluator.exactly(layout)
    if isinstance(found, Misfit) and layout.pipeline > 1:
        found = evaluator.exactly(layout, cuts=True)  # as a run does, which other stages may fit
    if isinstance(found, Misfit):
        raise ConfigError(refusals.too_large(found, evaluator))
    found = evaluator.cut(found, several=options.cut)
    show(words.rows([found]))
    print("\nWhere the time of a step goes:")
    print(*words.where_time_goes(found), sep="\n")
    print(*words.as_written(found), sep="\n")
    return found


def _found(options: argparse.Namespace, config: Config, evaluator: Evaluator) -> Sequence[Prediction]:
    began = time.perf_counter()
    only = {} if options.only is None else read_values(options.only, "--only")
    space = Space(config=config, ranks=evaluator.ranks, only=only)
    refusals.check(space, evaluator, options.only)
    found = Search(space, evaluator).best(options.best or 5)
    if not found.best:
        raise ConfigError(refusals.none_fits(found, evaluator))
    cut = sorted((evaluator.cut(p, several=options.cut) for p in found.best), key=lambda p: p.seconds)
    found = replace(found, best=tuple(cut))
    show(words.rows(found.best))
    first = found.best[0]
    print(f"\nWhere the time of a step goes, of {first.layout}:")
    print(*words.where_time_goes(first), sep="\n")
    print(*words.as_written(first), sep="\n")
    if len(found.best) > 1:
        print("\nWhy others lose (the best of each arrangement of ranks):")
        print(*(words.why_slower(p, first) for p in found.best[1:]), sep="\n")
    if found.misfits:
        print("\nMight be quicker, but do not fit:")
        print(*words.misfits(found.misfits, evaluator.budget), sep="\n")
    if config.parallel.schedule_policy != "static":
        print(f"\nparallel.schedule_policy {config.parallel.schedule_policy}: bounds hold for static alone, so that a "
              "quicker layout may have been left out")  # fmt: skip
    print(f"\n{words.looked_at(found, evaluator, time.perf_counter() - began)}")
    if options.picture is not None:
        draw(space, evaluator, found, Path(options.picture))
        print(f"{options.picture}: the least step time over memory")
    return found.best
