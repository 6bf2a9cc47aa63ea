"""Files of big_vision: what this program makes of them against timm's reader and model, there and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model import ModelConfig, VisionTransformer
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError, Preprocessing
from model.formats.sources import open_source
from tools.convert.images import photographs
from tools.convert.runners import RUNNERS, vitruvius

Arrays = dict[str, np.ndarray[Any, Any]]
WIDTH, HEADS, HIDDEN, PATCH, GRID, DEPTH, CLASSES = 24, 3, 40, 4, 4, 3, 7
MHA = "MultiHeadDotProductAttention"


@dataclass(frozen=True, kw_only=True)
class Form:
    """A file of big_vision: its pool, the prefix of its names, layers stacked or not, with the old names or not."""

    pool: str = "gap"
    prefix: str = "params/"
    scan: bool = False
    old: bool = False
    class_position: bool = False
    classes: int = CLASSES

    def arrays(self, seed: int = 0) -> Arrays:
        """Random numbers throughout."""
        r = np.random.default_rng(seed)

        def some(*shape: int) -> np.ndarray[Any, Any]:
            return r.normal(0.1, 0.3, shape).astype(np.float32)

        def block(numbers: tuple[int, ...], start: str) -> Arrays:
            attention, norm, mlp = f"{MHA}_{numbers[0]}", f"LayerNorm_{numbers[1]}", f"MlpBlock_{numbers[2]}"
            heads = (HEADS, WIDTH // HEADS)
            kernels = {f"{attention}/{x}/kernel": some(WIDTH, *heads) for x in ("query", "key", "value")}
            biases = {f"{attention}/{x}/bias": some(*heads) for x in ("query", "key", "value")}
            rest = {
                f"{attention}/out/kernel": some(*heads, WIDTH), f"{attention}/out/bias": some(WIDTH),
                f"{norm}/scale": some(WIDTH), f"{norm}/bias": some(WIDTH),
                f"{mlp}/Dense_0/kernel": some(WIDTH, HIDDEN), f"{mlp}/Dense_0/bias": some(HIDDEN),
                f"{mlp}/Dense_1/kernel": some(HIDDEN, WIDTH), f"{mlp}/Dense_1/bias": some(WIDTH),
            }  # fmt: skip
            return {start + name: x for name, x in (kernels | biases | rest).items()}

        numbers = (1, 2, 3) if self.old else (0, 1, 0)
        first = [{"LayerNorm_0/scale": some(WIDTH), "LayerNorm_0/bias": some(WIDTH)} for _ in range(DEPTH)]
        blocks = [block(numbers, "") | first[i] for i in range(DEPTH)]
        at = "Transformer/encoderblock"
        found = {f"{at}_{i}/{name}": x for i, b in enumerate(blocks) for name, x in b.items()}
        if self.scan:
            found = {f"{at}/{name}": np.stack([b[name] for b in blocks]) for name in blocks[0]}
        position = "Transformer/posembed_input/pos_embedding" if self.old else "pos_embedding"
        found |= {
            "embedding/kernel": some(PATCH, PATCH, 3, WIDTH), "embedding/bias": some(WIDTH),
            position: some(1, GRID * GRID + self.class_position, WIDTH),
            "Transformer/encoder_norm/scale": some(WIDTH), "Transformer/encoder_norm/bias": some(WIDTH),
        }  # fmt: skip
        if self.pool == "cls":
            found["cls"] = some(1, 1, WIDTH)
        if self.pool == "map":
            found |= block((0, 0, 0), "MAPHead_0/") | {"MAPHead_0/probe": some(1, 1, WIDTH)}
        if self.classes:
            found |= {"head/kernel": some(WIDTH, self.classes), "head/bias": some(self.classes)}
        return {self.prefix + name: x for name, x in found.items()}


FORMS = {
    "gap": Form(),
    "gap_scan": Form(scan=True),
    "map": Form(pool="map", prefix=""),
    "map_scan_towers": Form(pool="map", scan=True, prefix="params/img/", classes=0),
    "cls_scan": Form(pool="cls", scan=True),
    "cls_own_position": Form(pool="cls", class_position=True),
    "augreg": Form(pool="cls", old=True, class_position=True, prefix=""),
    "flax_optimizer": Form(pool="cls", old=True, class_position=True, prefix="opt/target/"),
}
TOWER = {"params/txt/Embed_0/embedding": np.arange(20.0).reshape(4, 5), "params/t": np.ones(1), "params/b": np.ones(1)}


def saved(arrays: Mapping[str, np.ndarray[Any, Any]], path: Path) -> Path:
    np.savez(path, allow_pickle=False, **arrays)
    return path


def equal(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> bool:
    with np.load(path) as there:
        return set(there.files) == set(arrays) and all(
            x.dtype == there[name].dtype and np.array_equal(x, there[name]) for name, x in arrays.items()
        )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_there_and_back(form: Form, tmp_path: Path) -> None:
    arrays = form.arrays() | (TOWER if "img/" in form.prefix else {})
    path, images = saved(arrays, tmp_path / "theirs.npz"), photographs(3, (GRID * PATCH,) * 2, None)
    theirs = RUNNERS["big_vision"](path, images)
    with open_weights(path) as weights, torch.no_grad():
        assert weights.kind == "big_vision" and weights.description.model.pool == form.pool
        ours = vitruvius.run_weights(weights, images)
        save_weights(weights, tmp_path / "ours")
        save_weights(weights, tmp_path / "scanned.npz", "big_vision", scan=True)
    assert (ours.features - theirs.features).abs().max() < 1e-5 and theirs.features.std() > 0.1
    if form.classes:
        assert ours.logits is not None and theirs.logits is not None
        assert (ours.logits - theirs.logits).abs().max() < 1e-5 and theirs.logits.std() > 0.1
    with open_weights(tmp_path / "ours") as weights:
        save_weights(weights, tmp_path / "back.npz", "big_vision")
    assert equal(tmp_path / "back.npz", arrays)
    found = RUNNERS["big_vision"](tmp_path / "scanned.npz", images)
    assert torch.equal(found.features, theirs.features)
    stacked = open_source(tmp_path / "scanned.npz").tensors
    assert stacked[f"{form.prefix}Transformer/encoderblock/LayerNorm_0/scale"].shape == (DEPTH, WIDTH)
    with open_weights(tmp_path / "scanned.npz") as again, open_weights(path) as first:
        assert again.tensors == first.tensors and set(again.carried) == set(first.carried)
        assert all(torch.equal(again.read(name), first.read(name)) for name in first.tensors)


def test_ours_for_big_vision(tmp_path: Path) -> None:
    """A model that never was theirs; what an array cannot say is in the file's comment."""
    config = ModelConfig(
        width=16, depth=2, num_heads=2, mlp_dim=20, image_size=(8, 16), patch_size=4, num_classes=3, gelu="tanh",
        position="learned_1d", pool="map", block="sequential",
    )  # fmt: skip
    model, how = VisionTransformer(config, seed=3).eval(), Preprocessing(mean=(0.4,) * 3, crop_fraction=0.9)
    model.save_pretrained(tmp_path / "a.npz", "big_vision", preprocessing=how)
    images = photographs(3, (8, 16), how)
    found = RUNNERS["big_vision"](tmp_path / "a.npz", images)
    assert found.logits is not None
    with torch.no_grad():
        assert (found.logits - model(images)).abs().max() < 1e-5
    again = VisionTransformer.from_pretrained(tmp_path / "a.npz")
    assert again.config == model.config and again.preprocessing == how


def test_bf16_is_two_bytes_of_no_type(tmp_path: Path) -> None:
    arrays = Form(scan=True).arrays()
    with open_weights(saved(arrays, tmp_path / "a.npz")) as weights:
        save_weights(weights, tmp_path / "b.npz", "big_vision", dtype=torch.bfloat16)
    with np.load(tmp_path / "b.npz") as there:
        assert {there[name].dtype.str for name in there.files} == {"|V2"}
    with open_weights(tmp_path / "b.npz") as weights:
        expected = torch.from_numpy(arrays["params/embedding/bias"]).bfloat16()
        assert torch.equal(weights.read("embed.bias"), expected)
        images = photographs(3, (GRID * PATCH,) * 2, None)
        ours, theirs = vitruvius.run_weights(weights, images), RUNNERS["big_vision"](tmp_path / "b.npz", images)
    assert (ours.features - theirs.features).abs().max() < 1e-5


def test_positions_that_are_sines(tmp_path: Path) -> None:
    arrays = Form(prefix="").arrays()
    del arrays["pos_embedding"]
    path = saved(arrays, tmp_path / "a.npz")
    with pytest.raises(ConversionError, match=r"model\.image_size"), open_weights(path):
        pass
    with open_weights(path, given={"image_size": 16}) as weights:
        y, x = np.mgrid[:4, :4]  # as big_vision computes them, in fp32
        omega = 1.0 / (10_000.0 ** (np.arange(WIDTH // 4, dtype=np.float32) / (WIDTH // 4 - 1)))
        y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
        expected = np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
        assert np.abs(weights.read("embed.pos").numpy() - expected).max() < 1e-6
        images = photographs(3, (16, 16), None)
        ours, theirs = vitruvius.run_weights(weights, images), RUNNERS["big_vision"](path, images)
        assert (ours.features - theirs.features).abs().max() < 1e-5
        save_weights(weights, tmp_path / "ours")
    with open_weights(tmp_path / "ours") as weights:
        save_weights(weights, tmp_path / "back.npz", "big_vision")
    assert equal(tmp_path / "back.npz", arrays)
    model = VisionTransformer.from_pretrained(tmp_path / "ours")
    model.get_parameter("embed.pos").data[0, 0] += 1
    model.save_pretrained(tmp_path / "trained")
    with open_weights(tmp_path / "trained") as weights, pytest.raises(ConversionError, match=r"embed\.pos"):
        save_weights(weights, tmp_path / "trained.npz", "big_vision")


REFUSED: dict[str, tuple[Arrays, str]] = {
    "pre_logits": ({"pre_logits/kernel": np.ones((24, 24)), "pre_logits/bias": np.ones(24)}, "pre_logits"),
    "optimizer": ({"opt/0/mu/embedding/bias": np.ones(24)}, "opt/0/mu/embedding/bias"),
    "naflex": ({"params/embedding/kernel": np.ones((48, 24))}, "NaFlex"),
    "oblong_patches": ({"params/embedding/kernel": np.ones((4, 2, 3, 24))}, "square"),
    "oblong_map": ({"params/pos_embedding": np.ones((1, 15, 24))}, "no square"),
    "cls_and_map": ({"params/cls": np.ones((1, 1, 24)), "params/MAPHead_0/probe": np.ones((1, 1, 24))}, "MAPHead_0"),
    "more_layers": ({"params/Transformer/encoderblock_4/LayerNorm_0/scale": np.ones(24)}, "encoderblock_3"),
    "layer_scale": ({"params/Transformer/encoderblock_0/ls1": np.ones(24)}, "encoderblock_0/ls1"),
    "heads": ({f"params/Transformer/encoderblock_0/{MHA}_0/query/kernel": np.ones((24, 5, 5))}, "num_heads 5"),
    "dims": ({f"params/Transformer/encoderblock_0/{MHA}_0/query/kernel": np.ones((24, 24))}, "query/kernel"),
}


@pytest.mark.parametrize(("added", "named"), REFUSED.values(), ids=REFUSED)
def test_files_that_are_refused(added: Arrays, named: str, tmp_path: Path) -> None:
    added = {k if k.startswith(("params/", "opt/")) else f"params/{k}": v.astype(np.float32) for k, v in added.items()}
    path = saved(Form().arrays() | added, tmp_path / "a.npz")
    with pytest.raises(ConversionError, match=named), open_weights(path):
        pass


def test_left_out(tmp_path: Path) -> None:
    more = {"params/pre_logits/kernel": np.ones((24, 24), np.float32), "opt/0/count": np.ones(1)}
    path = saved(Form().arrays() | more, tmp_path / "a.npz")
    with open_weights(path, leave_out=["params/pre_logits/*", "params/head/*", "opt/*"]) as weights:
        assert weights.description.model.num_classes == 0


UNKNOWN = {
    "block": "parallel", "gelu": "erf", "position": "rope_2d", "registers": 2, "qk_norm": True, "layer_scale": 0.1,
    "pool": "cls_gap", "norm_eps": 1e-5, "qkv_bias": "qv", "norm": "rmsnorm", "mlp": "swiglu", "pre_norm": True,
    "patch_bias": False, "classifier_bias": False, "norm_after_pool": True, "attention": "window",
}  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN)
def test_models_that_are_refused(key: str, tmp_path: Path) -> None:
    keys = {"gelu": "tanh", "position": "learned_1d", "pool": "gap", key: UNKNOWN[key]}
    if key == "mlp":
        del keys["gelu"]
    config = ModelConfig(width=16, depth=2, num_heads=2, image_size=8, patch_size=4, num_classes=3, **keys)  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="gelu" if key == "mlp" else rf"model\.{key}"):
        VisionTransformer(config).save_pretrained(tmp_path / "a.npz", "big_vision")
    assert not list(tmp_path.iterdir())


def test_scan_is_of_big_vision_alone(tmp_path: Path) -> None:
    with open_weights(saved(Form().arrays(), tmp_path / "a.npz")) as weights, pytest.raises(ConversionError):
        save_weights(weights, tmp_path / "b", "hf_vit", scan=True)
