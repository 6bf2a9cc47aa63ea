"""Whatever a user gives for keys, what comes of it is a run or one ConfigError, before ranks talk, and soon."""

from __future__ import annotations

import time
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.config.cli import parse
from engine.config.keys import key_types
from engine.errors import ConfigError
from engine.objectives import make_objective
from engine.optimizers.schedules import check_schedule
from engine.run.trainer import check_profile, total_steps
from tests.engine.small import flags

IMAGES = 32
SECONDS = 10.0  # of one case on a busy machine; what loops over a size takes minutes

INTEGERS = [-(2**64), -1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 48, 1000, 65536, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = [
    "-1",
    "0",
    "1e-320",
    "1e-45",
    "1e-8",
    "0.1",
    "0.5",
    "1",
    "1.1",
    "4",
    "1e4",
    "1e10",
    "1e30",
    "1e39",
    "1e300",
    "1e308",
]
NUMBERS += [".nan", ".inf", "-.inf"]
TEXTS = [
    "",
    "x",
    "~",
    "null",
    "true",
    "[]",
    "[[]]",
    "{}",
    "a: b",
    "*",
    "&a [*a]",
    "[" * 60,
    "full",
    "'",
    "\\",
    "é",
    "1" * 400,
    "- x",
    "#",
]


def _texts(hint: Any) -> st.SearchStrategy[str]:
    """Values of a type as they stand on the command line, in range and far out of it."""
    if get_origin(hint) is Literal:
        return st.sampled_from([str(value) for value in get_args(hint)])
    if hint is bool:
        return st.sampled_from(["true", "false"])
    if hint is int:
        return st.sampled_from([str(value) for value in INTEGERS])
    if hint is float:
        return st.sampled_from(NUMBERS)
    if get_origin(hint) is tuple:
        return st.lists(_texts(get_args(hint)[0]), max_size=4).map(lambda parts: f"[{', '.join(parts)}]")
    args = [arg for arg in get_args(hint) if arg is not type(None)]
    return st.one_of(*map(_texts, args)) if args else st.sampled_from(TEXTS)


# A run's folder and what is read from disk are for other tests.
KEYS = {key: hint for key, hint in key_types().items() if key not in ("run_dir", "data.path", "data.val_path")}


# Made once: to make and look through strategies takes longer than to draw from them.
_SOME_KEYS = st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=4, unique=True)
_ANY_TEXT = st.sampled_from([*TEXTS, *NUMBERS, *map(str, INTEGERS)])
_VALUES = {key: st.one_of(*[_texts(hint)] * 3, _ANY_TEXT) for key, hint in KEYS.items()}
_RANKS = st.sampled_from([1, 2, 8])


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], int]:
    """(flags, ranks): a small run with a few keys set to values of their type, or now and then to any text."""
    return [*flags(), *(f"--{key}={draw(_VALUES[key])}" for key in draw(_SOME_KEYS))], draw(_RANKS)


def check(argv: list[str], ranks: int) -> None:
    """All that is checked before a process group exists and does not hang on this machine."""
    config = parse(argv)[0].resolve(ranks)
    steps = total_steps(config, IMAGES)
    check_schedule(config.schedule, steps)
    check_profile(config, steps)
    make_objective(config)
    assert config.num_micro_batches(config.grid_shape(ranks)) >= 1


@pytest.mark.slow
@settings(max_examples=1000, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(command_lines())
def test_any_configuration_runs_or_is_refused_in_one_line(case: tuple[list[str], int]) -> None:
    argv, ranks = case
    started = time.monotonic()
    try:
        check(argv, ranks)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, argv
    assert time.monotonic() - started < SECONDS, argv


@pytest.mark.parametrize(
    "flag",
    [
        "--train.seed=18446744073709551616",
        "--train.epochs=1e308",
        "--train.global_batch_size=2147483648",
        "--parallel.bucket_mib=1e308",
        "--parallel.timeout=1e10",
        "--parallel.timeout=1e300",
        "--precision.fp8_history=1000000000000",
        "--model.attention=",
        "--model.attention=[]",
        "--model.layer_scale=1e39",
        "--model.head_bias=1e39",
        "--model.depth=9223372036854775808",
        "--model.width=2147483647",
        "--data.mean=[.nan]",
        "--model.stages=&a [*a]",
        "--model.stages=" + "[" * 1000,
        "--schedule.timescale=3",
        "--schedule.warmup_steps=100",
    ],
)
def test_what_once_crashed_is_refused(flag: str) -> None:
    """In one line that names the key."""
    given = flags()
    if "epochs" in flag:
        given = [*given, "--train.steps=null"]
    if "fp8" in flag:
        given = [*given, "--precision.dtype=fp8"]
    with pytest.raises(ConfigError) as caught:
        check([*given, flag], 1)
    assert flag.removeprefix("--").partition("=")[0].rpartition(".")[2] in str(caught.value)
    assert "\n" not in str(caught.value)
