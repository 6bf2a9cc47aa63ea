"""A sentencepiece model trained here: its pieces, ends, padding and cleaning, against the libraries that have them."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import DataConfig, TextShape, build_datasets
from data.texts import make_texts, make_tokenizer
from data.tokenizers import Tokenizer

SAID = ["a photo of a cat", "two dogs on the beach", "the cat sat on the mat", "ants, bees and cats: 42 of them!"] * 8
TEXTS = [
    *SAID[:4],
    "  A   Photo\tof\n THE Cat's toys!! ",
    "naïve café 東京 😀",
    "</s> and <pad>, spelled out",
    "",
    "\ud800",
]


def model(folder: Path, **options: int) -> Path:
    """With C4's numbers: padding 0, end 1, unknown 2."""
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1} | options
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAID), model_writer=written, vocab_size=60, model_type="bpe", minloglevel=2, **ids
    )
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(written.getvalue())
    return folder / "spiece.model"


def rows(tokenizer: Tokenizer, length: int = 12) -> list[list[int]]:
    found: list[list[int]] = tokenizer.encode(TEXTS, length).tolist()
    return found


def test_texts_are_pieces_an_end_and_padding(tmp_path: Path) -> None:
    file = model(tmp_path / "m")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = make_tokenizer(str(file))
    assert (ours.vocabulary_size, ours.start, ours.end, ours.pad, ours.added) == (60, None, 1, 1, 1)
    for text, row in zip(TEXTS[:-1], rows(ours), strict=False):
        pieces = theirs.encode(text)[:11]
        assert row == [*pieces, 1] + [1] * (11 - len(pieces)) and 1 not in pieces and 0 not in pieces
    assert ours.encode_counted(TEXTS[:2], 2)[1] == 2  # one piece, and the end
    with pytest.raises(ValueError, match=r"texts of 1 tokens hold nothing .* 2 is the least"):
        ours.encode(TEXTS, 1)
    other = make_tokenizer(str(file.parent), "canonical", 0)  # the folder that it is in
    assert other.pad == 0 and rows(other)[0][-1] == 0 and other.fingerprint != ours.fingerprint
    assert other.tokens(["  A   Photo\tof\n THE Cat's toys!! "]) == theirs.encode(["a photo of the cats toys"])
    lower = make_tokenizer(str(file), "lower")
    assert lower.tokens(["The Cat's!"]) == theirs.encode(["the cat's!"])
    assert len({make_tokenizer(str(file), *way).fingerprint for way in (("none", 1), ("lower", 1), ("none", 0))}) == 3


def test_canonical_pieces_are_those_of_siglips_tokenizer_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = model(tmp_path)
    theirs = transformers.SiglipTokenizer(vocab_file=str(file), model_max_length=16)
    texts = [text for text in TEXTS if text and text.isascii() and "<" not in text]
    found = theirs(texts, padding="max_length", truncation=True, max_length=16)["input_ids"]
    assert make_tokenizer(str(file), "canonical").encode(texts, 16).tolist() == found


def test_a_data_set_has_its_captions_in_pieces(tmp_path: Path) -> None:
    file = model(tmp_path)
    config = DataConfig(tokenizer=str(file), text_padding=0)
    shape = TextShape(length=16, vocabulary_size=60, end_token=1)
    train, _ = build_datasets(config, image_size=8, channels=1, num_classes=10, seed=0, text=shape)
    assert train.texts is not None and int(train.texts.encode(["a cat"])[0, -1]) == 0


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = model(tmp_path)
    tokenizer = make_tokenizer(str(file))
    for shape, message in (
        (TextShape(length=9, vocabulary_size=59), r"text\.vocabulary_size is 59, but .* has 60 tokens"),
        (TextShape(length=9, vocabulary_size=60, end_token=2), r"text\.end_token is 2, but .* with token 1"),
        (
            TextShape(length=1, vocabulary_size=60),
            r"text\.context_length is 1, but a text has 1 tokens .* to 2 or more",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_texts(tokenizer, shape)
    with pytest.raises(ValueError, match=r"data\.text_padding is 60, but .* has 60 tokens"):
        make_tokenizer(str(file), "none", 60)
    with pytest.raises(ValueError, match=r"has no token for the end of a text"):
        make_tokenizer(str(model(tmp_path / "endless", eos_id=-1)))
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"no model")
    for path in (broken, tmp_path / "missing.model"):
        with pytest.raises(ValueError, match=rf"{path.name} is no sentencepiece model that can be read"):
            make_tokenizer(str(path))
    with pytest.raises(ValueError, match=r"data\.text_cleaning is lower, but has no effect with data\.tokenizer=bytes"):
        make_tokenizer("bytes", "lower")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"needs the package sentencepiece, which is not installed"):
        make_tokenizer(str(file))


def test_lengths_of_texts_that_have_a_start_are_as_before() -> None:
    row = make_tokenizer("bytes").encode(["ab"], 6)[0]
    np.testing.assert_array_equal(row, [256, 97, 98, 257, 258, 258])
