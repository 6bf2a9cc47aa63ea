"""What is in shards, and whether it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from data.decode import CENTRE, decode
from data.errors import UnreadableImageError
from data.shards.catalogue import in_processes
from data.shards.index import hash_of
from data.shards.store import Place, Store

_SHOWN = 20  # classes


def check(store: Store, workers: int | None) -> list[str]:
    """What is wrong: shards with other bytes than were indexed, and images that cannot be decoded."""
    catalogue = store.catalogue
    found = in_processes(partial(_faults, store), range(len(catalogue.files)), workers)
    return [fault for of_shard in found for fault in of_shard]


def _faults(store: Store, shard: int) -> list[str]:
    faults, catalogue = [], store.catalogue
    if hash_of(catalogue.files[shard]) != int(catalogue.hashes[shard]):
        faults.append(f"{catalogue.files[shard]} has other bytes than when it was indexed")
    try:
        store.index(shard)
    except UnreadableImageError as error:
        return [*faults, str(error)]  # once, not for each image
    for row in range(catalogue.size_of(shard)):
        place = Place(shard, row)
        try:
            decode(BytesIO(store.image(place)), CENTRE, (3, 64, 64), partial(store.name, place))
        except UnreadableImageError as error:
            faults.append(str(error))
    return faults


def stats(store: Store) -> list[str]:
    """Counts and sizes, by the indexes alone."""
    catalogue = store.catalogue
    shards = range(len(catalogue.files))
    counts = np.array([catalogue.size_of(shard) for shard in shards])
    sizes = np.concatenate([store.index(shard).records["image_size"] for shard in shards]).astype(np.int64)
    texts = [
        f"with {what} {sum(int(np.count_nonzero(store.index(shard).records[part])) for shard in shards)}"
        for part, what in store.form.texts_in.items()
    ]
    words = store.all_words()
    lines = [
        catalogue.describe(),
        f"images per shard {_spread(counts)}",
        f"bytes per image  {_spread(sizes)}, {sizes.sum() / 2**30:.3g} GiB in all",
        ", ".join([*texts, f"with a label {int(np.sum(words >= 0))}"]),
    ]
    return lines + _of_classes(catalogue.words, words[words >= 0])


def _of_classes(words: Sequence[str], labels: NDArray[np.int64]) -> list[str]:
    each = zip(*(found.tolist() for found in np.unique(labels, return_counts=True)), strict=True)
    counts = sorted(each, key=lambda pair: -pair[1])
    named = [(words[number] if words else number, count) for number, count in counts]
    if not named:
        return []
    lines = [f"{len(named)} classes, images of each:"] + [f"  {word}: {count}" for word, count in named[:_SHOWN]]
    if len(named) > _SHOWN:
        lines.append(f"  and {len(named) - _SHOWN} more, the least {named[-1][0]}: {named[-1][1]}")
    return lines


def _spread(values: np.ndarray) -> str:
    return f"{values.min()} to {values.max()}, {values.mean():.6g} on average"
