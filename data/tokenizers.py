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
            after the tokens of a text. pad: what fills up a text that is shorter than others.
    """

    name: str
    vocabulary_size: int
    start: int
    end: int
    pad: int

    @abstractmethod
    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Of each text, without start and end, of whatever length."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Of all that tokens depend on: equal where the vocabulary is."""

    def encode(self, texts: Sequence[str], length: int) -> NDArray[np.int64]:
        """[n, S] with S = `length`: start, tokens, end, then pad. Of a text that is too long the last tokens go."""
        return self.encode_counted(texts, length)[0]

    def encode_counted(self, texts: Sequence[str], length: int) -> tuple[NDArray[np.int64], int]:
        """As `encode`, and how many of the texts were cut.

        Raises:
            ValueError: if not even start, one token and end fit.
        """
        if length < 3:
            raise ValueError(f"texts of {length} tokens hold nothing beside their start and end: 3 is the least")
        rows = np.full((len(texts), length), self.pad, dtype=np.int64)
        cut = 0
        for row, found in zip(rows, self.tokens(texts), strict=True):
            kept = found[: length - 2]
            cut += len(kept) < len(found)
            row[0], row[1 : len(kept) + 1], row[len(kept) + 1] = self.start, kept, self.end
        return rows, cut


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
