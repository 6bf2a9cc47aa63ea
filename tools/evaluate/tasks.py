"""What each task does with a model and images, and what it tells: lines for people, and figures by name."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from data import Dataset, EvalStream
from engine.assembly import Assembly
from engine.errors import ConfigError
from engine.evaluation import clusters, fewshot, knn, probe, retrieval, sgd, zero_shot
from engine.evaluation.extract import Extractor
from engine.evaluation.rows import Rows
from engine.run.step import Stepper
from model import MicroBatch
from parallel.tensor import gather_features
from tools.evaluate.images import Images
from tools.evaluate.options import powers_of
from tools.evaluate.texts import Captions, TextStream, prompts_of, tokens_of

Figures = dict[str, Any]
_USUAL_K, _USUAL_SHOTS = 20, 10  # what accuracy is told of, where there is one figure


@dataclass(frozen=True)
class Job:
    """What a task works with. text: makes the text tower. Collective. say: on rank 0."""

    options: argparse.Namespace
    assembly: Assembly
    images: Images
    text: Callable[[], Assembly]
    say: Callable[[str], None]

    def stream(self, dataset: Dataset) -> EvalStream:
        """Each image once over all data ranks."""
        a = self.assembly
        micro = a.config.train.micro_batch_size
        assert micro is not None
        return EvalStream(
            dataset,
            config=a.config.data,
            micro_batch_size=micro,
            data_rank=a.grid.data.index,
            data_size=a.grid.data.size,
            with_images=a.holds_images,
            with_texts=False,
        )

    def features(self) -> tuple[Rows, Rows]:
        """Of training and test images. Collective."""
        began = time.perf_counter()
        extractor = extractor_of(self.assembly)
        sets = (("training image", self.images.train), ("held-out image", self.images.test))
        train, test = (extractor.rows(self.stream(images), len(images), what) for what, images in sets)
        seconds = time.perf_counter() - began
        self.say(f"features    {train.width} per image, of {train.total} + {test.total} images in {seconds:.1f} s")
        return train, test

    def embeddings(self, tokens: Tensor) -> tuple[Rows, Rows]:
        """Of held-out images, and of texts in tokens [M, S]. Collective."""
        began = time.perf_counter()
        held_out = self.images.test
        images = extractor_of(self.assembly).rows(self.stream(held_out), len(held_out), "held-out image")
        tower = self.text()
        found = extractor_of(tower).rows(TextStream(tokens, tower), len(tokens), "text")
        seconds = time.perf_counter() - began
        self.say(
            f"embeddings  {images.width} each, of {images.total} images and {found.total} texts in {seconds:.1f} s"
        )
        return images, found


def extractor_of(assembly: Assembly) -> Extractor:
    """Of what the last layer gives, whole on every tensor rank."""
    last, tp = assembly.layers[-1], assembly.build.tp
    width = last.output[1]

    def whole(outputs: tuple[Tensor, ...], batch: MicroBatch) -> Tensor:
        return gather_features(outputs[0], tp, width) if last.gives == "shares" else outputs[0]

    return Extractor(assembly, whole, width)


def finite(number: float) -> float | None:
    """What JSON has no word for is null."""
    return number if math.isfinite(number) else None


def supervised(job: Job) -> Figures:
    """As the run itself has evaluated it."""
    figures = Stepper(job.assembly).evaluate(job.stream(job.images.test))
    job.say(" | ".join(f"{name} {value:.4g}" for name, value in figures.items() if name not in ("images", "accuracy")))
    return figures


def check_neighbours(options: argparse.Namespace, bank: int) -> list[int]:
    """The numbers of neighbours to ask for. Raises ConfigError for one that is given and larger than the bank."""
    if options.k is None:
        return [k for k in knn.NEIGHBOURS if k <= bank]
    if (most := max(options.k)) > bank:
        raise ConfigError(
            f"--k {most} is more than the {bank} training images that neighbours come from: ask for fewer"
        )
    return sorted(set(options.k))


def neighbours(job: Job) -> Figures:
    """Votes of the nearest training images."""
    images, ks = job.images, check_neighbours(job.options, len(job.images.train))
    train, test = job.features()
    votes = knn.knn(
        test, images.test_labels, train, images.train_labels, classes=images.classes, ks=ks,
        temperature=job.options.temperature,
    )  # fmt: skip
    for vote in votes:
        job.say(f"  k {vote.k:>3}: {vote.weighted:.2%} weighted by similarity, {vote.plain:.2%} one vote each")
    told = min(votes, key=lambda vote: abs(vote.k - _USUAL_K))
    return {"accuracy": told.weighted, "k": told.k, "votes": [asdict(vote) for vote in votes]}


def linear_probe(job: Job) -> Figures:
    """By L-BFGS, by SGD, or both."""
    o, images = job.options, job.images
    train, test = job.features()
    sets = probe.Sets(train, images.train_labels, test, images.test_labels, images.held_out(), images.classes)
    sets = sets.standardised() if o.standardise else sets
    figures: Figures = {"standardised": o.standardise, "chosen_by_images": len(sets.held_out)}
    if o.solver != "sgd":
        fitted = probe.probe(
            sets, strengths=powers_of(o), finest=o.l2_finest, tolerance=o.tolerance, iterations=o.max_iterations,
            tell=job.say,
        )  # fmt: skip
        job.say(f"lbfgs       {fitted.accuracy:.2%} with l2 {fitted.l2:.3e}, the best of {len(fitted.tried)}")
        figures["lbfgs"] = asdict(fitted)
    if o.solver != "lbfgs":
        swept = sgd.sweep(
            sets, learning_rates=o.lr, weight_decays=o.weight_decay, epochs=o.epochs, batch=o.batch, tell=job.say
        )
        best = swept.best
        job.say(
            f"sgd         {swept.accuracy:.2%} with lr {best.lr:g} and weight decay {best.weight_decay:g}, the best of "
            f"{len(swept.tried)}"
        )
        tried = [
            asdict(setting) | {"held_out_accuracy": found.accuracy, "held_out_loss": finite(found.loss)}
            for setting, found in swept.tried
        ]
        figures["sgd"] = asdict(swept) | {"tried": tried}
    return figures | {"accuracy": figures["lbfgs" if "lbfgs" in figures else "sgd"]["accuracy"]}


def few_shots(job: Job) -> Figures:
    """Least squares on a few images of each class."""
    o, images = job.options, job.images
    train, test = job.features()
    found = fewshot.few_shot(
        train, images.train_labels, test, images.test_labels, classes=images.classes, shots=o.shots, seeds=o.seeds,
        strengths=o.l2,
    )  # fmt: skip
    usual = min(o.l2, key=lambda l2: abs(l2 - fewshot.L2))
    for shots in o.shots:
        best = max(o.l2, key=lambda l2: found.mean(shots, l2))
        job.say(
            f"  {shots:>3} shots: {found.mean(shots, usual):.2%} with l2 {usual:g}, mean of {len(o.seeds)} seeds (with "
            f"l2 {best:g} {found.mean(shots, best):.2%}, chosen by the images that are asked about)"
        )
    told = min(o.shots, key=lambda shots: abs(shots - _USUAL_SHOTS))
    rows = [
        {"shots": shots, "l2": l2, "accuracy": found.mean(shots, l2), "of_each_seed": list(of_seeds)}
        for (shots, l2), of_seeds in found.accuracies.items()
    ]
    return {"accuracy": found.mean(told, usual), "shots": told, "l2": usual, "seeds": list(o.seeds), "fits": rows}


def clustered(job: Job) -> Figures:
    """Clusters of training images."""
    images, starts = job.images, job.options.starts
    train, test = job.features()
    found = clusters.clustering(
        train, images.train_labels, test, images.test_labels, classes=images.classes, starts=starts
    )
    best, ended = found.starts[found.best], sum(start.converged for start in found.starts)
    job.say(f"  best of {starts} starts ({ended} converged): mean squared distance {best.spread:.6f}")
    job.say(f"  {found.train_accuracy:.2%} of the training images are in the cluster of their class")
    return asdict(found)


def zero_shots(job: Job) -> Figures:
    """Classes described by prompts."""
    images, told = job.images, prompts_of(job.images.test)
    said = [prompt for of_class in told for prompt in of_class]
    found, texts = job.embeddings(tokens_of(said, images.test))
    of = torch.arange(texts.span.start, texts.span.stop, device=texts.values.device) // len(told[0])
    classes = zero_shot.class_embeddings(texts.values, of, len(told), texts.axis)
    result = zero_shot.zero_shot(found, images.test_labels, classes)
    job.say(f"  {len(told[0])} prompts of each class, such as {told[0][-1]!r}: {result.accuracy:.2%}")
    job.say(f"  among the nearest five: {result.top5:.2%}; mean over classes: {result.mean_per_class:.2%}")
    return asdict(result) | {"prompts": told}


def retrievals(job: Job) -> Figures:
    """Texts of images and images of texts."""
    held_out = job.images.test
    captions = Captions.of(held_out, job.assembly.config.data)
    found, texts = job.embeddings(captions.tokens)
    different = int(captions.numbers.max()) + 1
    within = [k for k in retrieval.WITHIN if k <= min(found.total, different)]
    recalls = retrieval.retrieval(found, texts, captions.image_of, numbers=captions.numbers, within=within)
    job.say(f"  {texts.total} texts, of which {different} are different")
    figures: Figures = {"texts": texts.total, "different_texts": different}
    for name, of in (("image_to_text", recalls.image_to_text), ("text_to_image", recalls.text_to_image)):
        shown = ", ".join(f"@{k} {share:.2%}" for k, share in of.items())
        job.say(f"{name.replace('_', ' ')}: recall {shown}")
        figures |= {f"{name}_recall_at_{k}": share for k, share in of.items()}
    return figures


RUN: dict[str, Callable[[Job], Figures]] = {
    "supervised": supervised,
    "knn": neighbours,
    "probe": linear_probe,
    "fewshot": few_shots,
    "clustering": clustered,
    "zero_shot": zero_shots,
    "retrieval": retrievals,
}
