"""Summaries of attention while a model trains: what rows say, the same in every layout, and training stays as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data import chosen_batches
from engine.assembly import Assembly
from engine.config.objectives import text_shape
from engine.run.step import Stepper
from engine.seeing.watch import Watch
from model import MicroBatch, VisionTransformer
from model.seeing import rows
from model.seeing.measures import entropy
from model.seeing.summary import Summary, SummaryTap, summaries
from model.seeing.trace import pooled_tokens
from model.taps import tapped
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.parity.cases import MODELS, Case
from tests.parity.climb import Climb, climb, digits
from tests.parity.plain_shapes import images_of

CHOSEN = (3, 0, 17, 9, 5)
CASES = (
    Case("pairs_sigmoid", context=2, micro_batches=2), Case("views", pipeline=2, micro_batches=2),
    Case("matched", tensor=2, sequence_parallel=True), Case("moco", data=2, zero=3, micro_batches=2),
    Case("pyramid", pipeline=2, micro_batches=2, schedule="interleaved", policy="ready"),
)  # fmt: skip


def watch_of(assembly: Assembly) -> Watch:
    config = assembly.config
    assert config.train.micro_batch_size is not None
    batches = chosen_batches(
        digits(config.model, text_shape(config))[1], CHOSEN, config=config.data,
        micro_batch_size=config.train.micro_batch_size, data_rank=assembly.grid.data.index,
        data_size=assembly.grid.data.size, with_images=assembly.holds_images, with_texts=assembly.holds_texts,
    )  # fmt: skip
    return Watch(assembly, batches, len(CHOSEN))


def same(found: dict[str, Summary], expected: dict[str, Summary]) -> None:
    assert list(found) == list(expected)
    for name, one in expected.items():
        other = found[name]
        assert torch.allclose(other.maps, one.maps, rtol=1e-4, atol=1e-6), name
        assert torch.allclose(other.entropy, one.entropy, rtol=1e-4, atol=1e-5), name
        assert (other.top is None) == (one.top is None), name
        assert one.top is None or torch.allclose(other.top, one.top, rtol=1e-4, atol=1e-5), name  # type: ignore[arg-type]


def logits_of(q: Tensor, k: Tensor, kind: str) -> Tensor:
    """Of kinds that see all."""
    found = torch.einsum("bqhk,bshk->bhqs", q, k) / q.shape[-1] ** 0.5
    return found.masked_fill(torch.ones(found.shape[-2:]).tril() == 0, -torch.inf) if kind == "causal" else found


@pytest.mark.parametrize("name", ["parallel", "kinds", "pyramid", "heads", "swin", "beside"])
def test_what_rows_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 20_000)  # some rows at a time
    model = VisionTransformer(replace(MODELS[name], drop_path=0.0)).eval()
    images, places = images_of(model.config), tapped(model)
    noted, taps = dict[str, tuple[Tensor, Tensor]](), dict[str, Any]()
    for layer, place in places.items():
        total = rows.Sight.of(place).total
        pooled = torch.ones(1) if layer == "head" else pooled_tokens(model.config, total)
        summary = taps[layer] = SummaryTap(layer, place, pooled, 2)
        summary.images = torch.tensor([1, -1, 0, 2**40, *[7] * 99])[: len(images)]  # the first is number 1

        def noting(q: Tensor, k: Tensor, v: Tensor, layer: str = layer) -> tuple[Tensor, Tensor, Tensor]:
            noted[layer] = q, k
            return taps[layer](q, k, v)  # type: ignore[no-any-return]

        places[layer].tap = noting
    model(MicroBatch.of_images(images))
    for place in places.values():
        place.tap = None
    found = summaries((piece for tap in taps.values() for piece in tap.pieces), 2)
    for layer, attended in model.capture(images[[2, 0]]).items():
        one, site = found[layer], places[layer].site
        row = torch.einsum("q,bhqrc->bhrc", taps[layer]._pooled, attended.maps)
        assert torch.allclose(one.maps, row, rtol=1e-4, atol=1e-6), layer
        assert torch.allclose(one.entropy, entropy(attended.rows), rtol=1e-4, atol=1e-5), layer
        assert (one.top is None) == (site.kind == "linear"), layer
        if one.top is None or places[layer].site.kind == "shifted_window":
            continue
        logits = logits_of(*noted[layer], site.kind)[[2, 0]]
        if getattr(getattr(places[layer], "mixer", None), "relative_position", None) is None:
            seen = logits.masked_fill(attended.rows == 0, -torch.inf)
            assert torch.allclose(one.top, seen.amax((2, 3)), rtol=1e-4, atol=1e-5), layer


def looked(world: World, cases: tuple[Case, ...], *, looking: bool) -> list[tuple[dict[str, Summary] | None, Climb]]:
    """What is seen before the first step, and what two steps do, with a look after each of them."""
    out = []
    for case in cases:
        seen = list[Any]()

        def look(stepper: Stepper, seen: list[Any] = seen) -> None:
            watch, usual = watch_of(stepper.assembly), stepper.train_step
            seen.append(watch())

            def step(*given: Any, **more: Any) -> Any:
                result = usual(*given, **more)
                watch()
                return result

            stepper.train_step = step  # type: ignore[method-assign]

        done = climb(world, case.config(), look if looking else None, steps=2)
        out.append((seen[0] if looking else None, done))
    return out


def calm_and_looked(world: World) -> list[Any]:
    return [looked(world, CASES, looking=looking) for looking in (False, True)]


def test_of_every_objective_and_training_stays_as_it_is() -> None:
    results = run_ranks(2, calm_and_looked, timeout=120)
    calm, watched = results[0]
    assert all(seen is None for seen, _ in results[1][1])
    for case, (_, usual), (seen, done) in zip(CASES, calm, watched, strict=True):
        assert usual.losses == done.losses and usual.grad_norms == done.grad_norms, case
        assert all(torch.equal(value, done.parameters[name]) for name, value in usual.parameters.items()), case
        assert usual.evaluation == done.evaluation, case
        ((expected, _),) = looked(World(), (case.one_process,), looking=True)
        assert expected is not None
        same(seen, expected)
        if case.model == "pairs_sigmoid":
            assert list(seen) == [f"{tower}.blocks.{i}" for tower in ("image", "text") for i in range(2)]
        if case.model == "matched":
            assert list(seen) == [f"blocks.{i}" for i in range(3)]
