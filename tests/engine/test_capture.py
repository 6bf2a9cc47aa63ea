"""Rows of attention: those that a plain ViT writes out, and the same in every layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.assemble import assemble, grid_of
from engine.live_bytes import LiveBytes
from engine.seeing.capture import capture
from engine.seeing.explain import owed, pixel_gradients
from engine.seeing.patches import features_of, lens_of
from model import ModelConfig, VisionTransformer
from model.heads import Head
from model.seeing import rows
from model.seeing.capture import choose
from model.seeing.lens import patch_logits
from model.seeing.rollout import METHODS, back_through
from model.seeing.trace import trace
from parallel.process_group import World
from tests.distributed import run_ranks
from tests.engine.test_watch import same, watch_of
from tests.parity import plain_vit
from tests.parity.cases import MODELS, Case
from tests.parity.plain_shapes import images_of, plain_shape

CPU = torch.device("cpu")


def written_out(model: VisionTransformer, images: Tensor, patch: pytest.MonkeyPatch) -> list[Tensor]:
    """The maps [B, H, Q, S] of each layer in turn, as a plain ViT makes them: its attention to unit vectors."""
    found = list[Tensor]()
    for name in ("softmax_attention", "linear_attention"):
        usual = getattr(plain_vit, name)

        def noted(q: Tensor, k: Tensor, v: Tensor, *more: Any, usual: Any = usual) -> Tensor:
            found.append(usual(q, k, torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:2], -1, -1), *more))
            y: Tensor = usual(q, k, v, *more)
            return y

        patch.setattr(plain_vit, name, noted)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    logits = plain_vit.logits(weights, images, plain_shape(model.config))
    assert torch.allclose(logits, model.logits(images), rtol=1e-3, atol=1e-4)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_as_a_plain_vit_writes_them_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_BYTES", 20_000)  # some rows at a time
    model = VisionTransformer(replace(MODELS[name], drop_path=0.0)).eval()
    for n, parameter in model.named_parameters():
        if "relative" in n or "norm" in n:
            torch.nn.init.normal_(parameter, 1.0)
    images = images_of(model.config)
    before = model.logits(images)
    found = model.capture(images)
    assert torch.equal(model.logits(images), before)  # no tap is left
    expected = written_out(model, images, monkeypatch)
    assert len(found) == len(expected)
    for (layer, ours), theirs in zip(found.items(), expected, strict=True):
        assert ours.rows.shape == theirs.shape and ours.maps.shape[3] * ours.maps.shape[4] == theirs.shape[3] - (
            model.sizes.prefix
        )
        assert torch.allclose(ours.rows, theirs, rtol=1e-3, atol=2e-6), (layer, (ours.rows - theirs).abs().max())
    last = list(found)[-1]
    some = model.capture(images, layers=[last], heads=[2, 0], queries=[5, 1])[last].rows
    asked = [0] if last == "head" else [5, 1]
    assert torch.allclose(some, found[last].rows[:, [2, 0]][:, :, asked], rtol=1e-5, atol=1e-7)


def test_what_is_asked_for_is_checked() -> None:
    config = MODELS["parallel"].resolve()
    assert list(choose(config, [-1, "head"])) == ["blocks.2", "head"]
    wrong: dict[str, dict[str, Any]] = {
        "blocks 0 to 2": {"layers": [3]}, "once": {"heads": [1, 1]}, "0 to 7": {"heads": [8]},
        "0 to 16": {"queries": [17]},
        "no class token": {"queries": "class"}, "none of": {"queries": "some"}, "none: name": {"layers": []},
    }  # fmt: skip
    for words, given in wrong.items():
        with pytest.raises(ValueError, match=words):
            choose(config, **given)
    lists = {
        "blocks.2, head: this model has no such layers, it has image.blocks.0": ("image.embed", "image.blocks.0"),
        "objective contrastive reads texts.* by itself": ("image.embed", "text.embed"),
    }
    for words, names in lists.items():
        layers = [SimpleNamespace(name=n, reads=("texts",) if "text" in n else (), per_sample=1) for n in names]
        assembly: Any = SimpleNamespace(layers=layers, config=SimpleNamespace(objective="contrastive"))
        with pytest.raises(ValueError, match=words):
            capture(assembly, images_of(config), choose(config, [-1, "head"]))


def test_rows_take_what_they_are_and_a_few_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """257 tokens: maps would be 4 MiB, a chunk of rows is 64 KiB."""
    monkeypatch.setattr(rows, "CHUNK_BYTES", 2**16)
    b, s, h, k = 1, 257, 16, 4
    model = VisionTransformer(
        ModelConfig(
            image_size=64, patch_size=4, width=h * k, depth=1, num_heads=h, mlp_dim=8, num_classes=2, registers=1
        )
    )
    layer = rows.Sight.of(next(m for m in model.modules() if isinstance(m, rows.Attention)))
    q, keys = torch.randn(b, s, h, k), torch.randn(b, s, h, k)
    seen = rows.Seen(layer, q, keys, keys)
    with LiveBytes() as counter:
        total = sum(float(part.sum()) for _, part in seen.blocks())
    assert abs(total - s * h) < 1e-2
    assert counter.peak < 6 * 2**16 + 2 * q.numel() * 4, counter.peak


LAYOUTS = (
    Case("kinds", tensor=2, sequence_parallel=True, pipeline=2), Case("pyramid", context=2, data=2, zero=3),
    Case("kinds", context=2, pipeline=2, virtual=2, schedule="interleaved", micro_batches=2),
    Case("swin", tensor=2, context=2), Case("heads", tensor=2, data=2),
)  # fmt: skip
ASKED = {"kinds": (0, 3, 17), "pyramid": (0, 3, 4), "swin": (0, 5), "heads": (0, 9, 20)}


def asked(case: Case) -> dict[str, Any]:
    return {"heads": (2, 0), "queries": ASKED[case.model]}


def scored(outputs: Tensor, numbers: Tensor) -> Tensor:
    """Of another class of each image; large, so that relevance is not small beside the residual stream's 1."""
    return outputs.gather(1, (numbers * 3 % outputs.shape[1])[:, None])[:, 0] * 300


def has_lens(config: ModelConfig) -> bool:
    return config.pool in ("gap", "map")


def over_ranks(world: World) -> list[tuple[Any, ...]]:
    """Rows of some queries, the summary of all, what scores owe to tokens and pixels, and what patches are."""
    out = list[tuple[Any, ...]]()
    for case in LAYOUTS:
        config = case.config()
        grid = grid_of(config, world, CPU)
        assembly = assemble(config, grid, CPU)
        images = images_of(config.model)
        found = capture(assembly, images, choose(config.model, **asked(case)))
        seen = watch_of(assembly)()
        explained = {of: owed(assembly, images, of, None if of == "rollout" else scored) for of in METHODS}
        patches = features_of(assembly, images), lens_of(assembly, images) if has_lens(config.model) else None
        out.append((found, seen, explained, pixel_gradients(assembly, images, scored), patches))
        grid.close()
    return out


def test_the_same_in_every_layout() -> None:
    results = run_ranks(4, over_ranks)
    assert all((*found[:2], *found[4]) == (None,) * 4 for rank in results[1:] for found in rank)
    for number, (case, (found, seen, explained, pixels, patches)) in enumerate(zip(LAYOUTS, results[0], strict=True)):
        same(seen, watch_of(assemble(alone := case.one_process.config(), grid_of(alone, World(), CPU), CPU))())
        config = case.config()
        model = VisionTransformer(config.model, seed=config.train.seed).eval()
        images = images_of(config.model)
        expected = model.capture(images, **asked(case))
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            assert torch.allclose(found[name].rows, one.rows, rtol=1e-4, atol=1e-6), (case, name)
            assert found[name].wanted == one.wanted
        numbers = torch.arange(len(images))
        noted, outputs = trace(model, images, lambda y, numbers=numbers: scored(y, numbers))
        for method in METHODS:
            tokens, given = explained[method]
            assert torch.allclose(given, outputs, rtol=1e-4, atol=1e-5), case
            assert torch.allclose(tokens, back_through(noted, method), rtol=2e-3, atol=1e-6), (case, method)
            assert all(torch.equal(rank[number][2][method][0], tokens) for rank in results), (case, method)
        shown = images.clone().requires_grad_()
        (expected_pixels,) = torch.autograd.grad(scored(model.logits(shown), numbers).sum(), shown)
        assert torch.allclose(pixels, expected_pixels, rtol=1e-3, atol=1e-3), case
        features, head = model.features(images)[-1][0].permute(0, 2, 3, 1), model.get_submodule("head")
        assert isinstance(head, Head) and torch.allclose(patches[0], features, rtol=1e-3, atol=1e-5), case
        if has_lens(config.model):
            said = patch_logits(head, features.flatten(0, 2)).unflatten(0, features.shape[:3])
            assert torch.allclose(patches[1], said, rtol=1e-3, atol=1e-5), case
