"""Lists of one name per layer, and the short form in which they are written: `[window, window, full] * 4, full`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MOST_LAYERS = 10_000  # what is beyond is a slip of the keyboard

_PATTERN = re.compile(
    r"\s*(?:\[(?P<list>[^\[\]]*)\]|(?P<one>\w[\w+-]*))\s*(?:\*\s*(?P<times>\d{1,9}))?\s*(?P<comma>,)?\s*"
)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """How lists of some kind of name are written, and what is said of those that are none.

    Attributes:
        check: raises ValueError for what is no name. noun: a name is called so. things: so are the layers that have one
            each, by their plural. example: a pattern. example_of: one for two layers or more.
    """

    check: Callable[[str], object]
    noun: str
    things: str
    example: str
    example_of: Callable[[int], str]

    def parse(self, value: str | Sequence[str], depth: int, key: str) -> tuple[str, ...]:
        """One name per layer.

        Args:
            value: a name for all layers; a list of names, each of which may be repeated as in `window * 3`; or the same
                as one text: `[window, window, full] * 4`, `window * 3, full`. What is shorter than the model is an
                error, not a pattern to go on with.
            depth: number of layers. key: of the configuration, for messages.

        Raises:
            ValueError: an unknown name, text that is no pattern, or a number of names that is not `depth`.
        """
        names = self.expand(value, key)
        if is_one_name(value):
            return names * depth
        if len(names) != depth:
            example = f", such as '{self.example_of(depth)}'" if depth > 1 else ""
            raise ValueError(
                f"{key} names {len(names)} {self.things[: -1 if len(names) == 1 else None]}, but there "
                f"{'is' if depth == 1 else 'are'} {depth}: give one {self.noun} for all, or {depth} of them{example}"
            )
        return names

    def expand(self, value: str | Sequence[str], key: str) -> tuple[str, ...]:
        """All names of a list or a text. Raises ValueError as `parse` does, but for their number."""
        parts = [value] if isinstance(value, str) else list(value)
        return tuple(name for part in parts for name in self._expand(part, key))

    def _expand(self, text: str, key: str) -> list[str]:
        names: list[str] = []
        place, expects_more = 0, True
        while place < len(text):
            found = _PATTERN.match(text, place)
            if found is None or found.end() == place or not expects_more:
                raise ValueError(f"{key} {text!r} is not a pattern: write a {self.noun}, a list, or '{self.example}'")
            inner = found["one"] or found["list"]
            times = int(found["times"] or 1)
            several = self._expand(inner, key) if found["list"] is not None else [self._known(inner, key)]
            if len(names) + len(several) * times > MOST_LAYERS:
                raise ValueError(
                    f"{key} {text!r} names more than {MOST_LAYERS} {self.things}, which is more than a model may have"
                )
            names += several * times
            place, expects_more = found.end(), found["comma"] is not None
        return names

    def _known(self, name: str, key: str) -> str:
        try:
            self.check(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        return name


def is_one_name(value: str | Sequence[str]) -> bool:
    """Whether it is a single name, which is then meant for all layers."""
    return isinstance(value, str) and re.fullmatch(r"\s*\w[\w+-]*\s*", value) is not None
