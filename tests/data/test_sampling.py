from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest

from data import DataConfig, Dataset, TrainStream
from data.keyed import Purpose, keyed_permutation, keyed_uniforms
from data.sampling import SampleOrder
from tests.data.order_oracle import oracle


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 12, 100, 257])
def test_the_order_is_that_of_the_paper(size: int) -> None:
    stream = SampleOrder(size, seed=3).indices(np.arange(3 * size))
    assert stream.tolist() == [oracle(3, epoch, at, size) for epoch in range(3) for at in range(size)]
    assert (np.sort(stream.reshape(3, size), axis=1) == np.arange(size)).all()  # every epoch has every image once


def test_order_depends_on_seed_and_draw_alone() -> None:
    stream = SampleOrder(10, seed=3).indices(np.arange(50))
    assert len({tuple(epoch) for epoch in stream.reshape(5, 10)}) == 5
    assert not np.array_equal(stream, SampleOrder(10, seed=4).indices(np.arange(50)))
    backwards = SampleOrder(10, seed=3)
    for first in (43, 17, 0):  # in any order, across epochs
        draws = np.arange(first, first + 7)
        np.testing.assert_array_equal(backwards.indices(draws), stream[draws])
    thrice = SampleOrder(10, seed=3, repeats=3).indices(np.arange(150))
    np.testing.assert_array_equal(thrice, np.repeat(stream, 3))


def test_every_order_is_as_likely_as_any_other() -> None:
    epochs = 1200
    for size in (3, 4):
        stream = SampleOrder(size, seed=1).indices(np.arange(epochs * size)).reshape(epochs, size)
        seen = Counter(map(tuple, stream.tolist()))
        orders = math.factorial(size)
        expected = epochs / orders
        statistic = sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(size)))
        freedom = orders - 1
        assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom), (size, statistic)


def test_neighbours_in_a_large_set_have_nothing_to_do_with_each_other() -> None:
    size = 100_003
    places = SampleOrder(size, seed=0).indices(np.arange(size)).astype(np.float64)
    for lag in (1, 2, 316, 317):  # the sides of the grid among them
        assert abs(np.corrcoef(places[:-lag], places[lag:])[0, 1]) < 4 / math.sqrt(size)
    assert np.sum(places == np.arange(size)) < 8  # one is expected


class Endless(Dataset):
    """1e9 samples of which nothing is held."""

    crops_when_read, num_classes, image_shape = False, 0, (1, 1, 1)

    class _Labels:
        def __getitem__(self, indices: np.ndarray) -> np.ndarray:
            return indices

    labels = _Labels()  # type: ignore[assignment]

    def __len__(self) -> int:
        return 10**9


def test_the_first_batch_of_a_billion_samples_is_there_at_once() -> None:
    began = time.process_time()
    stream = TrainStream(
        Endless(), config=DataConfig(), global_batch_size=4096, micro_batch_size=4096, data_rank=0, data_size=1,
        seed=5, with_images=False,
    )  # fmt: skip
    first = next(stream.steps(0))[0].labels
    late = next(stream.steps(10**7))[0].labels  # in the 41st epoch
    assert time.process_time() - began < 1
    assert first[:3].tolist() == [oracle(5, 0, at, 10**9) for at in range(3)]
    epoch, place = divmod(10**7 * 4096, 10**9)
    assert late[:3].tolist() == [oracle(5, epoch, place + at, 10**9) for at in range(3)]


def test_splits_are_the_same_on_every_machine() -> None:
    assert keyed_permutation(0, Purpose.ORDER, 0, 8).tolist() == [2, 0, 4, 1, 7, 5, 3, 6]


def test_keyed_rows_do_not_depend_on_the_rows_before() -> None:
    rows = keyed_uniforms(7, Purpose.AUGMENT, first=0, count=20, width=11)
    np.testing.assert_array_equal(keyed_uniforms(7, Purpose.AUGMENT, first=13, count=4, width=11), rows[13:17])
    assert not np.array_equal(keyed_uniforms(7, Purpose.ORDER, first=0, count=20, width=11), rows)
    assert not np.array_equal(keyed_uniforms(8, Purpose.AUGMENT, first=0, count=20, width=11), rows)
    assert len(np.unique(rows)) > 200  # rows do not overlap
