"""What of an image its likeness to texts owes to, of models with two towers: `--text`, as often as there are texts.

The score that methods explain is the cosine of both embeddings, in place of a class's logit or probability.

Legend: B images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.config import TextCleaning
from data.texts import TextShape, make_texts, make_tokenizer
from engine.checkpoint.load import contrastive_folder
from engine.errors import ConfigError
from model import ImageText
from model.formats.weights import Which
from model.seeing.rollout import back_through
from model.seeing.similarity import likeness
from model.seeing.trace import map_of, traces
from tools.visualize.methods import BACK, hidden
from tools.visualize.shown import Asked, Shown

METHODS = (*BACK, "occlusion", "rise")
"""Those that explain a score."""


def opened(checkpoint: Path, weights: Which, said: Sequence[str], tokenizer: str | None) -> tuple[ImageText, Tensor]:
    """Both towers, and the texts in their tokens, int64 [n, S]; whether some were cut is printed.

    Args:
        tokenizer: as data.tokenizer; None: that of the run that has trained them.

    Raises:
        ConfigError: there are no two towers, or texts cannot become their tokens.
    """
    if len(set(said)) < len(said):
        raise ConfigError("--text: a text is given twice: give each once")
    ways: tuple[TextCleaning, int | None] = ("none", None)
    try:
        model = ImageText.from_pretrained(checkpoint, weights=weights)
        if tokenizer is None and (found := contrastive_folder(checkpoint)) is not None:
            given = found[1].config.get("data") or {}
            tokenizer = given.get("tokenizer")
            ways = given.get("text_cleaning", "none"), given.get("text_padding")
    except ValueError as error:
        raise ConfigError(f"--text needs an image tower and a text tower: {error}") from error
    if tokenizer is None:
        raise ConfigError(
            f"--text: {checkpoint} does not say how texts become tokens: give --tokenizer, bytes or a vocabulary of "
            "CLIP's, as data.tokenizer"
        )
    text = model.text_config
    assert text.context_length is not None and text.vocabulary_size is not None
    shape = TextShape(length=text.context_length, vocabulary_size=text.vocabulary_size, end_token=text.end_token)
    try:
        words = make_texts(make_tokenizer(tokenizer, *ways), shape)
        rows, cut = words.tokenizer.encode_counted(said, words.length)
    except ValueError as error:
        raise ConfigError(f"--text: {str(error).replace('data.tokenizer', '--tokenizer')}") from error
    if cut:
        print(f"warning: {cut} of {len(said)} texts are cut: the model reads {words.length} tokens", flush=True)
    return model, torch.from_numpy(rows)


def explained(
    method: str, model: ImageText, images: Tensor, asked: Asked, tokens: Tensor, said: Sequence[str]
) -> Shown:
    """A map for each text."""
    scores = likeness(model, tokens)
    if method in BACK:
        name, title = BACK[method]
        found, outputs = traces(model, images, scores)
        maps = [map_of(model.config, back_through(of, name)) for of in found]
    else:
        title = method
        with torch.no_grad():
            outputs = model.encode_image(images)
        maps = [
            hidden(method, lambda shown, of=of: of(model.encode_image(shown)), model.sizes, images, asked)  # type: ignore[misc]
            for of in scores
        ]
    alike = torch.stack([score(outputs) for score in scores], 1)
    return Shown(maps={(title, text): of for text, of in zip(said, maps, strict=True)}, arrays={"similarity": alike})


def similarities(shown: Shown, names: Sequence[str], said: Sequence[str]) -> list[str]:
    """Lines: how like each image is to each text."""
    return [
        f"{name}: " + ", ".join(f"{value:.3f} {text!r}" for value, text in zip(row, said, strict=True))
        for name, row in zip(names, shown.arrays["similarity"].tolist(), strict=True)
    ]
