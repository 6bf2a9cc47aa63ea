"""What the labels of shards mean, the same for what is trained on and what is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.shards.catalogue import Catalogue

CLASS_MAP = "classes.txt"
"""Beside the shards that are trained on: the name of each class, one a line, in the order of the labels."""

_MOST = 10_000_000


@dataclass(frozen=True, kw_only=True)
class Classes:
    """What labels mean. numbers: [W] the label of each of a catalogue's words; None: labels are numbers as they are.
    names: of each label, if any."""

    numbers: NDArray[np.int64] | None
    count: int
    names: tuple[str, ...] | None

    def labels(self, words: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of what a store has in their place: [B] -> [B]."""
        return words if self.numbers is None else self.numbers[words]


def classes_of(catalogues: Sequence[Catalogue]) -> list[Classes | None]:
    """Those of the shards to train on and, if they are others, of those held out; None: there are no labels.

    Where all are numbers these are the labels; else labels number the words of the first catalogue, sorted, or the
    lines of classes.txt beside its shards.

    Raises:
        ValueError: some samples have labels and others none, or there are classes that the first ones do not have.
    """
    labelled = [catalogue for catalogue in catalogues if catalogue.words or catalogue.largest >= 0]
    if not labelled:
        return [None] * len(catalogues)
    for catalogue in catalogues:
        if catalogue.unlabelled:
            raise ValueError(
                f"{catalogue.given}: some samples have a label and others none, in {catalogue.unlabelled}: write these "
                "anew without them, or see data.label_column"
            )
    if len({bool(catalogue.words) for catalogue in labelled}) > 1:
        raise ValueError(
            f"the labels of {catalogues[0].given} and of {catalogues[1].given} are numbers on one side and names on "
            "the other: write them alike"
        )
    for catalogue in catalogues[1:]:
        if catalogue.names and catalogues[0].names and catalogue.names != catalogues[0].names:
            raise ValueError(
                f"{catalogues[0].given} and {catalogue.given} name their classes otherwise: "
                f"{_first_difference(catalogues[0].names, catalogue.names)}: write them alike"
            )
    names = class_map(catalogues[0])
    return _named(catalogues, names) if labelled[0].words else _numbered(catalogues, names)


def _numbered(catalogues: Sequence[Catalogue], names: tuple[str, ...] | None) -> list[Classes | None]:
    count = 1 + max(catalogue.largest for catalogue in catalogues)
    if count > (_MOST if names is None else len(names)):
        most = f"a label may be {_MOST - 1} at most" if names is None else f"{CLASS_MAP} has {len(names)} lines"
        raise ValueError(f"{catalogues[0].given} has label {count - 1}, but {most}: see .cls and data.label_column")
    return [Classes(numbers=None, count=count if names is None else len(names), names=names)] * len(catalogues)


def _named(catalogues: Sequence[Catalogue], names: tuple[str, ...] | None) -> list[Classes | None]:
    known = tuple(sorted(catalogues[0].words)) if names is None else names
    if unknown := sorted({word for catalogue in catalogues for word in catalogue.words} - set(known)):
        where = "data.path" if names is None else f"{CLASS_MAP} beside data.path"
        raise ValueError(
            f"shards have the classes {unknown[:5]}, which {where} does not have: see labels and {CLASS_MAP}"
        )
    labels = {name: number for number, name in enumerate(known)}
    return [
        Classes(
            numbers=np.array([labels[word] for word in catalogue.words], dtype=np.int64), count=len(known), names=known
        )
        for catalogue in catalogues
    ]


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    a, b = (repr(names[at]) if at < len(names) else "none" for names in (ours, theirs))
    return f"label {at} is {a} and {b}"


def class_map(catalogue: Catalogue) -> tuple[str, ...] | None:
    """The lines of classes.txt beside the first shard, or what the shards themselves say; None: neither says anything.
    Raises ValueError where the file is no good."""
    file = Path(catalogue.files[0]).parent / CLASS_MAP
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines())
    except FileNotFoundError:
        return catalogue.names or None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): give the name of each class, one a line") from error
    if "" in names:
        raise ValueError(
            f"{file}, line {names.index('') + 1} is empty, so that nobody can tell which label the next line names: "
            "give the name of each class, one a line"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"{file} names a class twice: give the name of each class once, one a line")
    return names
