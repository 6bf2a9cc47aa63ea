from __future__ import annotations

import itertools
import resource
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data import Batch, DataConfig, Dataset, EvalStream, TrainStream, UnreadableImageError
from data.datasets import ArrayDataset
from tests.data.order_oracle import oracle

AUGMENTED = DataConfig(rotate=10, shift=0.1, scale=0.1, shear=5, flip=True, crop_min_area=0.8)
Datasets = tuple[Dataset, Dataset]


def train_stream(dataset: Dataset, config: DataConfig = AUGMENTED, **options: Any) -> TrainStream:
    defaults = {"global_batch_size": 24, "micro_batch_size": 24, "data_rank": 0, "data_size": 1, "seed": 0}
    return TrainStream(dataset, config=config, **{**defaults, **options})


def join(batches: Sequence[Batch]) -> Batch:
    assert all(b.images is not None for b in batches)
    texts = [b.texts for b in batches if b.texts is not None]
    return Batch(
        texts=torch.cat(texts) if texts else None,
        images=torch.cat([b.images for b in batches if b.images is not None]),
        labels=torch.cat([b.labels for b in batches]),
        sample_ids=torch.cat([b.sample_ids for b in batches]),
        weights=torch.cat([b.weights for b in batches]),
    )


def assert_same(a: Batch, b: Batch) -> None:
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize(("data_size", "micro"), [(1, 8), (1, 1), (2, 12), (2, 4), (4, 3), (3, 8), (24, 1)])
@pytest.mark.parametrize("step", [0, 59, 60])  # step 59 spans two epochs of 1437 images
def test_a_global_batch_is_the_same_in_every_layout(digits: Datasets, data_size: int, micro: int, step: int) -> None:
    expected = join(next(train_stream(digits[0]).steps(step)))
    ranks = [
        next(train_stream(digits[0], micro_batch_size=micro, data_rank=rank, data_size=data_size).steps(step))
        for rank in range(data_size)
    ]
    assert {len(b.labels) for batches in ranks for b in batches} == {micro}
    assert_same(join(list(itertools.chain.from_iterable(ranks))), expected)
    assert expected.texts is not None and expected.texts.shape == (24, 40)
    assert expected.sample_ids.tolist() == list(range(step * 24, step * 24 + 24))


def test_an_epoch_of_steps_shows_every_image_once(digits: Datasets) -> None:
    dataset, _ = digits
    stream = train_stream(dataset, DataConfig(), global_batch_size=479, micro_batch_size=479)  # 3 x 479 = 1437
    epochs = [join(list(itertools.chain.from_iterable(itertools.islice(stream.steps(s), 3)))) for s in (0, 3)]
    every = dataset.read(np.arange(len(dataset))).sub(0.5).div(0.5)
    for epoch in epochs:
        assert epoch.images is not None
        assert torch.equal(torch.unique(epoch.images, dim=0), torch.unique(every, dim=0))
        assert torch.equal(epoch.weights, torch.ones(1437))
    assert not torch.equal(epochs[0].labels, epochs[1].labels)
    other_seed = next(
        train_stream(dataset, DataConfig(), global_batch_size=1437, micro_batch_size=1437, seed=1).steps(0)
    )
    assert not torch.equal(epochs[0].labels, other_seed[0].labels)


def test_starting_later_continues_the_same_stream(digits: Datasets) -> None:
    stream = train_stream(digits[0], micro_batch_size=12)
    eighth = next(itertools.islice(stream.steps(0), 7, None))
    assert_same(join(next(stream.steps(7))), join(eighth))


def test_augmentation_changes_images_with_draw_and_seed(digits: Datasets) -> None:
    def images(step: int = 0, **options: Any) -> torch.Tensor:
        result = join(next(train_stream(digits[0], **options).steps(step))).images
        assert result is not None
        return result

    assert not torch.equal(images(), images(config=DataConfig()))
    whole = {"global_batch_size": 1437, "micro_batch_size": 1437}
    order = train_stream(digits[0])._order
    by_index = [images(epoch, **whole)[np.argsort(order.indices(np.arange(1437) + epoch * 1437))] for epoch in (0, 1)]
    assert (by_index[0] != by_index[1]).flatten(1).any(dim=1).all()  # no image looks the same in the next epoch


def test_without_augmentation_pixels_are_only_normalised(digits: Datasets) -> None:
    config = DataConfig(mean=(0.25,), std=(2.0,))
    stream = train_stream(digits[0], config)
    batch = join(next(stream.steps(3)))
    indices = stream._order.indices(batch.sample_ids.numpy())
    assert batch.images is not None
    assert torch.equal(batch.images, (digits[0].read(indices) - 0.25) / 2)
    assert batch.labels.tolist() == digits[0].labels[indices].tolist()


def test_workers_change_nothing(digits: Datasets) -> None:
    random_state = torch.get_rng_state()
    for workers in (0, 2):
        config = replace(AUGMENTED, workers=workers)
        stream = train_stream(digits[0], config, micro_batch_size=6, data_rank=1, data_size=2)
        steps = [join(step) for step in itertools.islice(stream.steps(58), 3)]
        evaluation = join(list(EvalStream(digits[1], config=config, micro_batch_size=50, data_rank=1, data_size=2)))
        if workers == 0:
            expected = steps, evaluation
    for with_workers, without in zip(steps, expected[0], strict=True):
        assert_same(with_workers, without)
    assert_same(evaluation, expected[1])
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("data_size", "workers"), [(1, 0), (1, 4), (2, 1), (3, 0), (3, 4), (8, 0), (8, 1)])
def test_the_order_is_the_oracles_in_every_layout(data_size: int, workers: int) -> None:
    """Of what was really read, over the end of an epoch of 64 images."""
    images, config, seen = Slow(), DataConfig(workers=workers, mean=(0,), std=(1,)), []
    micro = 4 if data_size == 3 else 3
    for rank in range(data_size):
        stream = train_stream(images, config, micro_batch_size=micro, data_rank=rank, data_size=data_size, seed=9)
        seen.append([join(step) for step in itertools.islice(stream.steps(1), 2)])
    for step in (0, 1):
        expected = [oracle(9, *divmod(draw, 64), 64) for draw in range(24 * (step + 1), 24 * (step + 2))]
        batches = [of_rank[step] for of_rank in seen]
        assert torch.cat([batch.labels for batch in batches]).tolist() == expected
        pixels = [batch.images for batch in batches if batch.images is not None]
        assert torch.equal(torch.cat(pixels), images.images[expected])


class Slow(ArrayDataset):
    """Random images, each of which takes `seconds` to read. Attributes: reads: how many were, in this process."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(torch.rand(64, 1, 2, 2), np.arange(64), 64)
        self.seconds, self.reads = seconds, 0

    def read(self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None) -> torch.Tensor:
        self.reads += 1
        time.sleep(self.seconds)
        return super().read(indices, crop)


def test_a_step_is_read_while_it_goes_on() -> None:
    images = Slow()
    steps = train_stream(images, DataConfig(), micro_batch_size=2).steps(0)
    first, second = next(steps), next(steps)
    assert len(first) == len(second) == 12 and images.reads == 0
    for m in range(12):
        assert first[m].labels.numel() == first[m].labels.numel() == 2
        assert images.reads == m + 1


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_may_be_asked_for_in_any_order_and_again(workers: int) -> None:
    config = DataConfig(workers=workers, rotate=10)
    whole = train_stream(Slow(), config)
    images = whole._dataset
    stream = train_stream(images, config, micro_batch_size=2)
    steps = stream.steps(0)
    order = np.random.default_rng(0).permutation(12).tolist()
    seen = [next(steps) for _ in range(2)]
    for step in (0, 1, 0, 1):  # the second time in this process: the workers are past them
        expected = join(next(whole.steps(step)))
        batches = {m: seen[step][m] for m in order}
        assert_same(join([batches[m] for m in range(12)]), expected)
    assert_same(seen[0][-1], seen[0][11])
    assert_same(join(next(steps)), join(next(whole.steps(2))))
    next(steps)[5]  # the rest of this step is never asked for
    last = next(steps)
    assert_same(join(last), join(next(whole.steps(4))))
    assert not last._source._passed


def test_many_micro_batches_need_few_open_files() -> None:
    """512 micro-batches per step, with room for 150 more files than are open."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 150, limits[1]))
    try:
        stream = train_stream(Slow(), DataConfig(workers=2), global_batch_size=512, micro_batch_size=1)
        for step in itertools.islice(stream.steps(0), 2):
            assert sum(len(batch.labels) for batch in step) == 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_loader_twice_as_fast_as_the_model_never_makes_it_wait() -> None:
    """Two workers, 20 ms per micro-batch each; the model takes 20 ms too. Reading a step first would wait 0.12 s."""
    stream = train_stream(Slow(0.02), DataConfig(workers=2), micro_batch_size=1, global_batch_size=16)
    waited = []
    for step in itertools.islice(stream.steps(0), 4):
        before = stream.waited
        for _ in step:
            time.sleep(0.02)
        waited.append(stream.waited - before)
    assert min(waited[1:]) < 0.08, waited


def test_streams_without_images_agree_on_the_rest(digits: Datasets) -> None:
    for with_images in (True, False):
        needs = {"with_images": with_images, "with_texts": with_images}
        train = next(train_stream(digits[0], **needs).steps(2))[0]
        held = list(
            EvalStream(
                digits[1],
                config=DataConfig(workers=2 * (not with_images)),  # nothing to decode: no processes are started
                micro_batch_size=100,
                data_rank=0,
                data_size=1,
                **needs,
            )
        )[-1]
        if with_images:
            expected = train, held
    for batch, full in zip((train, held), expected, strict=True):
        assert batch.images is None and full.images is not None
        assert batch.texts is None and full.texts is not None
        for name in ("labels", "sample_ids", "weights"):
            assert torch.equal(getattr(batch, name), getattr(full, name))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_told_in_one_line(workers: int) -> None:
    class Damaged(Slow):
        def read(self, indices: NDArray[np.int64], crop: NDArray[np.float64] | None = None) -> torch.Tensor:
            if 5 in indices:
                raise UnreadableImageError("5.png cannot be decoded")
            return super().read(indices, crop)

    config = DataConfig(workers=workers)
    with pytest.raises(UnreadableImageError, match=r"^5\.png cannot be decoded$"):
        for step in train_stream(Damaged(), config, micro_batch_size=2).steps(0):
            list(step)
    with pytest.raises(UnreadableImageError, match=r"^5\.png cannot be decoded$"):
        list(EvalStream(Damaged(), config=config, micro_batch_size=4, data_rank=0, data_size=1))


@pytest.mark.parametrize("data_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [1, 7, 60, 64, 500])
def test_evaluation_covers_every_image_once(digits: Datasets, data_size: int, micro: int) -> None:
    _, held_out = digits
    streams = [
        EvalStream(held_out, config=AUGMENTED, micro_batch_size=micro, data_rank=rank, data_size=data_size)
        for rank in range(data_size)
    ]
    batches = [list(stream) for stream in streams]
    assert {len(b) for b in batches} == {len(streams[0])} == {-(-360 // (data_size * micro))}
    whole = join(list(itertools.chain.from_iterable(batches)))
    assert all(b.images is not None and b.images.shape == (micro, 1, 8, 8) for rank in batches for b in rank)
    real = whole.weights == 1
    assert whole.sample_ids[real].sort().values.tolist() == list(range(360))
    assert whole.images is not None
    assert torch.equal(whole.images[real], (held_out.read(whole.sample_ids[real].numpy()) - 0.5) / 0.5)
    assert torch.equal(whole.labels[real], torch.from_numpy(held_out.labels)[whole.sample_ids[real]])
    assert (whole.sample_ids[~real] == -1).all() and (whole.labels[~real] == 0).all()
    assert set(whole.weights.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"global_batch_size": 100, "micro_batch_size": 8, "data_size": 4},
            r"8 x data-parallel size 4 = 32.* 96 or 128",
        ),
        ({"global_batch_size": 5, "micro_batch_size": 4, "data_size": 2}, r"nearest that works is 8"),
        ({"global_batch_size": 0}, r"global_batch_size is 0 .* must be 1 or more"),
        ({"seed": -1}, r"the seed is -1"),
        ({"config": DataConfig(mean=(0.1, 0.2, 0.3))}, r"data\.mean has 3 numbers, but images have 1 channels"),
    ],
)
def test_bad_streams_are_refused(digits: Datasets, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_stream(digits[0], **options)
