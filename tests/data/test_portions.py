"""Ranks that make a portion of each micro-batch each have the pixels, texts and samples of one that makes all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import BadSampleError, Batch, DataConfig, EvalStream, TextShape, TrainStream, put_together
from data.captions import TemplateCaptions
from data.datasets import SyntheticDataset
from data.resolution import Resolution
from data.texts import make_texts
from data.tokenizers import ByteTokenizer

SIZE = 30


class Images(SyntheticDataset):
    """Of 4 x 4 pixels, with captions; some are bad. Counts what is read of it."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__(first=0, size=SIZE, image_shape=(1, 4, 4), num_classes=3, seed=0)
        self.bad, self.read_by = bad, dict[int, int]()
        self.captions = TemplateCaptions(names=("a", "b", "cde"), templates=("{class}",), class_prompts=("{class}",))
        self.texts = make_texts(ByteTokenizer(), TextShape(length=4, vocabulary_size=300))

    def read(self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None) -> Tensor:
        me = threading.get_ident()
        self.read_by[me] = self.read_by.get(me, 0) + len(indices)
        if bad := set(self.bad) & set(indices.tolist()):
            raise BadSampleError(f"{min(bad)} cannot be decoded")
        return super().read(indices, crop)


class Threads:
    """Ranks as threads of this process: what each says lies on a table."""

    def __init__(self, size: int, index: int, table: list[Any], all_there: threading.Barrier) -> None:
        self.size, self.index, self._table, self._all_there = size, index, table, all_there

    def tell(self, own: Any) -> list[Any]:
        self._table[self.index] = own
        self._all_there.wait(10)
        told = list(self._table)
        self._all_there.wait(10)
        return told


def on_ranks(size: int, do: Callable[[Any], Any]) -> list[Any]:
    """do(circle) of each rank."""
    table, all_there, found = [None] * size, threading.Barrier(size), [None] * size

    def run(index: int) -> None:
        found[index] = do(Threads(size, index, table, all_there))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert None not in found, "a rank has failed"
    return found


def assert_whole(of_ranks: list[Batch], alone: Batch) -> None:
    """What ranks have of a micro-batch is what one has that makes it alone."""
    (cut,) = {batch.cut for batch in of_ranks}
    images = [batch.images for batch in of_ranks if batch.images is not None]
    assert cut is not None and alone.cut is None and alone.images is not None
    assert torch.equal(put_together(torch.cat(images), len(images), cut, alone.maps), alone.images)
    for batch in of_ranks:
        assert batch.maps == alone.maps
        for name, value in vars(alone).items():
            if isinstance(value, Tensor) and name != "images":
                assert torch.equal(getattr(batch, name), value), name


MIXED = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {  # ranks, micro-batch, keys
    "even": (2, 6, {"flip": True, "blur": 1.0}),
    "uneven, views": (4, 6, {"views": 2, "rotate": 10.0}),
    "more ranks than images": (4, 3, {"shift": 0.1}),
    "mixed, pairs kept": (2, 6, MIXED),
    "mixed, pairs parted": (2, 3, MIXED),
    "mixed, repeats": (2, 6, MIXED | {"repeats": 2}),
    "several sizes": (2, 6, {"variable_resolution": 0.5, "flip": True}),
    "nothing to say": (2, 5, {"max_bad_share": 0.0, "flip": True}),
    "local crops": (2, 5, {"views": 2, "local_crops": 2, "crop_min_area": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_portions_are_the_rows_of_the_whole(case: str) -> None:
    ranks, micro, keys = CASES[case]
    config = DataConfig(kind="image_folder", path="photos", **{"max_bad_share": 0.5} | keys)
    bad = () if config.variable_resolution or not config.mends else (3, 4, 17)

    def images() -> Images:
        dataset = Images(bad)
        if config.mixes or config.variable_resolution or config.local_crops or not config.mends:
            dataset.texts = None
        dataset.resolution = Resolution.of(config, 4, 4, patch=1)
        return dataset

    place: dict[str, Any] = {"micro_batch_size": micro, "data_rank": 1, "data_size": 2, "config": config}

    def training(circle: Any, dataset: Images) -> tuple[list[Batch], TrainStream]:
        stream = TrainStream(dataset, global_batch_size=4 * micro, seed=1, circle=circle, **place)
        return [batch for step in islice(stream.steps(0), 3) for batch in (*step, step[0])], stream

    def held_out(circle: Any) -> tuple[list[Batch], EvalStream]:
        stream = EvalStream(images(), leaves_out=True, circle=circle, **place)
        return list(stream), stream

    shared, whole = images(), images()
    found, (alone, stream) = on_ranks(ranks, lambda circle: training(circle, shared)), training(None, whole)
    assert len(alone) == 9  # micro-batches; the first of each step is asked for again
    for of_ranks in zip(*(batches for batches, _ in found), alone, strict=True):
        assert_whole(list(of_ranks[:-1]), of_ranks[-1])
    for _, of_rank in found:
        assert sorted(of_rank.bad) == sorted(stream.bad) and of_rank.texts_cut == stream.texts_cut
    assert bool(stream.bad) == bool(bad)
    if case == "even":
        most, all_of_it = max(shared.read_by.values()), sum(whole.read_by.values())
        assert most < 0.7 * all_of_it, "and a bad sample, which is looked for one by one"
    shown, (expected, evaluation) = on_ranks(ranks, held_out), held_out(None)
    for of_ranks in zip(*(batches for batches, _ in shown), expected, strict=True):
        assert_whole(list(of_ranks[:-1]), of_ranks[-1])
    assert all(sorted(of_rank.bad) == sorted(evaluation.bad) for _, of_rank in shown)
