"""Curves of any length as what a picture can show: smoothed, then of no more points than its columns of pixels need."""

from __future__ import annotations

import math

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tools.plot.read import Numbers

COLUMNS = 1000  # of one panel: more than it has pixels
_AT_ONCE = 1 << 20  # numbers in memory for medians


def envelope(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """The curve with at most four points in each column: first, least, greatest and last, which colour the same pixels
    as all of them. No peak is lost; where all of a column is NaN there is a gap. x must not go down.
    """
    if len(x) <= 4 * COLUMNS:
        return x, y
    starts, ends = _columns(x)
    middle = (x[starts] + x[ends]) / 2
    low, high = np.fmin.reduceat(y, starts), np.fmax.reduceat(y, starts)
    return (
        np.stack([x[starts], middle, middle, x[ends]], axis=1).ravel(),
        np.stack([y[starts], low, high, y[ends]], axis=1).ravel(),
    )


def means(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """The curve with one point in each column: its mean without NaN, for curves of which others are made."""
    if len(x) <= 4 * COLUMNS:
        return x, y
    starts, ends = _columns(x)
    finite = np.isfinite(y)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    total = np.add.reduceat(np.where(finite, y, 0.0), starts)
    return (x[starts] + x[ends]) / 2, np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def thinned(x: Numbers) -> Numbers:
    """Places of marks, of those in one column the first."""
    return x if len(x) <= COLUMNS else x[_columns(x)[0]]


def _columns(x: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """First and last index of each column that has points."""
    column = np.minimum((x - x[0]) * (COLUMNS / ((x[-1] - x[0]) or 1.0)), COLUMNS - 1).astype(np.int64)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(column)) + 1])
    return starts, np.append(starts[1:], len(x)) - 1


def smooth(y: Numbers, how: float) -> Numbers:
    """Below 1 an exponential average with that weight on what went before, corrected for its start, as TensorBoard has
    it; from 2 on the median of that many values around each. Values that are NaN stay so, and count for nothing.
    """
    return _average(y, how) if how < 1 else _medians(y, int(how))


def _average(y: Numbers, weight: float) -> Numbers:
    result, total, known = np.empty_like(y), 0.0, 0.0
    for i, value in enumerate(y.tolist()):
        if not math.isnan(value):
            total, known = weight * total + (1 - weight) * value, weight * known + (1 - weight)
            value = total / known
        result[i] = value
    return result


def _medians(y: Numbers, width: int) -> Numbers:
    """Of the values that are known; windows are cut off at both ends of the curve."""
    places, result = np.flatnonzero(~np.isnan(y)), y.copy()
    known = y[places]
    before, after = (width - 1) // 2, width // 2  # of each value
    for i in range(before, len(known) - after, rows := max(1, _AT_ONCE // width)):
        windows = sliding_window_view(known[i - before : i + rows + after], width)
        result[places[i : i + len(windows)]] = np.median(windows, axis=1)
    for i in (*range(min(before, len(known))), *range(max(before, len(known) - after), len(known))):
        result[places[i]] = np.median(known[max(0, i - before) : i + after + 1])
    return result
