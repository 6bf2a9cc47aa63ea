"""Towers of open_clip: what this program makes of them against open_clip's own classes, there and back."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import ModelConfig, VisionTransformer
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError, Preprocessing
from model.formats.timm.architectures import ARCHITECTURES
from tools.convert.images import photographs
from tools.convert.libraries import library
from tools.convert.runners import RUNNERS, vitruvius

VISION: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 32}
TEXT = {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
IMAGES = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the model, of its vision tower
    "openai": ({"quick_gelu": True}, {}),
    "laion": ({"init_logit_bias": -10.0}, {"mlp_ratio": 4.9231, "image_size": [32, 48]}),
    "clipa": ({"custom_text": True}, {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}),
    "layer_scale": ({}, {"ls_init_value": 1e-4, "pool_type": "avg", "act_kwargs": {"approximate": "tanh"}}),
    "others": ({}, {"pos_embed_type": "sin_cos_2d", "norm_kwargs": {"eps": 1e-3}, "block_type": "custom"}),
    "qk_norm": ({}, {"qk_norm": True}),
}


def config_of(model: dict[str, Any], vision: dict[str, Any]) -> dict[str, Any]:
    return {"embed_dim": 12, **model, "vision_cfg": VISION | vision, "text_cfg": TEXT}


def random(module: nn.Module) -> nn.Module:
    """With all parameters random."""
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, 0.1, 0.2, generator=generator)
    return module


def save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "open_clip_model.safetensors")
    whole = {"model_cfg": cfg, "preprocess_cfg": IMAGES}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    return folder


def of_open_clip(folder: Path, model: dict[str, Any], vision: dict[str, Any]) -> Path:
    """A model of two towers, by open_clip."""
    cfg = config_of(model, vision)
    custom = {k: v for k, v in cfg.items() if k != "custom_text"}
    made = random(getattr(library("open_clip.model"), "CustomTextCLIP" if "custom_text" in cfg else "CLIP")(**custom))
    return save(folder, cfg, made.state_dict())


def same_files(first: Path, second: Path) -> bool:
    a, b = (load_file(folder / "open_clip_model.safetensors") for folder in (first, second))
    configs = [json.loads((folder / "open_clip_config.json").read_text()) for folder in (first, second)]
    assert configs[0] == configs[1]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize(("model", "vision"), VARIANTS.values(), ids=VARIANTS)
def test_there_and_back(model: dict[str, Any], vision: dict[str, Any], tmp_path: Path) -> None:
    folder = of_open_clip(tmp_path / "theirs", model, vision)
    with open_weights(folder) as weights:
        assert weights.kind == "open_clip" and any("token_embedding" in name for name in weights.carried)
        found = weights.description.preprocessing
        assert found == Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), interpolation="bilinear", squash=True)
        images = photographs(3, weights.description.model.image, found)
        ours, theirs = vitruvius.run_weights(weights, images), RUNNERS["open_clip"](folder, images)
        save_weights(weights, tmp_path / "ours")
    assert ours.logits is not None and theirs.logits is not None and theirs.logits.std() > 0.1
    assert (ours.features - theirs.features).abs().max() < 1e-5
    assert (ours.logits - theirs.logits).abs().max() < 1e-5
    with open_weights(tmp_path / "ours") as weights:
        save_weights(weights, tmp_path / "back", "open_clip")
    assert same_files(folder, tmp_path / "back")


TOWERS: dict[str, dict[str, Any]] = {  # of timm, in open_clip
    "siglip": {"timm_model_name": "vit_tiny_siglip", "timm_pool": "map", "timm_proj": "none"},
    "head": {"timm_model_name": "vit_tiny_clip", "timm_pool": "token", "timm_proj": None},
    "linear": {"timm_model_name": "vit_tiny_clip", "timm_pool": "token", "timm_proj": "linear"},
    "linear_bias": {"timm_model_name": "vit_tiny_siglip", "timm_pool": "map", "timm_proj_bias": True},
}


@pytest.mark.parametrize("vision", TOWERS.values(), ids=TOWERS)
def test_towers_of_timm(vision: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By small architectures, which neither timm nor this program has."""
    small = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3}
    architectures = {
        "vit_tiny_siglip": small | {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
        "vit_tiny_clip": small | {"pre_norm": True, "norm_eps": 1e-5, "act_layer": "quick_gelu"},
    }
    for name, keys in architectures.items():
        monkeypatch.setitem(ARCHITECTURES, name, ("VisionTransformer", keys))
        monkeypatch.setitem(library("timm.models")._registry._model_entrypoints, name, entrypoint(keys))
    vision = vision | {"image_size": 48, "timm_model_pretrained": False}
    cfg = {"embed_dim": 12, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}
    made = library("open_clip.model").CustomTextCLIP(**{k: v for k, v in cfg.items() if k != "custom_text"})
    folder = save(tmp_path / "theirs", cfg, random(made).state_dict())
    with open_weights(folder) as weights:
        images = photographs(3, weights.description.model.image, None)
        ours, theirs = vitruvius.run_weights(weights, images), RUNNERS["open_clip"](folder, images)
        save_weights(weights, tmp_path / "ours")
    assert images.shape[2:] == (42, 42) and theirs.features.std() > 0.1
    assert (ours.features - theirs.features).abs().max() < 1e-5
    assert (ours.logits is None) == (theirs.logits is None) == (vision.get("timm_proj") == "none")
    if ours.logits is not None and theirs.logits is not None:
        assert ours.logits.shape == (4, 12) and (ours.logits - theirs.logits).abs().max() < 1e-5
    with open_weights(tmp_path / "ours") as weights:
        save_weights(weights, tmp_path / "back", "open_clip")
    assert same_files(folder, tmp_path / "back")


def entrypoint(keys: dict[str, Any]) -> Any:
    """A function of timm's registry."""
    layers, vit = library("timm.layers"), library("timm.models.vision_transformer")

    def make(pretrained: bool = False, pretrained_cfg: object = None, **kwargs: Any) -> nn.Module:
        values = {k: v for k, v in keys.items() if k != "norm_eps"} | {"img_size": 48}
        if "norm_eps" in keys:
            values["norm_layer"] = partial(layers.LayerNorm, eps=keys["norm_eps"])
        given = {k: v for k, v in kwargs.items() if k in ("num_classes", "global_pool")}
        found: nn.Module = vit.VisionTransformer(**values | given)
        found.default_cfg = {}  # type: ignore[assignment]
        return found

    return make


OURS = {
    "openai": {"gelu": "quick", "pool": "cls", "qk_norm": True, "qk_norm_bias": True},
    "clipa": {"pool": "gap", "class_tokens": 1, "pre_norm": False, "norm_after_pool": True, "gelu": "tanh"},
    "scaled": {"layer_scale": 0.1, "image_size": (16, 24), "pool": "cls", "norm_eps": 1e-6, "mlp_dim": 50},
}


@pytest.mark.parametrize("keys", OURS.values(), ids=OURS)
def test_ours_is_a_tower_alone(keys: dict[str, Any], tmp_path: Path) -> None:
    usual = {"image_size": 16, "norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "classifier_bias": False}
    shape = {"width": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "num_classes": 5, "position": "learned_1d"}
    model = VisionTransformer(ModelConfig(**usual | shape | keys)).eval()  # type: ignore[arg-type]
    random(model)
    how = Preprocessing(mean=(0.1, 0.2, 0.3))
    model.save_pretrained(tmp_path / "a", "open_clip", preprocessing=how)
    images = photographs(3, model.config.image, how)
    with torch.no_grad():
        expected = model(images)
    found = RUNNERS["open_clip"](tmp_path / "a", images)
    assert found.logits is not None and (found.logits - expected).abs().max() < 1e-5 and expected.std() > 0.1
    again = VisionTransformer.from_pretrained(tmp_path / "a")
    assert again.config == model.config and again.preprocessing == how


def test_without_a_configuration(tmp_path: Path) -> None:
    folder = of_open_clip(tmp_path / "theirs", {"quick_gelu": True}, {"no_ln_pre": True})
    with open_weights(folder) as weights:
        whole = weights.description.model
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(ConversionError, match=r"model\.num_heads"), open_weights(folder):
        pass
    with open_weights(folder, given={"num_heads": 4, "gelu": "quick"}) as weights:
        assert weights.description.model == whole
    other = tmp_path / "ViT.json"  # as open_clip's own, without model_cfg
    other.write_text(json.dumps(config_of({"quick_gelu": True}, {"no_ln_pre": True})))
    with open_weights(folder, config=other) as weights:
        assert weights.description.model == whole
        save_weights(weights, tmp_path / "again", "open_clip")
    assert "text_cfg" in json.loads((tmp_path / "again" / "open_clip_config.json").read_text())["model_cfg"]


REFUSED: dict[str, dict[str, Any]] = {
    "attentional_pool": {"attentional_pool": True},
    "scaled_cosine_attn": {"scaled_cosine_attn": True},
    "scale_heads": {"scale_heads": True},
    "scale_attn_inner": {"scale_attn_inner": True},
    "scale_attn": {"scale_attn": True},
    "scale_fc": {"scale_fc": True},
    "timm_model_name": {"timm_model_name": "convnext_base"},
    "layers": {"layers": [3, 4, 6, 3]},
    "pool_type": {"pool_type": "none"},
    "norm_kwargs": {"norm_kwargs": {"bias": False}},
    "act_kwargs": {"act_kwargs": {"inplace": True}},
    "pos_embed_type": {"pos_embed_type": "rope"},
    "new_key": {"new_key": 1},
    "image_size": {"image_size": 33},
}


def test_keys_that_are_refused(tmp_path: Path) -> None:
    """Every key of their configuration is known to this program, and none that it has not is passed over."""
    from model.formats import open_clip_config

    known = library("open_clip.model").CLIPVisionCfg.__dataclass_fields__
    assert set(known) == {*open_clip_config._READ, *open_clip_config._REFUSED, *open_clip_config._KNOWN}
    folder = of_open_clip(tmp_path / "theirs", {}, {})
    for key, vision in REFUSED.items():
        whole = {"model_cfg": config_of({}, vision), "preprocess_cfg": IMAGES}
        (folder / "open_clip_config.json").write_text(json.dumps(whole))
        with pytest.raises(ConversionError, match=key), open_weights(folder):
            pass
    whole = {"model_cfg": config_of({}, {}), "preprocess_cfg": IMAGES | {"resize_mode": "longest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    with pytest.raises(ConversionError, match="longest"), open_weights(folder):
        pass


def test_models_that_are_refused(tmp_path: Path) -> None:
    usual = {"norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "classifier_bias": False, "pool": "cls"}
    shape = {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "num_classes": 5, "position": "learned_1d"}
    others = {
        "patch_bias": True, "classifier_bias": True, "pool": "map", "registers": 1, "block": "parallel",
        "num_classes": 0, "in_channels": 1, "image_size": 20, "qkv_bias": "none", "class_position": False,
        "qk_norm_over": "width", "norm": "rmsnorm", "position": "rope_2d",
    }  # fmt: skip
    for key, value in others.items():
        keys = {**usual, **shape, "image_size": 16, key: value}
        if key == "num_classes":
            del keys["classifier_bias"]
        if key == "qk_norm_over":
            keys["qk_norm"] = keys["qk_norm_bias"] = True
        with pytest.raises(ConversionError, match=key if key != "num_classes" else "model"):
            VisionTransformer(ModelConfig(**keys)).save_pretrained(tmp_path / "a", "open_clip")  # type: ignore[arg-type]
    model = VisionTransformer(ModelConfig(**{**usual, **shape, "image_size": 16}))  # type: ignore[arg-type]
    for how in (Preprocessing(crop_fraction=0.9), Preprocessing(interpolation="lanczos")):
        with pytest.raises(ConversionError, match=r"open_clip (has|takes)"):
            model.save_pretrained(tmp_path / "a", "open_clip", preprocessing=how)


def test_published_configurations(tmp_path: Path) -> None:
    """Of towers of open_clip's own, as they come with it: some by their numbers."""
    from model.formats.open_clip import model_of_config

    folder = Path(str(library("open_clip").__file__)).parent / "model_configs"
    found: dict[str, ModelConfig | None] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            found[path.stem] = model_of_config(path, json.loads(path.read_text()))
        except ConversionError:
            found[path.stem] = None
    big = found["ViT-bigG-14"]
    assert big is not None and (big.width, big.depth, big.num_heads, big.mlp_dim) == (1664, 48, 16, 8192)
    assert big.num_classes == 1280 and big.gelu == "erf" and big.pre_norm and big.norm_eps == 1e-5
    openai = found["ViT-L-14-336-quickgelu"]
    assert openai is not None and openai.gelu == "quick" and openai.image == (336, 336)
    clipa = found["ViT-H-14-CLIPA-336"]
    assert clipa is not None and (clipa.pool, clipa.class_tokens, clipa.norm_after_pool) == ("gap", 1, True)
    siglip = found["ViT-SO400M-14-SigLIP-384"]
    assert siglip is not None and (siglip.width, siglip.depth, siglip.mlp_dim) == (1152, 27, 4304)
    assert (siglip.pool, siglip.num_classes, siglip.image) == ("map", 0, (378, 378))
    giant = found["ViT-gopt-16-SigLIP2-384"]
    assert giant is not None and (giant.width, giant.num_heads, giant.gelu) == (1536, 16, "tanh")
    refused = {name for name, m in found.items() if m is None}
    assert not {name for name in refused if name.startswith("ViT-")}
