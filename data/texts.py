"""What a model with a text tower is given beside images: the captions of a data set, in tokens.

Shapes: n texts, S tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.captions import Look
from data.clip_tokens import ClipTokenizer
from data.config import DataConfig, TextCleaning
from data.datasets import Dataset, fingerprint
from data.errors import BadSampleError
from data.sentencepiece_tokens import SentencePieceTokenizer, model_file
from data.tokenizers import ByteTokenizer, Tokenizer

_LOOKED_AT = 1000  # texts, before a run


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """What a text tower reads.

    Attributes:
        length: S, tokens of a text, start and end among them. vocabulary_size: tokens that it has embeddings for.
        end_token: which of them ends a text, also where the tower pools the last one and does not look for it; None:
            any may.
    """

    length: int
    vocabulary_size: int
    end_token: int | None = None


@dataclass(frozen=True, kw_only=True)
class Texts:
    """How the texts of a run become tokens.

    Attributes:
        tokenizer: of all texts. length: S.
    """

    tokenizer: Tokenizer
    length: int

    def encode(self, texts: Sequence[str]) -> Tensor:
        """int64 [n, S]: start, tokens, end, padding; of what is too long the last tokens are cut off."""
        return torch.from_numpy(self.tokenizer.encode(texts, self.length))

    @property
    def fingerprint(self) -> str:
        """Of all that tokens depend on."""
        return f"{self.tokenizer.fingerprint} {self.length}"


def make_tokenizer(name: str, cleaning: TextCleaning = "none", padding: int | None = None) -> Tokenizer:
    """The tokenizer of `data.tokenizer`: `bytes`, or the path of a vocabulary of CLIP's or of a sentencepiece model.

    Args:
        cleaning: data.text_cleaning. padding: data.text_padding.

    Raises:
        ValueError: there is no such vocabulary, or it has a cleaning and padding of its own.
    """
    if name != "bytes" and (file := model_file(name)) is not None:
        return SentencePieceTokenizer(name, file, cleaning, padding)
    for key, value, usual in (("text_cleaning", cleaning, "none"), ("text_padding", padding, None)):
        if value != usual:
            raise ValueError(
                f"data.{key} is {value}, but has no effect with data.tokenizer={name}, which has a way of its own: "
                "remove it, or give a sentencepiece model"
            )
    return ByteTokenizer() if name == "bytes" else ClipTokenizer(name)


def tokenizer_of(config: DataConfig) -> Tokenizer:
    """As make_tokenizer, by its keys."""
    return make_tokenizer(config.tokenizer, config.text_cleaning, config.text_padding)


def make_texts(tokenizer: Tokenizer, shape: TextShape) -> Texts:
    """Texts for a text tower.

    Raises:
        ValueError: for a tokenizer that does not fit it.
    """
    name, size = f"data.tokenizer {tokenizer.name}", tokenizer.vocabulary_size
    if shape.vocabulary_size < size:
        raise ValueError(
            f"text.vocabulary_size is {shape.vocabulary_size}, but {name} has {size} tokens: set "
            f"text.vocabulary_size to {size} or more, or data.tokenizer to the one that the text tower was made for"
        )
    if shape.end_token is not None and shape.end_token != tokenizer.end:
        raise ValueError(
            f"text.end_token is {shape.end_token}, but {name} ends texts with token {tokenizer.end}: set "
            f"text.end_token to {tokenizer.end}, or data.tokenizer to the one that the text tower was made for"
        )
    if shape.length <= tokenizer.added:
        raise ValueError(
            f"text.context_length is {shape.length}, but a text has {tokenizer.added} tokens beside its own, of its "
            f"start or end: set it to {tokenizer.added + 1} or more"
        )
    return Texts(tokenizer=tokenizer, length=shape.length)


def captions_fingerprint(dataset: Dataset) -> str:
    """Of what is said of a set's images, and in which tokens: the same wherever these are."""
    if dataset.captions is None or dataset.texts is None:
        return "none"
    return fingerprint(dataset.captions.fingerprint, dataset.texts.fingerprint.encode())


def describe_texts(dataset: Dataset) -> list[str]:
    """What the start-up report says of texts: how long, of what, an example, and whether some will be cut."""
    if dataset.captions is None or dataset.texts is None or not len(dataset):
        return []
    tokenizer, length = dataset.texts.tokenizer, dataset.texts.length
    first = np.arange(min(len(dataset), _LOOKED_AT))
    labels = dataset.labels_of(first).tolist()
    said = []
    for i, label in enumerate(labels):
        with suppress(BadSampleError):
            said.append(dataset.captions.every(i, label, Look())[0])
    if not said:
        return []
    needed = [len(tokens) + tokenizer.added for tokens in tokenizer.tokens(said)]
    lines = [f"  texts: {length} tokens ({tokenizer.name}), such as {said[0][:100]!r}"]
    if cut := sum(tokens > length for tokens in needed):
        lines.append(
            f"  warning: {cut} of the first {len(said)} held-out texts are longer, and cut: text.context_length "
            f"{max(needed)} would hold them"
        )
    return lines


def prompts(dataset: Dataset) -> list[list[str]]:
    """Of each class, in the order of the labels, several texts that are true of every image of it.

    Raises:
        ValueError: for a set without captions or classes.
    """
    found = None if dataset.captions is None else dataset.captions.prompts()
    if found is None:
        raise ValueError("there are no classes to name, so none can be told by what is said of them")
    return found
