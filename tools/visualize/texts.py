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
from model import ImageText, TextConfig
from model.formats.weights import Which
from model.seeing.rollout import back_through
from model.seeing.trace import Score, map_of, traces
from tools.visualize.methods import BACK, hidden
from tools.visualize.ranks import Ranks
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
    try:
        model = ImageText.from_pretrained(checkpoint, weights=weights)
    except ValueError as error:
        raise ConfigError(f"--text needs an image tower and a text tower: {error}") from error
    return model, tokens_of(said, model.text_config, checkpoint, tokenizer)


def tokens_of(
    said: Sequence[str], text: TextConfig, checkpoint: Path, tokenizer: str | None, *, says: bool = True
) -> Tensor:
    """Texts in a resolved tower's tokens, as of `opened`.

    Args:
        says: whether it is this process that prints.
    """
    if len(set(said)) < len(said):
        raise ConfigError("--text: a text is given twice: give each once")
    ways: tuple[TextCleaning, int | None] = ("none", None)
    if tokenizer is None:
        try:
            found = contrastive_folder(checkpoint)
        except ValueError as error:
            raise ConfigError(f"--checkpoint: {error}") from error
        given = {} if found is None else found[1].config.get("data") or {}
        tokenizer = given.get("tokenizer")
        ways = given.get("text_cleaning", "none"), given.get("text_padding")
    if tokenizer is None:
        raise ConfigError(
            f"--text: {checkpoint} does not say how texts become tokens: give --tokenizer, bytes or a vocabulary of "
            "CLIP's, as data.tokenizer"
        )
    assert text.context_length is not None and text.vocabulary_size is not None
    shape = TextShape(length=text.context_length, vocabulary_size=text.vocabulary_size, end_token=text.end_token)
    try:
        words = make_texts(make_tokenizer(tokenizer, *ways), shape)
        rows, cut = words.tokenizer.encode_counted(said, words.length)
    except ValueError as error:
        raise ConfigError(f"--text: {str(error).replace('data.tokenizer', '--tokenizer')}") from error
    if cut and says:
        print(f"warning: {cut} of {len(said)} texts are cut: the model reads {words.length} tokens", flush=True)
    return torch.from_numpy(rows)


def explained(
    method: str, model: ImageText | Ranks, images: Tensor, asked: Asked, scores: Sequence[Score], said: Sequence[str]
) -> Shown:
    """A map for each text, of its score of embeddings of images. Over ranks each takes a pass of its own."""
    if method in BACK:
        name, title = BACK[method]
        if isinstance(model, Ranks):
            rows, every = zip(*(model.owed(images, name, of) for of in scores), strict=True)
            outputs = every[0]
        else:
            found, outputs = traces(model, images, scores)
            rows = tuple(back_through(of, name) for of in found)
        maps = [map_of(model.config, of) for of in rows]
    else:
        title, embed = method, model.logits if isinstance(model, Ranks) else model.encode_image
        with torch.no_grad():
            outputs = embed(images)
        maps = [
            hidden(method, lambda shown, of=of: of(embed(shown)), model.sizes, images, asked)  # type: ignore[misc]
            for of in scores
        ]
    alike = torch.stack([score(outputs) for score in scores], 1)
    by_text = {(title, text): of for text, of in zip(said, maps, strict=True)}
    return Shown(maps=by_text, arrays={"similarity": alike}, compared=True)


def similarities(shown: Shown, names: Sequence[str], said: Sequence[str]) -> list[str]:
    """Lines: how like each image is to each text."""
    return [
        f"{name}: " + ", ".join(f"{value:.3f} {text!r}" for value, text in zip(row, said, strict=True))
        for name, row in zip(names, shown.arrays["similarity"].tolist(), strict=True)
    ]
