from __future__ import annotations

import numpy as np

from data.keyed import Purpose, keyed_permutation, keyed_uniforms
from data.sampling import SampleOrder


def test_every_epoch_holds_every_image_once() -> None:
    order = SampleOrder(10, seed=3)
    stream = order.indices(np.arange(50)).reshape(5, 10)
    assert (np.sort(stream, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in stream}) == 5


def test_order_depends_on_seed_and_draw_alone() -> None:
    stream = SampleOrder(10, seed=3).indices(np.arange(50))
    assert not np.array_equal(stream, SampleOrder(10, seed=4).indices(np.arange(50)))
    backwards = SampleOrder(10, seed=3)
    for first in (43, 17, 0):  # in any order, across epochs
        draws = np.arange(first, first + 7)
        np.testing.assert_array_equal(backwards.indices(draws), stream[draws])


def test_at_most_two_permutations_are_kept() -> None:
    order = SampleOrder(4, seed=0)
    order.indices(np.arange(40))
    assert set(order._permutations) == {8, 9}


def test_order_is_the_same_on_every_machine() -> None:
    assert keyed_permutation(0, Purpose.ORDER, 0, 8).tolist() == [2, 0, 4, 1, 7, 5, 3, 6]


def test_keyed_rows_do_not_depend_on_the_rows_before() -> None:
    rows = keyed_uniforms(7, Purpose.AUGMENT, first=0, count=20, width=11)
    np.testing.assert_array_equal(keyed_uniforms(7, Purpose.AUGMENT, first=13, count=4, width=11), rows[13:17])
    assert not np.array_equal(keyed_uniforms(7, Purpose.ORDER, first=0, count=20, width=11), rows)
    assert not np.array_equal(keyed_uniforms(8, Purpose.AUGMENT, first=0, count=20, width=11), rows)
    assert len(np.unique(rows)) > 200  # rows do not overlap
