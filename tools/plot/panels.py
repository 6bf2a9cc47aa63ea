"""What can be drawn of a run: panels, each of one or several curves, as x and y."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from engine.errors import ConfigError
from tools.plot.read import RECALLS, Numbers, Run, Table
from tools.plot.reduce import envelope, means, smooth, thinned

Axis = Literal["steps", "images", "time"]
_LARGEST = float(np.finfo(np.float32).max)  # of what a run computes: beyond it nothing is finite
_LEAST_WAIT = 5.0  # % of the time, from which on waiting for images is worth a panel


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a panel: `values` of the table of `event`."""

    label: str
    event: str
    values: Callable[[Table], Numbers]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One kind of number.

    Attributes:
        title: of the axes. unit: of y. curves: by which it is shown, where a run has them.
        from_zero: whether y begins at 0. noisy: whether smoothing is for it.
        can_be_null: whether null says that a number was not finite.
        tells: whether it is drawn unasked, of all values of a run that are numbers.
        summary: which one number says most: the last, or the median.
    """

    title: str
    unit: str = ""
    curves: Sequence[Curve]
    from_zero: bool = False
    noisy: bool = False
    can_be_null: bool = False
    tells: Callable[[Numbers], bool] = lambda values: True
    summary: Literal["last", "median"] = "last"


def _column(name: str, factor: float = 1.0) -> Callable[[Table], Numbers]:
    return lambda table: table[name] if factor == 1 else table[name] * factor


def _of_training(values: Callable[[Table], Numbers]) -> tuple[Curve, ...]:
    return (Curve(label="training", event="train", values=values),)


def _changes(values: Numbers) -> bool:
    return bool(values.min() != values.max())


_EVALUATION, _AVERAGE = "evaluation", "evaluation of the averaged weights"
_EVALUATED = (("", _EVALUATION), ("ema_", _AVERAGE))


def _of_evaluation(name: str, factor: float = 1.0) -> tuple[Curve, ...]:
    return tuple(Curve(label=label, event="eval", values=_column(of + name, factor)) for of, label in _EVALUATED)


PANELS: Mapping[str, Panel] = {
    "loss": Panel(
        title="loss", curves=(*_of_training(_column("loss")), *_of_evaluation("loss")), noisy=True, can_be_null=True
    ),
    "accuracy": Panel(title="accuracy", unit="%", curves=_of_evaluation("accuracy", 100)),
    "zero_shot": Panel(title="zero-shot accuracy", unit="%", curves=_of_evaluation("zero_shot_accuracy", 100)),
    **{
        way: Panel(title=f"recall@1, {way.replace('_', ' ')}", unit="%", curves=_of_evaluation(f"recall_{way}@1", 100))
        for way in RECALLS
    },
    "lr": Panel(title="learning rate", curves=_of_training(_column("lr")), from_zero=True),
    "grad_norm": Panel(title="gradient norm", curves=_of_training(_column("grad_norm")), noisy=True, can_be_null=True),
    "speed": Panel(
        title="images per second",
        unit="img/s",
        curves=_of_training(_column("images_per_second")),
        from_zero=True,
        noisy=True,
        summary="median",
    ),
    "memory": Panel(
        title="peak memory", unit="GiB", curves=_of_training(_column("peak_memory", 2**-30)), from_zero=True
    ),
    "mfu": Panel(
        title="model FLOPs utilisation",
        unit="%",
        curves=_of_training(_column("mfu", 100)),
        from_zero=True,
        noisy=True,
        summary="median",
    ),
    "waiting": Panel(
        title="waiting for images",
        unit="% of the time",
        curves=_of_training(lambda table: 100 * table["data_time"] / table["step_time"]),
        from_zero=True,
        noisy=True,
        tells=lambda values: bool(np.median(values) >= _LEAST_WAIT),
        summary="median",
    ),
    "bubble": Panel(
        title="pipeline bubble",
        unit="% of the pass",
        curves=_of_training(_column("bubble", 100)),
        from_zero=True,
        noisy=True,
        summary="median",
    ),
    "loss_scale": Panel(title="loss scale", curves=_of_training(_column("loss_scale")), tells=_changes),
    "skipped": Panel(
        title="skipped steps", curves=_of_training(_column("skipped_steps")), tells=lambda values: bool(values.any())
    ),
}
MARKS = ("saved", "skipped step", "resumed", "not finite")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A curve as it is drawn.

    Attributes:
        x, y: smoothed if that was asked for; then `raw` is what it was, as (x, y). count: of values, before any were
        left out. tells: whether the panel is to be drawn unasked. nulls: x of values that were not finite.
        summary: the number that says most; NaN: it was not finite.
    """

    x: Numbers
    y: Numbers
    raw: tuple[Numbers, Numbers] | None
    count: int
    tells: bool
    nulls: Numbers
    summary: float


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A run as it is drawn: curves by (name of the panel, label), x of each kind of mark, the largest x."""

    curves: Mapping[tuple[str, str], Trace]
    marks: Mapping[str, Numbers]
    end: float


def trace(run: Run, names: Sequence[str], axis: Axis, smoothing: float | None = None, *, to_average: bool) -> Traced:
    """The curves of some panels, without those of which the run has no number.

    Args:
        axis: what x is; of time, in seconds. smoothing: see `smooth`.
        to_average: curves become means of columns, of which means over runs can be taken, not envelopes.

    Raises:
        ConfigError: lines do not say where they are on the axis.
    """
    train_x = _train_x(run, axis)
    places = {event: _at(run, train_x, table["step"]) for event, table in run.tables.items()}
    curves = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        for name in names:
            for curve in PANELS[name].curves:
                y = curve.values(run.tables[curve.event])
                if (np.abs(y) <= _LARGEST).any() or (PANELS[name].can_be_null and curve.event == "train"):
                    how = smoothing if PANELS[name].noisy and curve.event == "train" else None
                    curves[name, curve.label] = _trace(PANELS[name], places[curve.event], y, how, to_average)
    marks = {
        "saved": thinned(np.unique(_at(run, train_x, run.tables["save"]["saved_step"]))),
        "skipped step": thinned(places["bad_step"]),
        "resumed": _at(run, train_x, run.resumed),
    }
    return Traced(
        curves=curves, marks=marks, end=float(max(train_x[-1], *(x.max() for x in places.values() if len(x))))
    )


def _trace(panel: Panel, x: Numbers, y: Numbers, smoothing: float | None, to_average: bool) -> Trace:
    y = np.where(np.abs(y) <= _LARGEST, y, np.nan)
    known = y[~np.isnan(y)]
    reduced = means if to_average else envelope
    drawn_x, drawn_y = reduced(x, y if smoothing is None else smooth(y, smoothing))
    last = y if panel.can_be_null else known  # where null is no number, it is what the last one was
    summary = float(np.median(known) if panel.summary == "median" else last[-1]) if len(known) else float("nan")
    return Trace(
        x=drawn_x,
        y=drawn_y,
        raw=None if smoothing is None else reduced(x, y),
        count=len(y),
        tells=(bool(len(known)) and panel.tells(known)) or panel.can_be_null,
        nulls=thinned(x[np.isnan(y)]) if panel.can_be_null else np.empty(0),
        summary=summary,
    )


def _train_x(run: Run, axis: Axis) -> Numbers:
    train = run.tables["train"]
    if axis == "steps":
        return train["step"]
    name = "samples" if axis == "images" else "wall_time"
    if missing := int((~np.isfinite(train[name])).sum()):
        raise ConfigError(
            f"{run.folder}: {missing} training line(s) have no {name}: choose another axis than --x {axis}"
        )
    if axis == "images":
        return train["samples"]
    clock, stood = run.still
    stood = np.concatenate([[0.0], stood])[np.searchsorted(clock, train["wall_time"], "right")]
    return np.maximum.accumulate(train["wall_time"] - run.began - stood)


def _at(run: Run, train_x: Numbers, step: Numbers) -> Numbers:
    """x of any steps: between training lines, and after them, in proportion."""
    known = np.concatenate([[0.0], run.tables["train"]["step"]])
    x = np.concatenate([[0.0], train_x])
    slope = (x[-1] - x[-2]) / max(known[-1] - known[-2], 1.0)
    return np.interp(step, known, x) + np.maximum(step - known[-1], 0.0) * slope
