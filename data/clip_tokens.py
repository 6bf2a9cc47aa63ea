"""CLIP's byte pair encoding (Radford et al., 2021), by the files that it is handed around in, through `tokenizers`.

The original's file, `bpe_simple_vocab_16e6.txt.gz`, has merges alone: texts are cleaned as the original and open_clip
clean them (ftfy, HTML's entities, white space, lower case). Hugging Face's files, `vocab.json` with `merges.txt`, or
`tokenizer.json`, have their own way: Unicode's composed form, white space, lower case. A text that spells out the name
of the token for the end of a text gets no such token.
"""

from __future__ import annotations

import gzip
import html
import json
import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from data.tokenizers import Tokenizer, encodable

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Encoder

_MERGES = 49152 - 256 - 2  # of the original's file, which has more lines than the original reads
_ENDS = (("<|startoftext|>", "<|endoftext|>"), ("<start_of_text>", "<end_of_text>"))
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_FILES = "bpe_simple_vocab_16e6.txt.gz, tokenizer.json, or vocab.json with merges.txt"
_MOST_BYTES = 256 * 2**20  # of a file, unpacked: CLIP's have 3 MB


class ClipTokenizer(Tokenizer):
    """Byte pairs by a vocabulary.

    Args:
        path: one of the files, or a folder that has them.

    Raises:
        ValueError: there is none, or it is no vocabulary of CLIP's kind.
    """

    def __init__(self, path: str) -> None:
        self.name, given = path, f"data.tokenizer={path}"
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would not outlive a worker's fork
        try:
            self._encoder, self._cleans, digest = _load(_find(Path(path).expanduser(), given), given)
        except (OSError, RuntimeError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"{given} cannot be read ({error}): give {_FILES}") from error
        self._digest = digest
        ends = ((self._encoder.token_to_id(start), self._encoder.token_to_id(end)) for start, end in _ENDS)
        known = [(start, end) for start, end in ends if start is not None and end is not None]
        if not known:
            wanted = " or ".join(f"{start} and {end}" for start, end in _ENDS)
            raise ValueError(f"{given} has no tokens {wanted}, so it is none of CLIP's: give {_FILES}")
        self.start, self.end = known[0]
        self.pad = 0  # as CLIP and open_clip fill up
        self.vocabulary_size = max(self._encoder.get_vocab().values()) + 1

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """As Tokenizer."""
        cleaned = [_clean(text) for text in texts] if self._cleans else [encodable(text) for text in texts]
        ends = {self.start, self.end}
        found = self._encoder.encode_batch_fast(cleaned, add_special_tokens=False)
        return [[token for token in encoding.ids if token not in ends] for encoding in found]

    @property
    def fingerprint(self) -> str:
        """As Tokenizer: of the files' bytes, unpacked."""
        return self._digest


def _find(path: Path, given: str) -> Path:
    if not path.is_dir():
        return path
    for pattern in ("tokenizer.json", "vocab.json", "bpe_simple_vocab*.txt.gz", "bpe_simple_vocab*.txt"):
        for file in sorted(path.glob(pattern)):
            return file
    raise ValueError(f"{given} is a folder without a vocabulary: it must have {_FILES}")


def _load(file: Path, given: str) -> tuple[Encoder, bool, str]:
    """(what encodes, whether texts are to be cleaned first, a hash of what it was made of)."""
    try:
        from tokenizers import Tokenizer as Encoder
    except ImportError as error:
        raise ValueError(f"{given} needs the package tokenizers, which is not installed: install it") from error
    parts = [_read(file)]
    if file.name == "vocab.json":
        parts.append(_read(file.with_name("merges.txt")))
    digest = blake2b(b"\0".join(parts), digest_size=8).hexdigest()
    try:
        if file.name == "vocab.json":
            vocabulary: dict[str, int] = json.loads(parts[0])
            return _encoder(vocabulary, _pairs(parts[1]), normalises=True), False, digest
        if file.suffix == ".json":
            return Encoder.from_str(parts[0].decode()), False, digest
        return _original(_pairs(parts[0])[:_MERGES]), True, digest
    except ValueError:
        raise
    except Exception as error:  # of the library, which has no type of its own
        raise ValueError(f"{given} is no vocabulary ({error}): give {_FILES}") from error


def _read(file: Path) -> bytes:
    if file.suffix != ".gz":
        return file.read_bytes()
    with gzip.open(file) as packed:
        return packed.read(_MOST_BYTES)


def _pairs(merges: bytes) -> list[tuple[str, str]]:
    """The lines of a file of merges but the first, which tells its version."""
    lines = merges.decode().split("\n")[1:]
    split = [line.split() for line in lines if line.strip()]
    wrong = next((pair for pair in split if len(pair) != 2), None)
    if wrong is not None or not split:
        raise ValueError(f"data.tokenizer: {' '.join(wrong or ['an empty file'])!r} is no merge of two: give {_FILES}")
    return [(first, second) for first, second in split]


def _original(merges: list[tuple[str, str]]) -> Encoder:
    """Tokens of single bytes, the same at the end of a word, one for each merge, and those for start and end."""
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), *_ENDS[1]]
    return _encoder({token: number for number, token in enumerate(tokens)}, merges, normalises=False)


def _encoder(vocabulary: dict[str, int], merges: list[tuple[str, str]], *, normalises: bool) -> Encoder:
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Encoder
    from tokenizers.models import BPE

    encoder = Encoder(BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", fuse_unk=False))
    if normalises:
        steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        encoder.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    bytes_of_them = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_them])
    return encoder


def _byte_letters() -> list[str]:
    """A letter for each byte, in the original's order: printable ones stand for themselves, others for 256 and on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + place) for place in range(len(others)))]


def _clean(text: str) -> str:
    """As the original cleans it. Plain ASCII without entities has nothing to mend."""
    if not (text.isascii() and text.isprintable() and "&" not in text):
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(encodable(text).split()).lower()
