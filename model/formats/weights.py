"""A model's weights wherever they lie: tensors by our names, read one at a time, beside a description of the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor

from model.formats.base import ConversionError, Description, Shape
from model.formats.pairs import shapes_of
from model.formats.rules import Rule, expected, place_of, stacked
from model.formats.sources import Entry, Source, Without, fingerprint
from parallel.checkpoint.read import Target

Which = Literal["weights", "average"]
CARRIED = "carried/"  # begins the names of tensors in a checkpoint that are kept for the way back
_SHOWN = 10
_DERIVED = (".relative_position_index", ".attn_mask")  # buffers that older files hold, made of sizes alone


class Format(Protocol):
    """The format of another library.

    Attributes:
        kind: its name on the command line. title: in words.
        container: `npz`, or how its safetensors file is called: `model`.
    """

    kind: str
    title: str
    container: str

    def recognises(self, source: Source) -> bool:
        """Whether names of tensors, or the JSON files beside them, say that it is of this kind."""

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """The model, from JSON files and shapes.

        Args:
            given: keys of the model for what the source does not say (number of heads, epsilon).

        Raises:
            ConversionError: by name, for what our model has not, and for what is not known.
        """

    def rules(self, description: Description) -> list[Rule]:
        """One for each of our tensors. Raises ConversionError, by name, for what this format cannot express."""

    def carries(self, name: str) -> bool:
        """Whether a tensor has no part in what the model makes of an image (a text tower, a mask token), and is kept as
        it is for the way back."""

    def files(self, description: Description) -> dict[str, Any]:
        """JSON files that belong beside the tensors. Raises ConversionError, as `rules`."""


class Weights(Protocol):
    """Tensors by our names.

    Attributes:
        path: where they lie. kind: of format. description: of the model. tensors: of the model, whole.
        carried: tensors of `description.origin.kind` that are kept for the way back, by their names there.
    """

    path: Path
    kind: str
    description: Description
    tensors: Mapping[str, Entry]
    carried: Mapping[str, Entry]

    def read(self, name: str) -> Tensor:
        """One of `tensors`. Raises ConversionError if it is damaged."""

    def read_carried(self, name: str) -> Tensor:
        """One of `carried`."""

    def close(self) -> None:
        """Let go of all files."""


class StoredWeights(Weights, Protocol):
    """Weights that lie in files.

    Attributes:
        left_out: names of tensors there that are neither of the model nor carried.
    """

    left_out: Sequence[str]

    @property
    def identity(self) -> str:
        """Path, kind, and a hash that another file or folder is not likely to have; not all of it is read for it."""

    def fill(self, wanted: Mapping[str, Sequence[Target]]) -> None:
        """Fill boxes of `tensors`, whole tensors in memory one at a time. Raises ConversionError if one is damaged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class ForeignWeights(StoredWeights):
    """Those of another library's checkpoint.

    Args:
        given: keys of the model for what the source does not say. leave_out: patterns of names there (`text_model.*`)
            of what may be dropped. only_model: whatever has no part in the model is dropped, nothing is carried.

    Raises:
        ConversionError: tensors are missing, surplus, or of other shapes: the first ten.
    """

    def __init__(
        self,
        source: Source,
        form: Format,
        *,
        given: Mapping[str, Any] | None = None,
        leave_out: Sequence[str] = (),
        only_model: bool = False,
    ) -> None:
        self.left_out: Sequence[str] = [
            name for name in source.tensors if matches(name, leave_out) or name.endswith(_DERIVED)
        ]
        self._source: Source = Without(source, frozenset(self.left_out))
        source = self._source
        self.path, self.kind = source.path, form.kind
        self.description = _described(source, form, given or {})
        rules = form.rules(self.description)
        gone = [name for name in self.left_out if not name.endswith(_DERIVED)]
        if gone and self.description.origin is not None:  # what it was there, it is no more
            origin = replace(self.description.origin, variant="", config={})
            self.description = replace(self.description, origin=origin)
        shapes = shapes_of(self.description)
        wanted = stacked(expected(rules, shapes))
        others = [name for name in source.tensors if name not in wanted]
        if only_model:
            self.left_out, others = [*self.left_out, *others], []
        self.carried: Mapping[str, Entry] = {name: source.tensors[name] for name in others if form.carries(name)}
        _check(source, form, wanted, [name for name in others if name not in self.carried])
        self._rules = {name: r for r in rules for name in r.names}
        self.tensors: Mapping[str, Entry] = {name: Entry(shape, self._dtype(name)) for name, shape in shapes.items()}
        for r in rules:
            if not r.ours:  # what our model has no place for must be what it is without
                r.to_ours([source.read(*place_of(there)) for there in r.theirs])

    def _dtype(self, name: str) -> torch.dtype:
        dtypes = [self._source.tensors[place_of(there)[0]].dtype for there in self._rules[name].theirs]
        found = dtypes[0] if dtypes else self._usual_dtype()
        for dtype in dtypes[1:]:
            found = torch.promote_types(found, dtype)
        return found

    def _usual_dtype(self) -> torch.dtype:
        return next(e.dtype for e in self._source.tensors.values() if e.dtype.is_floating_point)

    def read(self, name: str) -> Tensor:
        """As Weights."""
        found = self._rules[name]
        values = found.to_ours([self._source.read(*place_of(there)) for there in found.sources])
        if found.more:
            lengths = [self.tensors[other].shape[0] for other in found.names]
            values = values.split(lengths)[found.names.index(name)]
        return values.to(self.tensors[name].dtype)

    def read_carried(self, name: str) -> Tensor:
        """As Weights."""
        return self._source.read(name)

    @property
    def identity(self) -> str:
        """As StoredWeights."""
        return f"{self.path} ({self.kind}, {fingerprint(self._source)})"

    def fill(self, wanted: Mapping[str, Sequence[Target]]) -> None:
        """As StoredWeights."""
        for name, targets in wanted.items():
            values = self.read(name)
            for box, place in targets:
                place.copy_(box.of(values, (0,) * values.dim()))

    def close(self) -> None:
        """As Weights."""


def _described(source: Source, form: Format, given: Mapping[str, Any]) -> Description:
    try:
        return form.describe(source, given)
    except ConversionError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:  # JSON or shapes of no sense
        raise ConversionError(f"{source.path} does not describe {form.title}: {error}") from error


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is one of the patterns, of shells."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check(source: Source, form: Format, wanted: Mapping[str, Shape], surplus: Sequence[str]) -> None:
    there = source.tensors
    wrong = [f"{n}: missing, it should be {list(shape)}" for n, shape in wanted.items() if n not in there]
    wrong += [f"{n} {list(there[n].shape)}: of no use to this model" for n in surplus]
    wrong += [
        f"{n}: {list(there[n].shape)}, it should be {list(shape)}"
        for n, shape in wanted.items()
        if n in there and there[n].shape != shape
    ]
    if not wrong:
        return
    more = [f"and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
    cure = " (--leave_out PATTERN drops what you do not need)" if surplus else ""
    head = f"{source.path} does not have the tensors of {form.title}{cure}:"
    raise ConversionError("\n  ".join([head, *wrong[:_SHOWN], *more]))
