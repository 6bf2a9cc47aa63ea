"""CLIP's byte pairs against the libraries that have them, on the original's vocabulary (open_clip ships it)."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import DataConfig, EvalStream, TextShape, build_datasets
from data.texts import make_tokenizer
from data.tokenizers import ByteTokenizer
from tools.convert.libraries import library

TEXTS = [
    "a photo of a cat",
    "  A   Photo\tof\n THE Cat's  toys, 1984!! ",
    "it's they're we've I'm he'll she'd don't 'tis",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "naïve café — \u201cquotes\u201d and \u2018more\u2019 \u2026 ½ 東京 Москва مرحبا 😀👍🏽",
    "&lt;b&gt; fish &amp;amp; chips &quot;x&quot;",
    "schÃ¶n mojibake Ã©tÃ©",
    "e\u0301 combining, \u00a0 no-break, \u200b zero width, \x07 bell",
    "#hashtag @user http://example.org/a_b?c=d&e=f",
    "3.14 x 10^-5 = ??? ...!!! ~~ <tag/>",
    "",
    "   ",
    "İSTANBUL ǅ Σας ﬁ",
]


@pytest.fixture(scope="module")
def original() -> str:
    try:
        return str(library("open_clip").tokenizer.default_bpe())
    except ImportError as error:
        pytest.skip(str(error))


def test_the_originals_file_gives_open_clips_tokens(original: str) -> None:
    SimpleTokenizer = library("open_clip").tokenizer.SimpleTokenizer
    theirs, ours = SimpleTokenizer(original), make_tokenizer(original)
    rng = np.random.default_rng(0)
    alphabet = [chr(c) for c in (*range(32, 127), *range(160, 500), *range(0x400, 0x460), *range(0x4E00, 0x4E40))]
    texts = TEXTS + ["".join(rng.choice(alphabet, 60)) for _ in range(300)]
    assert (ours.vocabulary_size, ours.start, ours.end, ours.pad) == (49408, 49406, 49407, 0)
    for length in (77, 12):
        np.testing.assert_array_equal(ours.encode(texts, length), theirs(texts, length).numpy())


def test_hugging_faces_files_give_its_tokens(original: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    named = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    numbers = make_tokenizer(original)._encoder.get_vocab()
    vocabulary = {named.get(token, token): number for token, number in numbers.items()}
    merges = gzip.decompress(Path(original).read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=[tuple(m.split()) for m in merges])
    by_folder = make_tokenizer(str(tmp_path))
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    by_file = make_tokenizer(str(tmp_path / "tokenizer.json"))
    texts = [text for text in TEXTS if "\u0130" not in text]
    for length in (77, 12):
        expected = theirs(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]
        for ours in (by_folder, by_file):
            encoded = ours.encode(texts, length)
            assert (ours.vocabulary_size, ours.end) == (49408, 49407)
            for row, other in zip(encoded, expected, strict=True):
                end = list(row).index(ours.end)
                assert row[: end + 1].tolist() == other[: end + 1] and (row[end + 1 :] == 0).all()
    assert by_folder.fingerprint != by_file.fingerprint == make_tokenizer(str(tmp_path)).fingerprint


LETTERS = '{"a": 0, "b</w>": 1, "ab</w>": 2}'


def small(folder: Path, merges: str = "#version: 0.2\nt h\nth e</w>\nc a\nca t</w>\n") -> Path:
    """A vocabulary of a few merges."""
    file = folder / "bpe_simple_vocab.txt"
    file.write_text(merges)
    return file


def test_a_text_cannot_end_itself(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(str(small(tmp_path)))
    tokens = tokenizer.encode(["the <end_of_text> cat", "the \ud800 cat"], 40)
    assert (tokens == tokenizer.end).sum(1).tolist() == [1, 1] and (tokens == tokenizer.start).sum(1).tolist() == [1, 1]
    assert tokenizer.vocabulary_size == 256 * 2 + 4 + 2
    assert tokens[0, 1] == 512 + 1 and make_tokenizer(str(tmp_path)).fingerprint == tokenizer.fingerprint


def test_workers_may_encode(tmp_path: Path) -> None:
    """After this process has: threads that outlive no fork would leave them waiting, or a warning."""
    config = DataConfig(tokenizer=str(small(tmp_path)), workers=1)
    text = TextShape(length=16, vocabulary_size=600)
    _, held_out = build_datasets(config, image_size=8, channels=1, num_classes=None, seed=0, text=text)
    assert held_out.texts is not None
    held_out.texts.encode(["the cat"] * 100)
    batch = next(iter(EvalStream(held_out, config=config, micro_batch_size=4, data_rank=0, data_size=1)))
    assert batch.texts is not None and batch.texts.shape == (4, 16)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        ({}, "nowhere.txt.gz", r"data\.tokenizer=.*nowhere\.txt\.gz cannot be read \(.*No such file.*give bpe_simple"),
        ({}, ".", r"is a folder without a vocabulary: it must have bpe_simple_vocab_16e6\.txt\.gz"),
        ({"v.txt": "#version\na b c\n"}, "v.txt", r"'a b c' is no merge of two"),
        ({"v.txt": "#version\n"}, "v.txt", r"an empty file"),
        ({"v.txt.gz": "no gzip"}, "v.txt.gz", r"cannot be read \(Not a gzipped file"),
        ({"tokenizer.json": "{}"}, ".", r"is no vocabulary \(.*\): give bpe_simple"),
        ({"vocab.json": "{}"}, ".", r"cannot be read \(.*merges\.txt"),
        ({"vocab.json": LETTERS, "merges.txt": "#\na b</w>\n"}, ".", r"has no tokens <\|startoftext\|> and"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path: Path, files: dict[str, str], given: str, message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        make_tokenizer(str(tmp_path / given))


def test_a_vocabulary_larger_than_the_text_towers(tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": 8, "channels": 1, "num_classes": None, "seed": 0}
    text = TextShape(length=8, vocabulary_size=259)
    config = DataConfig(tokenizer=str(small(tmp_path)))
    with pytest.raises(
        ValueError, match=r"text\.vocabulary_size is 259, but data\.tokenizer .*txt has 518 tokens: set"
    ):
        build_datasets(config, **options, text=text)


def test_bytes_of_what_is_no_unicode() -> None:
    assert ByteTokenizer().encode(["é\ud800"], 6).tolist() == [[256, 0xC3, 0xA9, ord("?"), 257, 258]]
