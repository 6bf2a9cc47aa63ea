"""Clusters of features against scikit-learn's (on several ranks: test_features.py)."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from torch.nn import functional as F

from engine.evaluation.clusters import begin, clustering
from parallel.comm import single_axis
from tests.engine.evaluation.samples import CLASSES, TRAIN, blobs, share


def test_clusters_are_those_of_scikit_learn_and_are_named_at_best() -> None:
    from sklearn.cluster import KMeans

    train, labels, test, test_labels = blobs()
    axis = single_axis("world")
    rows = share(train, axis).normalised()
    found = clustering(share(train, axis), labels, share(test, axis), test_labels, classes=CLASSES, starts=4)
    unit, unit_test = rows.values.double().numpy(), F.normalize(test, dim=1).double().numpy()
    fits = []
    for i, start in enumerate(found.starts):
        first = begin(rows, np.random.default_rng([0, i]).random(CLASSES)).numpy()
        assert {tuple(row) for row in first} <= {tuple(row) for row in unit} and len(
            np.unique(first, axis=0)
        ) == CLASSES
        fits.append(KMeans(CLASSES, init=first, n_init=1, algorithm="lloyd", tol=0, max_iter=1000).fit(unit))
        assert start.spread == pytest.approx(fits[i].inertia_ / TRAIN, rel=1e-9) and start.converged
    best = fits[found.best]
    assert best.inertia_ == pytest.approx(min(fit.inertia_ for fit in fits))

    def share_right(names: tuple[int, ...]) -> float:
        return float(np.mean(np.array(names)[best.labels_] == labels.numpy()))

    names = max(permutations(range(CLASSES)), key=share_right)
    assert found.train_accuracy == pytest.approx(share_right(names)) and tuple(found.names) == names
    answers = np.array(names)[best.predict(unit_test)]
    assert found.accuracy == pytest.approx(np.mean(answers == test_labels.numpy()))
    with pytest.raises(ValueError, match="91 clusters of 90 training images"):
        clustering(rows, labels, rows, labels, classes=91)
