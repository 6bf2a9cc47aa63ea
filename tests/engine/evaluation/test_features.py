"""The mathematics of evaluation against scikit-learn and plain numpy, and on four ranks against one."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.evaluation import sgd
from engine.evaluation.clusters import clustering
from engine.evaluation.fewshot import drawn, few_shot
from engine.evaluation.knn import knn
from engine.evaluation.logistic import Samples, fit
from engine.evaluation.nearest import nearest
from engine.evaluation.probe import Sets, probe
from engine.evaluation.retrieval import retrieval
from engine.evaluation.rows import Rows
from engine.evaluation.zero_shot import class_embeddings, zero_shot
from parallel.comm import Axis, single_axis
from parallel.grid import world_axis
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.evaluation.samples import CLASSES, TRAIN, WIDTH, blobs, share


def sets_on(axis: Axis) -> Sets:
    train, train_labels, test, test_labels = blobs()
    return Sets(share(train, axis), train_labels, share(test, axis), test_labels, np.arange(3, TRAIN, 5), CLASSES)


def captions() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of 30 images and 71 texts, one to five for each image, in no order; the image of each text."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(30, WIDTH, generator=generator)
    of = torch.cat([torch.arange(30), torch.randint(0, 30, (41,), generator=generator)])
    of = of[torch.randperm(71, generator=generator)]
    texts = images[of] + 1.2 * torch.randn(71, WIDTH, generator=generator)
    return images, texts, of


def figures(axis: Axis) -> dict[str, Any]:
    """All that there is to evaluate, small."""
    sets = sets_on(axis)
    train, test = sets.train, sets.test
    votes = knn(
        test, sets.test_labels, train, sets.train_labels, classes=CLASSES, ks=(1, 5, 20, TRAIN), temperature=0.07
    )
    found = nearest(test.normalised(), train.normalised(), 7)
    lbfgs = probe(sets.standardised(), strengths=(-2.0, 0.0, 2.0), finest=1.0, tolerance=1e-8)
    heads = sgd.sweep(sets, learning_rates=(0.01, 1.0), weight_decays=(0.0, 0.01), epochs=4, fewest_steps=40, batch=32)
    shots = few_shot(
        train,
        sets.train_labels,
        test,
        sets.test_labels,
        classes=CLASSES,
        shots=(1, 3),
        seeds=(0, 1),
        strengths=(1.0, 2.0**10),
    )
    put = clustering(train, sets.train_labels, test, sets.test_labels, classes=CLASSES, starts=4)
    images, texts, of = captions()
    places = torch.arange(axis.index, 10, axis.size)  # prompts may lie anywhere
    zero = zero_shot(share(images, axis), of[:30] % 5, class_embeddings(texts[places], places // 2, 5, axis))
    dealt = Rows.dealt(images[(own := torch.arange(30).flip(0)[axis.index :: axis.size])], own, axis)
    assert torch.equal(dealt.values, share(images, axis).values)
    recalls = retrieval(share(images, axis), share(texts, axis), of)
    return {
        "votes": [asdict(vote) for vote in votes],
        "nearest": found.indices.tolist(),
        "probe": (lbfgs.accuracy, lbfgs.l2, [asdict(t) | {"iterations": 0} for t in lbfgs.tried], lbfgs.converged),
        "sgd": (heads.accuracy, heads.best, [(setting, *found) for setting, found in heads.tried], heads.steps),
        "shots": shots.accuracies,
        "clusters": asdict(put),
        "zero": asdict(zero),
        "recalls": asdict(recalls),
        "same texts": asdict(retrieval(share(images, axis), share(texts, axis), of, numbers=torch.arange(71) % 11)),
        "gathered": train.gather(np.array([89, 0, 40, 40])).tolist(),
    }


def on_rank(world: World) -> dict[str, Any]:
    return figures(world_axis(world))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return figures(single_axis("world"))


def test_four_ranks_find_what_one_does(alone: dict[str, Any]) -> None:
    """The very same numbers: counts of samples, and neighbours in their order."""
    ranks = run_ranks(4, on_rank)
    assert [row for found in ranks for row in found.pop("nearest")] == alone["nearest"]
    one = copy.deepcopy(alone)
    for figures_of in (one, *ranks):  # sums are taken in another order, and fits end when their gradients are small
        for i, tried in enumerate(figures_of["probe"][2]):
            assert tried.pop("held_out_loss") == pytest.approx(alone["probe"][2][i]["held_out_loss"], rel=1e-5)
        accuracy, best, tried, steps = figures_of["sgd"]
        losses = [loss for *_, loss in tried]
        assert losses == pytest.approx([loss for *_, loss in alone["sgd"][2]], rel=1e-5)
        figures_of["sgd"] = accuracy, best, [rest for *rest, _ in tried], steps
        for i, start in enumerate(figures_of["clusters"]["starts"]):
            assert start.pop("spread") == pytest.approx(alone["clusters"]["starts"][i]["spread"], rel=1e-12)
    one.pop("nearest")
    assert all(found == one for found in ranks)


def test_more_ranks_than_samples() -> None:
    assert run_ranks(3, two_samples) == [([[1, 0], [0, 1]][r : r + 1] if r < 2 else []) for r in range(3)]


def two_samples(world: World) -> list[list[int]]:
    axis = world_axis(world)
    bank, queries = share(torch.eye(2), axis), share(torch.eye(2).flip(0), axis)
    return nearest(queries, bank, 2).indices.tolist()


# -- against others ----------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_scikit_learn(alone: dict[str, Any]) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    train, train_labels, test, test_labels = blobs()
    for vote in alone["votes"]:
        plain = KNeighborsClassifier(vote["k"], metric="cosine", algorithm="brute").fit(train, train_labels)
        assert vote["plain"] == pytest.approx(plain.score(test, test_labels), abs=1e-12)

        def dino(distances: Any) -> Any:
            return np.exp((1 - distances) / 0.07)

        weighted = KNeighborsClassifier(vote["k"], metric="cosine", algorithm="brute", weights=dino)
        assert vote["weighted"] == pytest.approx(weighted.fit(train, train_labels).score(test, test_labels), abs=1e-12)
    assert alone["votes"][0]["plain"] < alone["votes"][2]["weighted"]  # the classes overlap: there is something to find


def test_equal_neighbours_come_in_the_order_of_their_numbers() -> None:
    """Also far from the beginning of a block, of equal ones beyond k, and of negative similarities."""
    bank = torch.tensor([[-1.0, 0.0]] * 3 + [[1.0, 0.0]] * 9000)
    axis = single_axis("world")
    found = nearest(share(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), axis), share(bank, axis), 9001)
    assert found.indices[0].tolist() == [*range(3, 9003), 0]
    assert found.indices[1].tolist() == [*range(9001)]
    assert found.similarities[0, -1].item() == -1.0 and found.similarities[1, :4].tolist() == [1.0, 1.0, 1.0, -1.0]
    with pytest.raises(ValueError, match="9004 neighbours are asked for, and the bank has 9003"):
        nearest(share(bank, axis), share(bank, axis), 9004)


@pytest.mark.parametrize("l2", [1e-3, 1.0, 100.0])
def test_the_logistic_regression_is_that_of_scikit_learn(l2: float) -> None:
    from sklearn.linear_model import LogisticRegression

    train, labels, *_ = blobs()
    axis = single_axis("world")
    classifier, found = fit(
        Samples.of(share(train, axis), labels), CLASSES, l2, start=None, tolerance=1e-8, iterations=1000
    )
    assert found.converged
    theirs = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12).fit(train.double(), labels)
    ours, bias = classifier.matrix[:-1].T, classifier.matrix[-1]
    np.testing.assert_allclose(ours, theirs.coef_, atol=2e-4 * np.abs(theirs.coef_).max())
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)


def test_the_probe_takes_the_best_strength_and_fits_all(alone: dict[str, Any]) -> None:
    from sklearn.linear_model import LogisticRegression

    accuracy, l2, tried, converged = alone["probe"]
    assert converged and all(t["converged"] for t in tried)
    train, labels, test, test_labels = blobs()
    mean, deviation = train.double().mean(0), train.double().std(0, correction=0)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    held_out = np.arange(3, TRAIN, 5)
    fitted = np.setdiff1d(np.arange(TRAIN), held_out)
    model = {t["l2"]: LogisticRegression(C=1 / t["l2"], solver="newton-cholesky", tol=1e-12) for t in tried}
    for t in tried:
        theirs = model[t["l2"]].fit(train[fitted], labels[fitted])
        assert t["held_out_accuracy"] == pytest.approx(theirs.score(train[held_out], labels[held_out]), abs=1e-12)
        likely = theirs.predict_proba(train[held_out])[np.arange(len(held_out)), labels[held_out]]
        assert t["held_out_loss"] == pytest.approx(-np.log(likely).mean(), rel=1e-4)
    assert [round(float(np.log10(t["l2"])), 6) for t in tried][:1] == [-2.0] and len(tried) > 3  # it came closer
    assert l2 == max(tried, key=lambda t: (t["held_out_accuracy"], -t["held_out_loss"]))["l2"]
    score = (
        LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12).fit(train, labels).score(test, test_labels)
    )
    assert accuracy == pytest.approx(score, abs=1e-12)


def test_one_classifier_of_the_sweep_is_a_plain_training() -> None:
    _, labels, *_ = blobs()
    sets = sets_on(single_axis("world"))
    plan = sgd._Plan.of(np.arange(TRAIN), sets, epochs=2, fewest=25, batch=32, seed=5)
    settings = [sgd.Setting(0.5, 0.01), sgd.Setting(1e9, 0.0), sgd.Setting(0.1, 0.0)]
    trained = sgd._train(settings, plan, CLASSES)
    for h, setting in enumerate(settings):
        if h == 1:
            continue
        layer = torch.nn.Linear(WIDTH, CLASSES)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(
            layer.parameters(), lr=setting.lr * 32 / 256, momentum=0.9, weight_decay=setting.weight_decay
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
        for x, y in plan.batches():
            optimizer.zero_grad()
            F.cross_entropy(layer(x), y).backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(trained[:-1, h], layer.weight.T.detach(), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(trained[-1, h], layer.bias.detach(), atol=2e-5, rtol=1e-4)
    assert not trained[:, 1].isfinite().all() or trained[:, 1].abs().max() > 1e6  # and that hurts no other
    seen = torch.cat([y for _, y in plan.batches()])
    assert len(seen) == 25 * 32 and torch.bincount(seen[:TRAIN]).tolist() == torch.bincount(labels).tolist()


def test_few_shots_are_least_squares(alone: dict[str, Any]) -> None:
    """Against the least squares of an augmented matrix, in numpy, drawn and standardised as big_vision does."""
    train, labels, test, test_labels = (x.numpy().astype(np.float64) for x in blobs())
    labels, test_labels = labels.astype(int), test_labels.astype(int)
    for (shots, l2), found in alone["shots"].items():
        for seed, accuracy in enumerate(found):
            rng = np.random.default_rng(seed)
            indices = np.concatenate([rng.permutation(np.where(labels == c)[0])[:shots] for c in range(CLASSES)])
            mean, std = train[indices].mean(0), train[indices].std(0) + 1e-5
            x = np.c_[(train[indices] - mean) / std, np.full(len(indices), 100.0)]
            y = np.where(labels[indices][:, None] == np.arange(CLASSES), 1.0, -1.0)
            augmented = np.r_[x, np.sqrt(l2) * np.eye(WIDTH + 1)]
            weights = np.linalg.lstsq(augmented, np.r_[y, np.zeros((WIDTH + 1, CLASSES))], rcond=None)[0]
            answers = (np.c_[(test - mean) / std, np.full(len(test), 100.0)] @ weights).argmax(1)
            assert accuracy == pytest.approx((answers == test_labels).mean(), abs=1e-12), (shots, l2, seed)
    assert {shots for shots, _ in alone["shots"]} == {1, 3}  # fewer images than features, and more
    with pytest.raises(ValueError, match="no training image of class 4"):
        drawn(labels, 5, 1, 0)


def test_zero_shots_are_nearest_means(alone: dict[str, Any]) -> None:
    images, texts, of = captions()
    labels, classes = of[:30] % 5, []
    for c in range(5):
        pair = [text / text.norm() for text in texts[2 * c : 2 * c + 2].double()]
        mean = (pair[0] + pair[1]) / 2
        classes.append(mean / mean.norm())
    right = [
        int(np.argmax([(image.double() @ c / image.norm()).item() for c in classes])) == label
        for image, label in zip(images, labels.tolist(), strict=True)
    ]
    assert alone["zero"]["accuracy"] == pytest.approx(np.mean(right))
    assert alone["zero"]["top5"] == 1.0
    per_class = [np.mean([r for r, label in zip(right, labels, strict=True) if label == c]) for c in range(5)]
    assert alone["zero"]["mean_per_class"] == pytest.approx(np.mean(per_class))


def test_recall_counts_any_of_an_images_texts(alone: dict[str, Any]) -> None:
    images, texts, of = captions()
    similarities = (F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T).numpy()
    for k in (1, 5, 10):
        to_text = [any(of[j] == i for j in np.argsort(-row)[:k]) for i, row in enumerate(similarities)]
        to_image = [of[j].item() in np.argsort(-column)[:k] for j, column in enumerate(similarities.T)]
        assert alone["recalls"]["image_to_text"][k] == pytest.approx(np.mean(to_text))
        assert alone["recalls"]["text_to_image"][k] == pytest.approx(np.mean(to_image))
    same = torch.arange(71) % 11  # texts that are the same belong to all their images
    axis, recalls = single_axis("world"), alone["same texts"]
    belongs = {(int(i), int(n)) for i, n in zip(of, same, strict=True)}
    for k in (1, 5, 10):  # the first of each number is looked at
        to_text = [any((i, j) in belongs for j in np.argsort(-r[:11])[:k]) for i, r in enumerate(similarities)]
        to_image = [
            any((int(i), int(same[j])) in belongs for i in np.argsort(-c)[:k]) for j, c in enumerate(similarities.T)
        ]
        assert recalls["image_to_text"][k] == pytest.approx(np.mean(to_text))
        assert recalls["text_to_image"][k] == pytest.approx(np.mean(to_image))
    assert recalls["text_to_image"][1] > alone["recalls"]["text_to_image"][1]
    assert 0 < alone["recalls"]["text_to_image"][1] < alone["recalls"]["text_to_image"][10] < 1
    with pytest.raises(ValueError, match="each of the 30 images needs a text"):
        retrieval(share(images, axis), share(texts, axis), of.clamp(max=28))
