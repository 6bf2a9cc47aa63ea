"""Tokens by a sentencepiece model (Kudo and Richardson, 2018), as SigLIP's and SigLIP 2's text towers read them.

A text is its tokens, the end token, and padding up to the length: nothing goes before it. SigLIP (C4's vocabulary of
32,000) fills up with the end token, SigLIP 2 (Gemma's of 256,000) with 0; both were trained on texts in lower case,
which Hugging Face's SiglipTokenizer and open_clip also rid of punctuation (`canonical`). A text that spells out the
name of a control token gets no such token.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from data.config import TextCleaning
from data.tokenizers import Tokenizer, encodable

_NAMES = ("spiece.model", "tokenizer.model", "sentencepiece.model")  # as repositories of models have them
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def model_file(path: str) -> Path | None:
    """The sentencepiece model that a path means: a file that ends in .model, or a folder that has one; None: none."""
    try:
        given = Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return None
    if given.suffix == ".model":
        return given
    return next((given / name for name in _NAMES if (given / name).is_file()), None)


class SentencePieceTokenizer(Tokenizer):
    """Pieces by a model.

    Args:
        path: as it was given. file: the model. cleaning: what is done to texts before. padding: fills up texts; None:
            the end token does.

    Raises:
        ValueError: sentencepiece is not installed, the file is no model of it or has no end token, or there is no such
            padding.
    """

    start = None

    def __init__(self, path: str, file: Path, cleaning: TextCleaning, padding: int | None) -> None:
        self.name, given = path, f"data.tokenizer={path}"
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise ValueError(
                f"{given} needs the package sentencepiece, which is not installed ({error}): pip install sentencepiece"
            ) from error
        try:
            model = file.read_bytes()
            self._encoder = SentencePieceProcessor(model_proto=model)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{given} is no sentencepiece model that can be read ({error}): copy it anew") from error
        self.vocabulary_size, self.end = self._encoder.get_piece_size(), self._encoder.eos_id()
        if self.end < 0:
            raise ValueError(f"{given} has no token for the end of a text: train it with an eos_id")
        if padding is not None and not 0 <= padding < self.vocabulary_size:
            raise ValueError(
                f"data.text_padding is {padding}, but {given} has {self.vocabulary_size} tokens: give one of them"
            )
        self.pad = self.end if padding is None else padding
        self._cleaning = cleaning
        self._digest = f"{blake2b(model, digest_size=8).hexdigest()} {cleaning} {self.pad}"

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """As Tokenizer."""
        found: list[list[int]] = self._encoder.encode([encodable(self._clean(text)) for text in texts], num_threads=1)
        return found

    @property
    def fingerprint(self) -> str:
        """As Tokenizer: of the model's bytes, cleaning and padding."""
        return self._digest

    def _clean(self, text: str) -> str:
        if self._cleaning == "none":
            return text
        lower = text.lower()
        if self._cleaning == "lower":
            return lower
        return re.sub(r"\s+", " ", lower.translate(_PUNCTUATION)).strip()
