"""All shards of a set: found, indexed, and the same as when they were indexed."""

from __future__ import annotations

import os
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.listing import SUFFIXES
from data.shards.doubles import doubles, refuse_named_twice
from data.shards.formats import Format
from data.shards.index import Head, copies, hash_of, make_index, note_copy, place, read_head
from data.shards.members import ShardError
from data.shards.names import expand
from data.workers import begin_worker

_LOOKING, _AT_A_TIME = 16, 64  # threads that ask a file system, of a network's each answer takes a while; files each
_QUICK = 1e-4  # seconds for an answer, as of files that are in memory
_SHOWN = 5
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """K shards of N samples in all, in the order of their names.

    Attributes:
        given: what named them. files: their paths. indexes: those of their indexes.
        ends: [K] samples up to and with each. source_ends: the same of each of the sources.
        group_ends: [G] samples up to and with each group that is read at once, as of formats.Content.
        hashes: uint64 [K], of each file's bytes.
        words: what labels are, without repetition, in the order in which shards have them; none if they are numbers,
            of which `largest` is the largest (-1: there are none). names: of such numbers, where shards say them.
        numbers: int64, shard by shard, of each label of its records the place in `words`; -1 at last, so that there is
            always one to be mapped. number_ends: [K] where each shard's end.
        left_out: by reason. unlabelled: which shards have samples without a label, in words.
        made: how many indexes were made just now.
    """

    given: str
    files: tuple[str, ...]
    indexes: tuple[str, ...]
    ends: NDArray[np.int64]
    source_ends: NDArray[np.int64]
    group_ends: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    words: tuple[str, ...]
    names: tuple[str, ...]
    numbers: NDArray[np.int64]
    number_ends: NDArray[np.int64]
    largest: int
    left_out: dict[str, int]
    unlabelled: str
    made: int

    def __len__(self) -> int:
        return int(self.ends[-1])

    def size_of(self, shard: int) -> int:
        """How many samples a shard has."""
        return int(self.ends[shard] - (self.ends[shard - 1] if shard else 0))

    def describe(self) -> str:
        """E.g. `5000 images in 5 shards shards/{0..4}.tar; left out: 3 samples without an image; 5 indexed now`. Copies
        of a shard are named."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items())) or "nothing"
        made = f"; {self.made} indexed now" if self.made else ""
        copied = _some(f"{other} has the bytes of {one}" for one, other in doubles(self.files, self.hashes))
        warning = f"; warning: images come twice: {copied}" if copied else ""
        return f"{len(self)} images in {len(self.files)} shards {self.given}; left out: {reasons}{made}{warning}"


def open_shards(
    path: str,
    key: str,
    *,
    form: Format,
    folder: str | None,
    workers: int | None = None,
    part: tuple[int, int] = (0, 1),
    again: bool = False,
    told: Callable[[], object] = lambda: None,
) -> Catalogue:
    """The shards that `path` names, those without an index indexed now, by as many processes as there are cores.

    Args:
        key: the option that gave the path. form, folder: as of index.make_index and index.place.
        part: (i, n): only shards i, i + n, ... of them. again: index all anew. told: called after each that is indexed.

    Raises:
        ValueError: for shards that are missing, cannot be read, or are no longer what was indexed, by name.
    """
    given, of_sources = f"{key}={path}", [expand(source, key) for source in path.split("::")]
    files = [file for of_source in of_sources for file in of_source][part[0] :: part[1]]
    sources = np.repeat(np.arange(len(of_sources)), [len(of_source) for of_source in of_sources])[part[0] :: part[1]]
    if len(set(files)) < len(files):
        raise ValueError(f"{given} names a shard in two sources: name each once, and see data.weights")
    if not files:
        raise ValueError(f"{given} names too few shards for part {part[0]} of {part[1]}: start fewer")
    indexes = [place(file, folder, form) for file in files]
    status = _status(files, given)
    heads: list[Head | None] = [None] * len(files) if again else _each(read_head, indexes)
    _check_sizes(files, heads, status, given)
    todo = [shard for shard, head in enumerate(heads) if head is None]
    in_processes(partial(_index, form, again), [(files[shard], indexes[shard]) for shard in todo], workers, told)
    doubtful = [
        (file, index, head, at.st_mtime_ns)
        for file, index, head, at in zip(files, indexes, heads, status, strict=True)
        if head is not None
        and head.file_mtime != at.st_mtime_ns
        and (at.st_mtime_ns, head.file_hash) not in copies(index)
    ]
    _check_content(doubtful, given, workers)
    for shard in todo:
        heads[shard] = read_head(indexes[shard])
    found = _catalogue(path, files, sources, indexes, [head for head in heads if head is not None], len(todo))
    refuse_named_twice(given, files, found.hashes)
    return found


def _status(files: Sequence[str], given: str) -> list[os.stat_result]:
    def look(file: str) -> os.stat_result | None:
        try:
            return os.stat(file)  # noqa: PTH116
        except OSError:
            return None

    found = _each(look, files)
    if missing := [file for file, status in zip(files, found, strict=True) if status is None]:
        raise ValueError(
            f"{given}: {len(missing)} of {len(files)} shards are missing or may not be looked at: {_some(missing)}: "
            "bring them back, or leave them out of the pattern"
        )
    return [status for status in found if status is not None]


def _check_sizes(
    files: Sequence[str], heads: Sequence[Head | None], status: Sequence[os.stat_result], given: str
) -> None:
    wrong = [
        f"{file} ({at.st_size} bytes, {head.file_size} when it was indexed)"
        for file, head, at in zip(files, heads, status, strict=True)
        if head is not None and head.file_size != at.st_size
    ]
    _refuse_changed(wrong, given)


def _check_content(doubtful: Sequence[tuple[str, str, Head, int]], given: str, workers: int | None) -> None:
    """Of shards of another time than when they were indexed: copies have the same bytes."""
    hashes = in_processes(hash_of, [file for file, *_ in doubtful], workers)
    wrong = []
    for (file, index, head, mtime), found in zip(doubtful, hashes, strict=True):
        if found == head.file_hash:
            note_copy(index, mtime, found)
        else:
            wrong.append(f"{file} (other bytes than when it was indexed)")
    _refuse_changed(wrong, given)


def _refuse_changed(wrong: Sequence[str], given: str) -> None:
    if wrong:
        raise ValueError(
            f"{given}: {len(wrong)} shards have changed or are cut short: {_some(wrong)}: bring back what was indexed, "
            "or, if the change is meant, python -m tools.prepare_data index --again, and start a new run"
        )


def _index(form: Format, again: bool, one: tuple[str, str]) -> None:
    if again or read_head(one[1]) is None:  # another host may have made it meanwhile
        make_index(*one, form)


def _catalogue(
    given: str, files: list[str], sources: NDArray[np.int64], indexes: list[str], heads: list[Head], made: int
) -> Catalogue:
    words, numbers, left_out = dict[str, int](), list[NDArray[np.int64]](), Counter[str]()
    known: dict[tuple[str, ...], NDArray[np.int64]] = {}  # most shards have the same words
    for head in heads:
        left_out.update(head.left_out)
        if head.words not in known:
            found = [words.setdefault(word, len(words)) for word in head.words]
            known[head.words] = np.array(found, dtype=np.int64)
        numbers.append(known[head.words])
    left_out["shards without an image"] = sum(not head.count for head in heads)
    if left_out["shards without an image"] == len(heads):
        raise ValueError(
            f"{given} has no image ({' '.join(SUFFIXES)}): of {len(heads)} shards none has one, {files[0]} the first"
        )
    largest = max(head.largest for head in heads)
    if words and largest >= 0:
        at = next(file for file, head in zip(files, heads, strict=True) if head.largest >= 0)
        raise ValueError(
            f"{given}: the labels of {at} are all numbers, and those of other shards are names ({next(iter(words))}): "
            "write them alike"
        )
    counts = np.array([head.count for head in heads], dtype=np.int64)
    ends = np.cumsum(counts)
    named = {head.names: file for file, head in zip(files, heads, strict=True) if head.count}
    if len(named) > 1:
        raise ValueError(f"{given}: classes of {' and of '.join(named.values())} have other names: write them alike")
    unlabelled = [
        f"{file} ({head.unlabelled} of {head.count})"
        for file, head in zip(files, heads, strict=True)
        if head.unlabelled
    ]
    return Catalogue(
        given=given,
        files=tuple(files),
        indexes=tuple(indexes),
        ends=ends,
        source_ends=np.array([0, *ends])[np.searchsorted(sources, np.unique(sources), side="right")],
        group_ends=np.repeat(ends - counts, [len(head.groups) for head in heads])
        + np.fromiter(chain.from_iterable(head.groups for head in heads), dtype=np.int64),
        hashes=np.array([head.file_hash for head in heads], dtype=np.uint64),
        words=tuple(words),
        names=next(iter(named)),
        numbers=np.concatenate([*numbers, np.array([-1])]),
        number_ends=np.cumsum([len(shard) for shard in numbers], dtype=np.int64),
        largest=largest,
        left_out=dict(+left_out),
        unlabelled=_some(unlabelled),
        made=made,
    )


def _each(ask: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """In threads, where the first answers show that the file system takes its time: else they would wait for each other
    longer than for it."""
    began, first = time.perf_counter(), [ask(item) for item in items[:_AT_A_TIME]]
    if time.perf_counter() - began < _QUICK * len(first):
        return first + [ask(item) for item in items[_AT_A_TIME:]]

    def ask_all(some: Sequence[Item]) -> list[Result]:
        return [ask(item) for item in some]

    with ThreadPoolExecutor(_LOOKING) as pool:
        pieces = pool.map(ask_all, [items[at : at + _AT_A_TIME] for at in range(_AT_A_TIME, len(items), _AT_A_TIME)])
        return first + [result for piece in pieces for result in piece]


def in_processes(
    do: Callable[[Item], Result], items: Sequence[Item], workers: int | None, told: Callable[[], object] = lambda: None
) -> list[Result]:
    """What `do` gives of each item, `told` after each. Hosts that share a file system begin at different ones."""
    workers = min(workers or len(os.sched_getaffinity(0)), len(items))
    if workers <= 1:
        return [_telling(do(item), told) for item in items]
    begin = zlib.crc32(socket.gethostname().encode()) % len(items)
    turned = [*items[begin:], *items[:begin]]
    try:
        with ProcessPoolExecutor(workers, get_context("fork"), _begin, (do,)) as pool:
            found: list[Result] = [_telling(result, told) for result in pool.map(_do, turned)]
    except BrokenProcessPool as error:
        raise ShardError(f"a process that works on shards has ended ({error}): memory may have been short") from error
    return [*found[len(items) - begin :], *found[: len(items) - begin]]


_doing: Callable[[Any], Any] | None = None  # in a worker: handed down by the fork, so that it may hold large arrays


def _begin(do: Callable[[Any], Any]) -> None:
    global _doing
    _doing = do
    begin_worker(0)


def _do(item: Any) -> Any:
    assert _doing is not None
    return _doing(item)


def _telling(result: Result, told: Callable[[], object]) -> Result:
    told()
    return result


def _some(names: Iterable[str]) -> str:
    (*shown,) = names
    return ", ".join(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")
