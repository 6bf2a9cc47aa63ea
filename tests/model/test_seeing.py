"""What is made of attention rows, against the published formulas written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor

from model import ImageText, MicroBatch, TextConfig, VisionTransformer
from model.config import StageConfig
from model.kernels import native
from model.seeing.features import POSITIONAL, clusters, components, outliers
from model.seeing.flow import attention_flow
from model.seeing.lens import check_lens, patch_logits
from model.seeing.measures import distances, entropy
from model.seeing.noted import MeanMap
from model.seeing.perturb import occlusion, rise
from model.seeing.rollout import METHODS, Maps, Merging, Trace, back_through
from model.seeing.similarity import likeness
from model.seeing.trace import map_of, mean_trace, pooled_tokens, trace, traces
from model.towers import projected
from tests.model.kernels.kernel_cases import needs_cpu_module
from tests.model.small import TINY
from tests.parity import plain_vit
from tests.parity.cases import MODELS
from tests.parity.plain_shapes import images_of, plain_shape

B, H, S = 2, 3, 7
SCORE = 1e3  # times logits, so that relevance is not small beside the residual stream's 1


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def maps(total: int = S) -> Maps:
    rows = torch.randn(B, H, total, total).softmax(-1)
    rows[:, :, 2] = 0  # of linear attention, a query without features
    return Maps(rows, torch.randn(B, H, total, total))


def matrix(of: Maps, method: str) -> Tensor:
    """The published matrix of one layer [B, S, S]."""
    eye = torch.eye(of.rows.shape[-1])
    if method == "rollout":
        added = of.rows.mean(1) + eye
        return added / added.sum(-1, keepdim=True)
    assert of.grad is not None
    added = torch.relu(of.rows * of.grad).mean(1) + eye
    return added / added.sum(-1, keepdim=True) if method == "gradient_rollout" else added


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_that_of_the_product_of_matrices(method: Any) -> None:
    layers, start = [maps() for _ in range(3)], torch.rand(B, S)
    product = torch.eye(S).expand(B, -1, -1)
    for layer in layers:
        product = matrix(layer, method) @ product
    expected = torch.einsum("bs,bst->bt", start, product)
    assert torch.allclose(back_through(Trace(layers, start), method), expected, rtol=1e-5)


def test_through_a_patch_merge() -> None:
    """Of 3 x 5 patches, 2 x 3; a prefix token goes by itself."""
    merging = Merging(prefix=1, rows=3, cols=5)
    back = merging.back(torch.eye(7))
    assert torch.equal(back[0], torch.eye(16)[0])
    assert torch.equal(back[1, 1:].view(3, 5)[:2, :2], torch.full((2, 2), 0.25)) and back[1].sum() == 1
    assert torch.equal(back[3, 1:].view(3, 5)[:2, 4], torch.full((2,), 0.5)) and back[3].sum() == 1
    assert back[6, 15] == 1 and back[6].sum() == 1


def explained(model: VisionTransformer, images: Tensor, method: str, patch: pytest.MonkeyPatch) -> Tensor:
    """The same by matrices, of a plain ViT whose attention weights are differentiated by autograd."""
    layers, shape = list[Tensor](), plain_shape(model.config)
    for name in ("softmax_attention", "linear_attention"):
        usual = getattr(plain_vit, name)

        def written_out(q: Tensor, k: Tensor, v: Tensor, *more: Any, usual: Any = usual) -> Tensor:
            weights = usual(q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1), *more)
            weights.retain_grad()
            layers.append(weights)
            y: Tensor = weights @ v
            return y

        patch.setattr(plain_vit, name, written_out)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    plain_vit.logits(weights, images, shape).amax(1).mul(SCORE).sum().backward()
    found = [Maps(rows.detach(), rows.grad) for rows in layers]
    sizes = model.sizes
    if model.config.pool != "map":
        row = pooled_tokens(model.config).expand(len(images), -1)
    else:
        probe = found.pop()
        assert probe.grad is not None
        own = probe.rows.mean(1) if method == "rollout" else torch.relu(probe.rows * probe.grad).mean(1)
        row = own[:, 0] / (own[:, 0].sum(1, keepdim=True) if method == "gradient_rollout" else 1)
    for stage in reversed(sizes.stages):
        for _ in range(stage.depth):
            row = torch.einsum("bs,bst->bt", row, matrix(found.pop(), method))
        if stage.index:
            before = sizes.stages[stage.index - 1]
            row = Merging(sizes.prefix, before.rows, before.cols).back(row)
    return row


@pytest.mark.parametrize("name", ["parallel", "sequential", "kinds", "pyramid", "beside"])
def test_of_a_model_as_autograd_finds_it_on_a_plain_vit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = VisionTransformer(replace(MODELS[name], drop_path=0.0)).eval()
    images = images_of(model.config)
    noted, outputs = trace(model, images, lambda logits: logits.amax(1) * SCORE)
    assert torch.equal(outputs, model.logits(images))
    for method in METHODS:
        with monkeypatch.context() as patch:
            expected = explained(model, images, method, patch)
        assert torch.allclose(back_through(noted, method), expected, rtol=2e-3, atol=1e-7), method
        if method == "rollout":
            maps, again = mean_trace(model, images)
            assert torch.allclose(back_through(maps, method), expected, rtol=2e-3, atol=1e-7)
            assert torch.allclose(again, outputs, rtol=1e-4, atol=1e-5)
            full = [kind in ("full", "causal") for stage in model.sizes.stages for kind in stage.kinds]
            assert [isinstance(step, MeanMap) for step in maps.steps if not isinstance(step, Merging)] == full
    assert torch.equal(model.logits(images), outputs)  # nothing is left in the place of anything
    assert map_of(model.config, back_through(noted, "rollout")).shape[1:] == (
        model.sizes.stages[0].rows, model.sizes.stages[0].cols,
    )  # fmt: skip
    assert all(parameter.grad is None for parameter in model.parameters())


@needs_cpu_module
def test_maps_are_noted_where_there_is_no_kernel_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, of a model whose kernels are to be native ones."""
    model = VisionTransformer(MODELS["parallel"], kernels="native").eval()
    images = images_of(model.config)
    expected = back_through(mean_trace(model, images)[0], "rollout")
    monkeypatch.delattr(native.cpu, "mapped_attention")
    assert torch.allclose(back_through(mean_trace(model, images)[0], "rollout"), expected, rtol=1e-4)


def test_a_stage_that_merges_nothing_keeps_its_tokens() -> None:
    stages = StageConfig(depth=1, width=16, num_heads=4), StageConfig(depth=2, width=24, num_heads=4, merge=False)
    pyramid = replace(TINY, pool="gap", width=None, depth=None, num_heads=None, mlp_dim=None, stages=stages)
    model = VisionTransformer(pyramid).eval()
    images, expected = images_of(pyramid), None
    for one in model.capture(images).values():
        if one.wanted.name != "head":
            step = matrix(Maps(one.rows), "rollout")
            expected = step if expected is None else step @ expected
    assert expected is not None
    noted, _ = trace(model, images)
    assert noted.start is not None
    found = back_through(noted, "rollout")
    assert torch.allclose(found, torch.einsum("bs,bst->bt", noted.start, expected), rtol=1e-4)


def test_of_a_model_in_training_mode_and_in_64_bits() -> None:
    model = VisionTransformer(replace(MODELS["sequential"], drop_path=0.5)).train()
    images, state = images_of(model.config), torch.get_rng_state()
    found, noted = model.capture(images), trace(model, images, lambda logits: logits.amax(1))
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noted[1], model.eval().logits(images))
    assert all(torch.equal(found[name].rows, one.rows) for name, one in model.capture(images).items())
    wide, _ = trace(model.double(), images.double(), lambda logits: logits.amax(1))
    for method in METHODS:
        other = back_through(wide, method)
        assert other.dtype == torch.float64
        assert torch.allclose(back_through(noted[0], method), other.float(), rtol=1e-3, atol=1e-6), method


def test_likeness_to_texts_is_explained_by_the_image_tower() -> None:
    """As by the tower alone, by autograd through its score; several texts in one forward pass; in any mode."""
    image = replace(MODELS["parallel"], num_classes=None, drop_path=0.5)
    pair = ImageText(image, TextConfig(width=16, depth=1, num_heads=2, context_length=9), embedding=18)
    tower = VisionTransformer(projected(image.resolve(), 18, "linear"))
    tower.load({name.removeprefix("image."): p for name, p in pair.named_parameters() if name.startswith("image.")})
    tokens = torch.tensor([[256, 97, 257], [256, 98, 257]])
    tokens = torch.nn.functional.pad(tokens, (0, 6), value=258)
    images = images_of(image)
    found, outputs = traces(pair.train(), images, likeness(pair, tokens))
    for text, of in zip(pair.eval().encode_text(tokens, normalize=True).detach(), found, strict=True):
        alone, given = trace(tower.eval(), images, lambda y, text=text: torch.cosine_similarity(y, text[None]))
        assert torch.allclose(given, outputs, atol=1e-6)
        for method in METHODS:
            expected = back_through(alone, method)
            assert torch.allclose(back_through(of, method), expected, rtol=1e-4, atol=1e-8), method
    assert not torch.equal(back_through(found[0], "relevance"), back_through(found[1], "relevance"))


def test_flow_is_that_of_another_solver() -> None:
    layers = [torch.randn(S, S).mul(2).softmax(-1) for _ in range(3)]
    start = torch.tensor([0.0, 0.25, 0.25, 0.5, 0, 0, 0])
    found = {kept: attention_flow(layers, start, kept) for kept in (S, 3)}
    for kept, flow in found.items():
        graph = networkx.DiGraph()
        for level, rows in enumerate(layers):
            capacities = rows / 2 + torch.eye(S) / 2
            weakest = capacities.sort(1, descending=True)[0][:, kept - 1]
            for i in range(S):
                for j in range(S):
                    if capacities[i, j] >= weakest[i]:
                        graph.add_edge((level + 1, i), (level, j), capacity=float(capacities[i, j]))
        for i in range(S):
            graph.add_edge("source", (len(layers), i), capacity=float(start[i]))
        expected = [networkx.maximum_flow_value(graph, "source", (0, j)) for j in range(S)]
        assert torch.allclose(flow, torch.tensor(expected), atol=2e-5), (kept, flow, expected)
    assert (found[3] <= found[S] + 1e-6).all() and (found[3] < found[S] - 1e-3).any()


def test_measures_by_hand() -> None:
    rows = torch.zeros(1, 2, 3, 5)  # a prefix token, 2 x 2 patches; queries are the prefix token and two patches
    rows[0, 0, :2, 2] = 1.0  # sees the second patch alone
    rows[0, 0, 2, 0] = 1.0  # the prefix token alone, and so at no distance
    rows[0, 1] = 0.2
    assert torch.allclose(entropy(rows), torch.tensor([[0.0, 1.609438]]))
    far, counted = distances(rows, torch.tensor([0, 1, 2]), torch.arange(5), (2, 2), 1)
    assert torch.allclose(far, torch.tensor([[1.0, 2 * (1 + 1 + 2**0.5) / 4]])) and counted.tolist() == [[1, 2]]
    some = torch.tensor([2, 3, 4])  # of a window: the first head's queries take nothing of others
    assert torch.equal(distances(rows[:, :1, :2, some], torch.tensor([0, 1]), some, (2, 2), 1)[0], far[:, :1])
    none = distances(rows[:, :, :1, 1:], torch.tensor([-1]), torch.arange(4), (2, 2), 0)
    assert all((x == 0).all() for x in none)


def test_hiding_parts_finds_what_a_score_is_made_of() -> None:
    weight = torch.zeros(8, 8)
    weight[2:4, 4:6] = 1.0

    def score(images: Tensor) -> Tensor:
        return (images[:, 0] * weight).sum((1, 2))

    images = torch.ones(2, 1, 8, 8)
    assert torch.equal(occlusion(score, images, 2, 2)[1], weight * 4)
    found = rise(score, images, masks=400, cells=4)
    assert (weight.flatten()[found.flatten(1).argmax(1)] == 1).all()
    assert found[:, weight > 0].min() > found[:, 6:].max() and torch.equal(found[0], found[1])
    assert torch.equal(found, rise(score, images, masks=400, cells=4))


def test_hiding_many_parts_at_once_is_hiding_each() -> None:
    weights, images = torch.rand(3, 8, 8), torch.randn(3, 1, 8, 8)

    def score(shown: Tensor) -> Tensor:
        return (shown[:, 0] * weights.repeat(len(shown) // 3, 1, 1)).sum((1, 2))

    for found in (
        lambda n: occlusion(score, images, 2, 2, at_once=n),
        lambda n: rise(score, images, masks=9, at_once=n),
    ):
        assert torch.allclose(found(1), found(5), rtol=1e-4, atol=1e-5)


def test_features() -> None:
    b, n, d = 6, 16, 12
    place, content = torch.randn(n, 1), torch.randn(b, n, 1)
    one, other = torch.eye(d)[:2]
    features = 3 * place * one + 2 * content * other + 0.01 * torch.randn(b, n, d)
    found = components(features, 2)
    assert found.values.shape == (b, n, 2) and found.explained.sum() > 0.99
    assert found.positional[0] > POSITIONAL > found.positional[1]
    same, other_place = torch.tensor([1.0, 1, -1, -1])[:, None] * one, torch.tensor([1.0, -1, -1, 1])[:, None] * one
    for second, share in ((same, 1.0), (other_place, 0.0)):
        assert components(torch.stack([same, second]), 1).positional.item() == pytest.approx(share, abs=1e-6)
    assert components(same[None], 1).positional.isnan()
    ordinary = torch.nn.functional.normalize(torch.randn(b, n, d), dim=-1) * (10 + torch.rand(b, n, 1))
    assert not outliers(ordinary).any()
    ordinary[3, 5] *= 10
    assert outliers(ordinary).nonzero().tolist() == [[3, 5]]
    groups = torch.where((torch.arange(n) < 5)[:, None], one, other) + 0.01 * torch.randn(b, n, d)
    labels = clusters(groups, 2)
    assert (labels[:, :5] == labels[0, 0]).all() and (labels[:, 5:] == 1 - labels[0, 0]).all()


@pytest.mark.parametrize("pool", ["gap", "map"])
def test_the_lens_is_the_head_on_one_patch(pool: Any) -> None:
    model = VisionTransformer(replace(TINY, pool=pool, registers=1)).eval()
    rows = torch.randn(2, 16, 16)
    head: Any = model.get_submodule("head")
    found = patch_logits(head, rows.flatten(0, 1)).unflatten(0, (2, 16))
    with torch.no_grad():
        if pool == "gap":  # each patch's share of the mean: the classifier is linear
            whole = torch.cat([torch.zeros(2, 1, 16), rows], 1)
            expected, found = head(whole.flatten(0, 1), MicroBatch.of_images(torch.zeros(2, 1))), found.mean(1)
        else:  # a probe that may see that patch alone
            x = head.norm(torch.cat([torch.zeros(2, 1, 16), rows], 1)).flatten(0, 1)
            mask = torch.zeros(2, 17, dtype=torch.bool)
            mask[:, 6], found = True, found[:, 5]
            expected = head.fc(head.pool(x, MicroBatch.of_images(torch.zeros(2, 1)), mask))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="pool cls"):
        check_lens(replace(TINY, pool="cls").resolve())
