"""Patterns of attention kinds: every form, and each mistake in one line."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from model.kinds import KINDS, parse_kinds

W, F = "window", "full"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("full", [F] * 3),  # one kind for all layers
        (" window ", [W] * 2),
        ("window, full", [W, F]),
        ("[window, full]", [W, F]),
        ("[window,window,full]*2", [W, W, F] * 2),
        ("[window, window, full] * 2, full", [W, W, F, W, W, F, F]),
        ("window * 3, full", [W, W, W, F]),
        ("[window * 2, full] * 2", [W, W, F, W, W, F]),
        ("\n  [ window ]  *  2  ,\n  full", [W, W, F]),
        (["window", "full"], [W, F]),
        (("window * 2", "full"), [W, W, F]),
        (("[window, full] * 2", "linear"), [W, F, W, F, "linear"]),
        (("full",), [F]),
        (list(KINDS), list(KINDS)),
    ],
)
def test_forms(value: str | Sequence[str], expected: list[str]) -> None:
    assert parse_kinds(value, len(expected)) == tuple(expected)


@pytest.mark.parametrize(
    ("value", "depth", "message"),
    [
        ("dense", 2, "model.attention: 'dense' is no kind of attention: choose among full, window, shifted_window, .*"),
        (("window", "Full"), 2, "model.attention: 'Full' is no kind of attention: choose among .*causal"),
        ("3", 2, "model.attention: '3' is no kind of attention: choose among .*"),
        *(
            (text, 2, f"model.attention {re.escape(repr(text))} is not a pattern: write a kind, a list, or .*")
            for text in (
                "window full", "window * ", "window ** 2", "window * -1", "[window", "window]", "* 2", "-", ", window",
                "[[window] * 2]", "window * two", "[window, full] 2", "window,, full", "window * 1.5",
            )
        ),
        ("", 2, "model.attention names 0 layers, but there are 2: give one kind for all, or 2 of them, .*"),
        ((), 2, "model.attention names 0 layers, but there are 2: .*"),
        ("window * 1", 2, r"model.attention names 1 layer, but there are 2: .* such as '\[window, full\] \* 1'"),
        (("full",), 2, "model.attention names 1 layer, but there are 2: .*"),  # a list is never spread over the layers
        ("[window, full] * 3", 5, r".* 6 layers, but there are 5: .* such as '\[window, full\] \* 2, full'"),
        ("window, full", 1, "model.attention names 2 layers, but there is 1: give one kind for all, or 1 of them"),
        ("window, full", 0, "model.attention names 2 layers, but there are 0: .*"),
    ],
    ids=repr,
)  # fmt: skip
def test_mistakes(value: str | Sequence[str], depth: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        parse_kinds(value, depth)


def test_the_key_is_named() -> None:
    for wrong in ("dense", "full full", "full, full"):
        with pytest.raises(ValueError, match=r"^model\.stages\[1\]\.attention"):
            parse_kinds(wrong, 3, "model.stages[1].attention")


@pytest.mark.parametrize("depth", range(2, 8))
def test_the_cure_is_one(depth: int) -> None:
    with pytest.raises(ValueError, match="such as") as caught:
        parse_kinds("full * 9", depth)
    text = re.search(r"such as '(.*)'", str(caught.value))
    assert text and len(parse_kinds(text[1], depth)) == depth
