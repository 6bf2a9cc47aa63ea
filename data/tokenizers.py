"""From texts to tokens of one static length. The default tokenizer needs no vocabulary: its tokens are bytes.

Shapes: n texts, S tokens of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class Tokenizer(ABC):
    """Texts as integers.

    Attributes:
        name: what the configuration calls it. vocabulary_size: tokens are below. start, end: what goes before and
            after the tokens of a text; no start: None. pad: what fills up a text that is shorter than others.
    """

    name: str
    vocabulary_size: int
    start: int | None
    end: int
    pad: int

    @property
    def added(self) -> int:
        """How many tokens a text has beside its own: start and end."""
        return 1 if self.start is None else 2

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, without start and end, of whatever length."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of all that tokens depend on: equal where the vocabulary is."""

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """[n, S] with S = `length`: start, if there is one, tokens, end, then pad. Of a text that is too long the last
        tokens go.
        """
        return self.encode_counted(texts, length)[0]

    def encode_counted(self, texts: Sequence[str], length: int) -> tuple[NDArray[np.int64], int]:
        """As `encode`, and how many of the texts were cut.

        Raises:
            ValueError: if not even start, one token and end fit.
        """
        if length <= self.added:
            raise ValueError(
                f"texts of {length} tokens hold nothing beside their start and end: {self.added + 1} is the least"
            )
        first = self.added - 1
        rows = np.full((len(texts), length), self.pad, dtype=np.int64)
        cut = 0
        for row, found in zip(rows, self.tokens(texts), strict=True):
            kept = found[: length - self.added]
            cut += len(kept) < len(found)
            if self.start is not None:
                row[0] = self.start
            row[first : first + len(kept)], row[first + len(kept)] = kept, self.end
        return rows, cut


def encodable(text: str) -> str:
    """Without lone surrogates, which have no bytes: question marks."""
    return text.encode("utf-8", errors="replace").decode()


class ByteTokenizer(Tokenizer):
    """The bytes of a text in UTF-8, 0 to 255, and three tokens of its own behind them. Every text can be told."""

    name = "bytes"
    vocabulary_size = 259
    start, end, pad = 256, 257, 258

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """As Tokenizer; what is no Unicode (a lone surrogate) becomes a question mark."""
        return [list(text.encode("utf-8", errors="replace")) for text in texts]

    @property
    def fingerprint(self) -> str:
        """As Tokenizer."""
        return self.name
