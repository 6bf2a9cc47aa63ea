"""Models of transformers: small ones of its own classes with random weights, there and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import Tensor, nn

from model import ModelConfig, VisionTransformer
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError, Entry, Preprocessing
from model.formats.huggingface import keys
from model.formats.registry import FORMATS
from model.layers import logical_shapes
from tools.convert.images import photographs
from tools.convert.runners import vitruvius
from tools.convert.runners.huggingface import run

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

TINY: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
NO_MLP = {k: v for k, v in TINY.items() if k != "intermediate_size"}
NO_SIZE = {k: v for k, v in TINY.items() if k != "image_size"} | {"num_patches": 16}
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 99,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def siglip(vision: dict[str, Any], kind: str = "Siglip") -> Any:
    return getattr(hf, f"{kind}Config")(vision_config=vision, text_config=TEXT, num_labels=3)


# kind, class and configuration, and what of ours is to be seen
CASES: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "vit": (
        "hf_vit",
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**TINY, num_labels=5)),
        {"norm_eps": 1e-12, "gelu": "erf", "num_classes": 5, "qkv_bias": "all"},
    ),
    "vit, no biases, tanh, wide images": (
        "hf_vit",
        lambda: hf.ViTModel(
            hf.ViTConfig(**TINY | {"image_size": [16, 32]}, qkv_bias=False, hidden_act="gelu_pytorch_tanh"),
            add_pooling_layer=False,
        ),
        {"qkv_bias": "none", "gelu": "tanh", "image_size": (16, 32), "num_classes": 0},
    ),
    "siglip": ("hf_siglip", lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY)), {"gelu": "tanh"}),
    "siglip, no probe": (
        "hf_siglip",
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY, vision_use_head=False)),
        {"pool": "gap", "num_classes": 0},
    ),
    "siglip, both towers": ("hf_siglip", lambda: hf.SiglipModel(siglip(TINY)), {"pool": "map"}),
    "siglip, classifier": (
        "hf_siglip",
        lambda: hf.SiglipForImageClassification(siglip(TINY)),
        {"pool": "gap", "num_classes": 3},
    ),
    "siglip2": ("hf_siglip2", lambda: hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**NO_SIZE)), {"image_size": 32}),
    "siglip2, both towers": ("hf_siglip2", lambda: hf.Siglip2Model(siglip(NO_SIZE, "Siglip2")), {"pool": "map"}),
    "siglip2, classifier": (
        "hf_siglip2",
        lambda: hf.Siglip2ForImageClassification(siglip(NO_SIZE, "Siglip2")),
        {"num_classes": 3},
    ),
    "dinov2": ("hf_dinov2", lambda: hf.Dinov2Model(hf.Dinov2Config(**NO_MLP)), {"layer_scale": 1.0, "mlp_dim": 128}),
    "dinov2, gated, classifier": (
        "hf_dinov2",
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**NO_MLP, use_swiglu_ffn=True, num_labels=3)),
        {"mlp": "swiglu", "mlp_dim": 88, "pool": "cls_gap", "num_classes": 3},
    ),
    "dinov2, registers": (
        "hf_dinov2",
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**NO_MLP, qkv_bias=False)),
        {"registers": 4, "qkv_bias": "none"},
    ),
    "dinov2, registers, classifier": (
        "hf_dinov2",
        lambda: hf.Dinov2WithRegistersForImageClassification(hf.Dinov2WithRegistersConfig(**NO_MLP, num_labels=3)),
        {"registers": 4, "pool": "cls_gap"},
    ),
    "dinov3": (
        "hf_dinov3",
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**TINY | {"image_size": [16, 32]}, num_register_tokens=2)),
        {"qkv_bias": "qv", "position": "rope_2d", "rope_base": 100.0, "registers": 2, "norm_eps": 1e-5},
    ),
    "dinov3, gated, without biases": (
        "hf_dinov3",
        lambda: hf.DINOv3ViTModel(
            hf.DINOv3ViTConfig(
                **TINY, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False, proj_bias=False,
                mlp_bias=False, rope_theta=50.0,
            )
        ),
        {"qkv_bias": "none", "mlp": "swiglu", "rope_base": 50.0, "registers": 0},
    ),
    "clip": (
        "hf_clip_vision",
        lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TINY)),
        {"gelu": "quick", "pre_norm": True, "patch_bias": False, "num_classes": 0, "norm_eps": 1e-5},
    ),
    "clip, projection": (
        "hf_clip_vision",
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TINY, projection_dim=12, hidden_act="gelu")),
        {"gelu": "erf", "num_classes": 12, "classifier_bias": False},
    ),
    "clip, both towers": (
        "hf_clip_vision",
        lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=TINY, text_config=TEXT, projection_dim=12)),
        {"num_classes": 12},
    ),
}  # fmt: skip


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Every parameter of it, norms and biases too, so that none can be left out unseen."""
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        around = 1.0 if ("norm" in name and name.endswith("weight")) or "lambda" in name else 0.0
        p.copy_(around + 0.2 * torch.randn(p.shape, generator=generator))
    return model.eval()


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """What its own class makes of photographs is what ours makes of them, from its files and from ours; and its files
    come back bit for bit, for its own class to load."""
    kind, make, seen = CASES[case]
    randomised(make()).save_pretrained(tmp_path / "there")
    with open_weights(tmp_path / "there") as weights:
        model = weights.description.model
        assert (weights.kind, {key: getattr(model, key) for key in seen}) == (kind, seen)
        images = photographs(3, model.image, None)
        ours = vitruvius.run_weights(weights, images)
        save_weights(weights, tmp_path / "ours")
    theirs = run(tmp_path / "there", images)
    assert (ours.features - theirs.features).abs().max() < 1e-5
    assert (ours.logits is None) == (theirs.logits is None)
    if ours.logits is not None and theirs.logits is not None:
        assert (ours.logits - theirs.logits).abs().max() < 1e-5
    with open_weights(tmp_path / "ours") as weights:
        save_weights(weights, tmp_path / "back", kind)
    first, second = tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back")
    assert first.keys() == second.keys()
    assert all(torch.equal(x, second[name]) and x.dtype == second[name].dtype for name, x in first.items())
    back = run(tmp_path / "back", images)
    assert torch.equal(back.features, theirs.features)
    configs = [hf.AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("there", "back")]
    ignored = {"transformers_version", "architectures", "_name_or_path", "dtype"}
    different = {k for k in configs[0].keys() | configs[1].keys() if configs[0].get(k) != configs[1].get(k)} - ignored
    assert not different, {k: [c.get(k) for c in configs] for k in different}


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("hf_vit", {"pool": "cls", "num_classes": 3}),
    "vit, positions of rows and columns": ("hf_vit", {"pool": "cls", "position": "learned_2d", "num_classes": 3}),
    "siglip": ("hf_siglip", {"pool": "map", "num_classes": 0, "gelu": "tanh", "position": "sincos_2d"}),
    "siglip, classes": ("hf_siglip", {"pool": "gap", "num_classes": 3}),
    "siglip2": ("hf_siglip2", {"pool": "map", "num_classes": 0}),
    "siglip2, classes": ("hf_siglip2", {"pool": "gap", "num_classes": 3}),
    "dinov2": ("hf_dinov2", {"pool": "cls", "num_classes": 0, "mlp_dim": 32}),
    "dinov2, classes": (
        "hf_dinov2",
        {"pool": "cls_gap", "num_classes": 3, "mlp_dim": 24, "mlp": "swiglu", "registers": 2, "layer_scale": 0.5},
    ),
    "dinov3": ("hf_dinov3", {"pool": "cls", "num_classes": 0, "position": "rope_2d", "qkv_bias": "qv", "registers": 1}),
    "clip": ("hf_clip_vision", {"pool": "cls", "num_classes": 0, "pre_norm": True, "patch_bias": False}),
    "clip, projection": (
        "hf_clip_vision",
        {"pool": "cls", "num_classes": 6, "classifier_bias": False, "pre_norm": True, "patch_bias": False},
    ),
}


def ours(**keys: Any) -> VisionTransformer:
    """A model that never was elsewhere."""
    tiny = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "image_size": 16, "patch_size": 4}
    config = ModelConfig(**tiny | {"position": "learned_1d"} | keys)
    return randomised(VisionTransformer(config))  # type: ignore[return-value]


@pytest.mark.parametrize("case", OURS)
def test_a_model_of_ours_is_loaded_as_it_is(case: str, tmp_path: Path) -> None:
    kind, keys = OURS[case]
    model = ours(**keys)
    how = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bicubic", crop_fraction=0.8)
    if kind == "hf_siglip2":
        how = replace(how, crop_fraction=1.0)
    model.save_pretrained(tmp_path / "ours", preprocessing=how)
    model.save_pretrained(tmp_path / "there", kind, preprocessing=how)
    images = photographs(3, model.config.image, how)
    found, wanted = run(tmp_path / "there", images), vitruvius.run(tmp_path / "ours", images)
    assert (found.features - wanted.features).abs().max() < 1e-5
    if wanted.logits is not None:
        assert found.logits is not None and (found.logits - wanted.logits).abs().max() < 1e-5
    if kind != "hf_siglip2":  # whose processor keeps the ratio of an image
        assert VisionTransformer.from_pretrained(tmp_path / "there").preprocessing == how


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "rope": ("hf_vit", {"position": "rope_2d", "pool": "cls"}, "model.position is rope_2d"),
    "parallel": ("hf_siglip", {"block": "parallel", "pool": "gap"}, "model.block is parallel"),
    "rmsnorm": ("hf_dinov2", {"norm": "rmsnorm", "pool": "cls", "num_classes": 0}, "model.norm is rmsnorm"),
    "qk_norm": ("hf_vit", {"qk_norm": True, "pool": "cls"}, "model.qk_norm"),
    "windows": ("hf_vit", {"attention": "window", "window_size": 2, "pool": "cls"}, "model.attention is window"),
    "registers": ("hf_vit", {"registers": 2, "pool": "cls"}, "model.registers is 2"),
    "mean": ("hf_vit", {"pool": "gap"}, "model.pool is gap"),
    "classifier on a probe": ("hf_siglip", {"pool": "map", "num_classes": 3}, "sees the mean of the tokens"),
    "hidden features": ("hf_dinov2", {"pool": "cls", "num_classes": 0, "mlp_dim": 24}, "model.mlp_dim is 24"),
    "a classifier": ("hf_dinov3", {"pool": "cls", "position": "rope_2d", "num_classes": 3}, "has no classifier"),
    "wide images": ("hf_dinov2", {"pool": "cls", "num_classes": 0, "mlp_dim": 32, "image_size": (8, 16)}, "square"),
    "half patches": (
        "hf_dinov3",
        {"pool": "cls", "position": "rope_2d", "image_size": 18, "num_classes": 0},
        "no multiple",
    ),
    "half patches, one table": ("hf_vit", {"pool": "cls", "image_size": 18}, "no multiple of"),
    "a bias": ("hf_clip_vision", {"pool": "cls", "pre_norm": True, "num_classes": 0}, "model.patch_bias is true"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_they_have_not_is_refused_by_name(case: str, tmp_path: Path) -> None:
    kind, keys, expected = REFUSED[case]
    with pytest.raises(ConversionError) as refused:
        ours(**keys).save_pretrained(tmp_path / "there", kind)
    assert expected in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_a_pooler_is_refused_until_it_may_go(tmp_path: Path) -> None:
    """And a classifier of CLIP, whose norm is another."""
    randomised(hf.ViTModel(hf.ViTConfig(**TINY))).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConversionError, match=r"pooler\.dense\.weight.*of no use"):
        VisionTransformer.from_pretrained(tmp_path / "vit")
    model = VisionTransformer.from_pretrained(tmp_path / "vit", leave_out=["pooler.*"])
    images = photographs(3, (32, 32), None)
    assert (model(images) - run(tmp_path / "vit", images).features).abs().max() < 1e-5
    clip = hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=TINY, text_config=TEXT, num_labels=3))
    clip.save_pretrained(tmp_path / "clip")
    with pytest.raises(ConversionError, match="CLIPForImageClassification"):
        VisionTransformer.from_pretrained(tmp_path / "clip")


@pytest.mark.parametrize(
    ("kind", "case", "keys", "expected"),
    [
        ("activation", "vit", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("patches", "vit", {"patch_size": [8, 4]}, r"patch_size.*\[8, 4\]"),
        ("biases", "dinov3", {"query_bias": False}, "query_bias False"),
        ("gate", "dinov3", {"use_gated_mlp": True}, "hidden_act"),
        ("labels", "vit", {"id2label": {"a": "b"}}, "id2label"),
    ],
)
def test_what_ours_has_not_is_refused_by_name(
    kind: str, case: str, keys: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    CASES[case][1]().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | keys))
    with pytest.raises(ConversionError, match=expected):
        VisionTransformer.from_pretrained(tmp_path)


# Published models: their class, and what their config.json sets; ours has as many parameters.
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "google/vit-base-patch16-224": (
        "hf_vit",
        "ViTForImageClassification",
        {"hidden_size": 768, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12, "num_labels": 1000},
        {"width": 768, "depth": 12, "num_heads": 12, "norm_eps": 1e-12, "num_classes": 1000},
    ),
    "google/siglip-so400m-patch14-384": (
        "hf_siglip",
        "SiglipVisionModel",
        {
            "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
            "image_size": 384, "patch_size": 14,
        },
        {"image_size": 378, "mlp_dim": 4304, "gelu": "tanh", "pool": "map"},
    ),
    "google/siglip2-base-patch16-naflex": (
        "hf_siglip2",
        "Siglip2VisionModel",
        {"num_patches": 256},
        {"image_size": 256, "patch_size": 16, "width": 768},
    ),
    "facebook/dinov2-giant": (
        "hf_dinov2",
        "Dinov2Model",
        {
            "hidden_size": 1536, "num_hidden_layers": 40, "num_attention_heads": 24, "image_size": 518,
            "patch_size": 14, "use_swiglu_ffn": True,
        },
        {"mlp": "swiglu", "mlp_dim": 4096, "image_size": 518, "layer_scale": 1.0},
    ),
    "facebook/dinov2-with-registers-large": (
        "hf_dinov2",
        "Dinov2WithRegistersModel",
        {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518,
            "patch_size": 14, "num_register_tokens": 4,
        },
        {"registers": 4, "mlp_dim": 4096},
    ),
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (
        "hf_dinov3",
        "DINOv3ViTModel",
        {
            "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32, "intermediate_size": 8192,
            "hidden_act": "silu", "use_gated_mlp": True, "num_register_tokens": 4, "query_bias": False,
            "value_bias": False,
        },
        {"mlp": "swiglu", "qkv_bias": "none", "registers": 4, "norm_eps": 1e-5, "position": "rope_2d"},
    ),
    "openai/clip-vit-large-patch14": (
        "hf_clip_vision",
        "CLIPVisionModelWithProjection",
        {
            "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
            "patch_size": 14, "projection_dim": 768,
        },
        {"gelu": "quick", "pre_norm": True, "num_classes": 768, "patch_bias": False, "classifier_bias": False},
    ),
}  # fmt: skip


class Listed:
    """As Source, of a model on the meta device: names and shapes of what stands outside the blocks."""

    def __init__(self, model: nn.Module, config: dict[str, Any]) -> None:
        self.path, self.shards, self.files = Path("published"), (), {"config.json": config}
        self.tensors = {n: Entry(tuple(p.shape), p.dtype) for n, p in model.named_parameters() if ".0." not in n}

    def read(self, name: str, index: int | None = None) -> Tensor:
        raise AssertionError("nothing is read")


@pytest.mark.parametrize("case", PUBLISHED)
def test_published_models_have_all_their_parameters_here(case: str) -> None:
    kind, name, config, seen = PUBLISHED[case]
    of_class = getattr(hf, name)
    config = of_class.config_class(**config)
    with torch.device("meta"):
        there = of_class(config)
    found = FORMATS[kind].describe(Listed(there, config.to_dict()), {}).model  # type: ignore[arg-type]
    assert {key: getattr(found, key) for key in seen} == seen
    ours = sum(math.prod(shape) for shape in logical_shapes(found).values())
    assert ours == sum(p.numel() for n, p in there.named_parameters() if "mask_token" not in n)


CLASSES: dict[str, tuple[type, frozenset[str]]] = {
    "vit": (hf.ViTConfig, keys.VIT),
    "siglip": (hf.SiglipVisionConfig, keys.SIGLIP),
    "siglip2": (hf.Siglip2VisionConfig, keys.SIGLIP2),
    "dinov2": (hf.Dinov2Config, keys.DINOV2),
    "dinov2 with registers": (hf.Dinov2WithRegistersConfig, keys.DINOV2),
    "dinov3": (hf.DINOv3ViTConfig, keys.DINOV3),
    "clip": (hf.CLIPVisionConfig, keys.CLIP),
}


@pytest.mark.parametrize("case", CLASSES)
def test_every_key_of_their_configurations_is_known_and_no_other(case: str) -> None:
    config, known = CLASSES[case]
    written = {key: value or "set" for key, value in config().to_dict().items()}
    keys.check_known(written, known)
    with pytest.raises(ConversionError, match=r"use_magic of config.json is True.*does not know"):
        keys.check_known(written | {"use_magic": True}, known)


def test_a_tower_that_was_left_out_is_not_asked_for(tmp_path: Path) -> None:
    """The image tower of a pair leaves as the class for one tower, and of another kind it is refused by name."""
    randomised(hf.SiglipModel(siglip(TINY))).save_pretrained(tmp_path / "pair")
    VisionTransformer.from_pretrained(tmp_path / "pair").save_pretrained(tmp_path / "kept")
    with pytest.raises(ConversionError, match=r"no place for what came from hf_siglip: .*logit_scale"):
        VisionTransformer.from_pretrained(tmp_path / "kept").save_pretrained(tmp_path / "x", "big_vision")
    alone = VisionTransformer.from_pretrained(tmp_path / "pair", leave_out=["text_model.*", "logit_*"])
    alone.save_pretrained(tmp_path / "alone", "hf_siglip")
    images = photographs(3, (32, 32), None)
    assert torch.equal(run(tmp_path / "alone", images).features, run(tmp_path / "pair", images).features)


@pytest.mark.parametrize(("case", "gone"), [("dinov2", "*mask_token"), ("siglip, classifier", "*head.*")])
def test_what_was_left_out_is_not_made_anew(case: str, gone: str, tmp_path: Path) -> None:
    """The config.json that is written asks for no tensor that is not there."""
    kind, make, _ = CASES[case]
    randomised(make()).save_pretrained(tmp_path / "there")
    VisionTransformer.from_pretrained(tmp_path / "there", leave_out=[gone]).save_pretrained(tmp_path / "back", kind)
    images = photographs(3, (32, 32), None)
    assert torch.equal(run(tmp_path / "back", images).features, run(tmp_path / "there", images).features)


@pytest.mark.parametrize(("key", "value"), [("hidden_act", "silu"), ("pruned_heads", {"0": [1]}), ("head_dim", 4)])
def test_what_a_config_says_is_not_passed_over(key: str, value: Any, tmp_path: Path) -> None:
    folder = tmp_path / "there"
    CASES["vit"][1]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=key), open_weights(folder):
        pass


def test_images_are_prepared_as_they_were(tmp_path: Path) -> None:
    """DeiT's way (squashed to 256, of which 224 are kept), what CLIP's class does unsaid; the unknown is refused."""
    folder = tmp_path / "there"
    CASES["vit"][1]().save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    deit = {"feature_extractor_type": "DeiTFeatureExtractor", "size": 256, "do_center_crop": True, "crop_size": 224}
    clip = {"image_processor_type": "CLIPImageProcessorFast", "size": {"shortest_edge": 256}}
    for values, squash in ((deit, True), (clip, False)):
        file.write_text(json.dumps(values))
        with open_weights(folder) as weights:
            how = weights.description.preprocessing
            assert how is not None and (how.squash, how.crop_fraction, how.interpolation) == (squash, 0.875, "bicubic")
    for wrong in ({"resample": 5}, {"do_resize": False}, {"rescale_factor": 1.0}, {"do_pad": True}):
        file.write_text(json.dumps({"image_processor_type": "ViTImageProcessor"} | wrong))
        with pytest.raises(ConversionError, match=next(iter(wrong))), open_weights(folder):
            pass


def test_images_that_do_not_fill_patches_are_cut(tmp_path: Path) -> None:
    """As in SigLIP's so400m with 384 pixels in patches of 14."""
    torch.manual_seed(0)
    randomised(hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY | {"image_size": 35}))).save_pretrained(tmp_path / "t")
    with open_weights(tmp_path / "t") as weights:
        assert weights.description.model.image_size == 32
        images = photographs(3, (32, 32), None)
        assert (
            vitruvius.run_weights(weights, images).features - run(tmp_path / "t", images).features
        ).abs().max() < 1e-5
