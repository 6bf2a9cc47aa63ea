"""Bad samples: which ones stand in for them, in every layout; what evaluation leaves out; when there are too many."""

from __future__ import annotations

import errno
import itertools
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import BadSampleError, Batch, DataConfig, EvalStream, TextShape, TooManyBadError, TrainStream
from data.batch import SECOND_VIEW
from data.captions import TemplateCaptions
from data.datasets import ArrayDataset
from data.decode import CENTRE, decode
from data.errors import UnreadableImageError
from data.mending import TRIES
from data.texts import make_texts
from data.tokenizers import ByteTokenizer

SIZE, BAD = 40, (3, 7, 8, 20, 39)  # 7 has a label that is none


class Damaged(ArrayDataset):
    """Image i is of pixels i / SIZE. It says its number, and its class."""

    def __init__(self, bad: Sequence[int] = BAD) -> None:
        images = (torch.arange(SIZE) / SIZE)[:, None, None, None].expand(SIZE, 1, 2, 2)
        super().__init__(images, np.arange(SIZE) % 3, 3)
        self.bad = bad
        if 7 in bad:
            self.labels[7] = 3
        self.captions = TemplateCaptions(names=("a", "b", "c", "none"), templates=("{}",), class_prompts=("{}",))
        self.texts = make_texts(ByteTokenizer(), TextShape(length=4, vocabulary_size=300))

    def read(self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None) -> Tensor:
        for index in indices.tolist():
            if index in self.bad and index != 7:
                raise BadSampleError(f"{index}.png cannot be decoded")
        return super().read(indices, crop)


class Wire:
    """Between two streams of one process: what the first has told is there for the second."""

    def __init__(self, told: dict[int, deque[NDArray[np.int64]]], decides: bool) -> None:
        self.told, self.decides = told, decides

    def pass_on(self, number: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.decides:
            self.told[number].append(indices)
        return indices if self.decides else self.told[number].popleft()

    def begin(self) -> None:
        pass


def config_of(**changes: Any) -> DataConfig:
    return DataConfig(kind="image_folder", path="photos", **{"max_bad_share": 0.2} | changes)


def training(steps: int, config: DataConfig, dataset: ArrayDataset | None = None, **options: Any) -> tuple[Any, Any]:
    """(micro-batches, bad ones) of all data ranks, in the order of the draws."""
    given = {"global_batch_size": 12, "micro_batch_size": 6, "data_size": 1, "seed": 5} | options
    batches, bad = defaultdict[int, list[Batch]](list), []
    for rank in range(given["data_size"]):
        stream = TrainStream(dataset or Damaged(), config=config, data_rank=rank, **given)
        for step, own in enumerate(itertools.islice(stream.steps(0), steps)):
            batches[step] += list(own)
        bad += stream.bad
    return [batch for step in range(steps) for batch in batches[step]], sorted(bad)


def numbers(batches: Sequence[Batch]) -> list[int]:
    return torch.cat([batch.indices for batch in batches if batch.indices is not None]).tolist()


def check_agrees(batch: Batch) -> None:
    """Pixels, labels and texts are those of the samples that are named."""
    assert batch.images is not None and batch.indices is not None and batch.texts is not None
    greys = (batch.images[:, 0, 0, 0] / 2 + 0.5) * SIZE
    assert greys.round().int().tolist() == batch.indices.tolist()
    assert batch.labels.tolist() == (batch.indices % 3).tolist()
    assert (batch.texts[:, 1] - batch.labels).unique().numel() == 1  # a, b, c


def test_others_stand_in_for_bad_samples_alike_in_every_layout() -> None:
    whole, bad = training(8, config_of())
    found = numbers(whole)
    expected = TrainStream(
        Damaged(()), config=config_of(), global_batch_size=96, micro_batch_size=96, data_rank=0, data_size=1, seed=5
    )
    drawn = numbers(list(next(expected.steps(0))))
    assert not set(found) & set(BAD) and set(BAD) <= set(drawn)
    assert [(one.place, one.sample) for one in bad] == [(d, i) for d, i in enumerate(drawn) if i in BAD]
    assert [one.instead for one in bad] == [found[one.place] for one in bad]
    assert [f for f, d in zip(found, drawn, strict=True) if d not in BAD] == [d for d in drawn if d not in BAD]
    assert {one.cause for one in bad if one.sample == 7} == {"sample 7 has label 3, and labels are 0 to 2"}
    assert len({one.instead for one in bad if one.sample == 3}) > 1  # by the draw
    for batch in whole:
        check_agrees(batch)
    for layout in ({"data_size": 2}, {"data_size": 3, "micro_batch_size": 2}, {"micro_batch_size": 1}):
        assert (numbers(training(8, config_of(), **layout)[0]), training(8, config_of(), **layout)[1]) == (found, bad)
    assert (numbers(training(8, config_of(workers=2))[0]), training(8, config_of(workers=2))[1]) == (found, bad)
    assert numbers(training(4, config_of(), offset=48)[0]) == found[48:]  # as a run that goes on
    assert numbers(training(8, config_of(), seed=6)[0]) != found


def test_views_and_repeats_of_a_bad_sample_are_of_one_other() -> None:
    batches, bad = training(6, config_of(views=2, repeats=3, flip=True), micro_batch_size=12)
    for batch in batches:
        check_agrees(batch)
        first, second = batch.indices.reshape(2, 4, 3)  # type: ignore[union-attr]
        assert torch.equal(first, second) and (first == first[:, :1]).all()
        assert (batch.sample_ids[12:] - batch.sample_ids[:12] == SECOND_VIEW).all()
    assert bad and all(len({one.instead for one in bad if one.place // 3 == place}) <= 1 for place in range(24))


def test_a_sample_of_the_same_source_stands_in() -> None:
    dataset = Damaged()
    dataset.source_ends = np.array([10, SIZE])
    for one in training(8, config_of(), dataset)[1]:
        assert (one.sample < 10) == (one.instead < 10)


def test_where_few_labels_are_known_stand_ins_have_one_if_the_bad_sample_had() -> None:
    dataset = Damaged((3, 30))
    dataset.labels[[i for i in range(SIZE) if i not in (3, 12, 13, 20)]] = -1
    dataset.labelled, dataset.source_ends = 4, np.array([14, SIZE - 10, SIZE])
    dataset.texts = None
    bad = training(10, config_of(), dataset)[1]
    assert {one.instead for one in bad if one.sample == 3} == {12, 13}
    assert {one.instead for one in bad if one.sample == 30} <= {*range(31, SIZE)}  # without one
    assert {one.sample for one in bad} == {3, 30}
    dataset.bad = (20,)  # the only one of its source
    with pytest.raises(TooManyBadError, match=r"sample 20 is bad, and so are 16 others"):
        training(10, config_of(), dataset)


def test_ranks_that_decode_nothing_are_told() -> None:
    """One finds out; one has texts alone, one labels alone. All ask in orders of their own, and again."""
    wires = {name: defaultdict[int, deque[NDArray[np.int64]]](deque) for name in ("texts", "labels")}

    class Told(Wire):
        """The one that decodes tells both."""

        def pass_on(self, number: int, indices: NDArray[np.int64]) -> NDArray[np.int64]:
            for wire in wires.values():
                wire[number].append(indices)
            return indices

    def stream(relay: Wire, images: bool, texts: bool) -> Iterator[Sequence[Batch]]:
        place: dict[str, Any] = {"micro_batch_size": 4, "data_rank": 0, "data_size": 1, "config": config_of()}
        needs = {"with_images": images, "with_texts": texts, "relay": relay}
        return TrainStream(Damaged(), global_batch_size=12, seed=5, **place, **needs).steps(0)

    decodes = stream(Told({}, True), True, False)
    texts, labels = stream(Wire(wires["texts"], False), False, True), stream(Wire(wires["labels"], False), False, False)
    for one, two, three in itertools.islice(zip(decodes, texts, labels, strict=True), 8):
        first = [one[m] for m in (0, 1, 2, 1)]
        for others, order in ((two, (2, 0, 1, 2)), (three, (1, 2, 0, 0))):
            for m in order:
                assert torch.equal(others[m].labels, first[m].labels)
                assert others[m].indices.tolist() == first[m].indices.tolist()
        for m in range(3):
            texts_of = two[m].texts
            assert texts_of is not None
            assert (texts_of[:, 1] - first[m].labels).unique().numel() == 1  # a, b, c


def test_what_earlier_steps_were_of_is_forgotten() -> None:
    """Else a rank would keep every micro-batch that ever had a bad sample, and look at all of them at each step."""
    relay = Wire(defaultdict(deque), True)
    place: dict[str, Any] = {"global_batch_size": 12, "micro_batch_size": 4, "data_rank": 0, "data_size": 1}
    stream = TrainStream(Damaged(), config=config_of(), seed=5, relay=relay, **place)
    for step in itertools.islice(stream.steps(0), 8):
        assert len(list(step)) == 3
    assert len(stream.bad) > 4 and len(stream._agreement._told) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_bad_samples_out(workers: int) -> None:
    wire = defaultdict[int, deque[NDArray[np.int64]]](deque)
    place: dict[str, Any] = {"micro_batch_size": 6, "data_rank": 0, "data_size": 1}
    place["config"] = config_of(workers=workers)
    decodes = EvalStream(Damaged(), leaves_out=True, relay=Wire(wire, True), **place)
    told = EvalStream(Damaged(), leaves_out=True, relay=Wire(wire, False), with_images=False, **place)
    batches = list(decodes)
    assert [one.sample for one in decodes.bad] == list(BAD) and {one.instead for one in decodes.bad} == {None}
    real = [torch.cat([getattr(b, name)[b.weights == 1] for b in batches]) for name in ("sample_ids", "labels")]
    assert real[0].tolist() == [i for i in range(SIZE) if i not in BAD] and real[1].tolist() == [i % 3 for i in real[0]]
    for one, other in zip(batches, told, strict=True):
        assert one.images is not None and one.texts is not None and other.texts is not None
        gone = one.weights == 0
        assert (one.images[gone] == -1).all() and (one.sample_ids[gone] == -1).all() and (one.labels[gone] == 0).all()
        for name in ("labels", "sample_ids", "weights", "texts", "indices"):
            assert torch.equal(getattr(one, name), getattr(other, name))
    with pytest.raises(BadSampleError, match=r"^3\.png cannot be decoded$"):
        list(EvalStream(Damaged(), **place))


def test_too_many_bad_samples_are_told() -> None:
    with pytest.raises(BadSampleError, match=r"cannot be decoded$|has label 3"):
        training(8, config_of(max_bad_share=0.0))
    for workers in (0, 1):
        with pytest.raises(TooManyBadError, match=rf"^draw 0: sample \d+ is bad, and so are {TRIES} others"):
            training(1, config_of(workers=workers), Damaged(range(SIZE)))


def test_a_fault_of_the_disk_is_no_fault_of_the_sample() -> None:
    class Broken(BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    for file in (Broken(), BytesIO(b"x"), "/no/such.png"):
        with pytest.raises(UnreadableImageError) as caught:
            decode(file, CENTRE, (1, 8, 8))
        assert isinstance(caught.value, BadSampleError) is not isinstance(file, Broken)


def test_stand_ins_are_mixed_alike() -> None:
    """By Mixup and CutMix, micro-batches that part pairs, too: labels are those of what stands in."""
    config = config_of(mixup=0.5, cutmix=1.0)

    def joined(batches: list[Batch]) -> dict[str, Tensor]:
        names = ("images", "labels", "other_labels", "own_shares", "indices")
        return {name: torch.cat([vars(batch)[name] for batch in batches]) for name in names}

    batches, bad = training(4, config, with_texts=False)
    expected = joined(batches)
    pairs = expected["labels"].unflatten(0, (-1, 2))
    assert len(bad) > 4 and torch.equal(expected["other_labels"], pairs.flip(1).flatten())
    assert torch.equal(expected["labels"], expected["indices"] % 3)
    for data_size, micro in ((1, 3), (4, 1)):
        found, others = training(4, config, with_texts=False, data_size=data_size, micro_batch_size=micro)
        assert others == bad
        for name, x in joined(found).items():
            assert torch.equal(x, expected[name]), (name, data_size, micro)
