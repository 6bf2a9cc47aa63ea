"""Both towers of open_clip and transformers: similarity logits against the libraries' own classes, there and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

from data.texts import make_tokenizer
from engine.config.cli import parse
from model import ImageText, ModelConfig, TextConfig, VisionTransformer
from model.formats import open_clip_text
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError
from model.formats.registry import PAIRS
from model.formats.timm.architectures import ARCHITECTURES
from tests.model.formats.test_huggingface import NO_SIZE, TINY
from tests.model.formats.test_open_clip import VISION, entrypoint, random, save
from tools.convert import verify
from tools.convert.__main__ import main
from tools.convert.images import tokens
from tools.convert.libraries import library

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

WORDS = {"context_length": 9, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2}
TEXT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 40,
    "max_position_embeddings": 9,
}  # fmt: skip
SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
TIMM = {"timm_model_name": "vit_tiny_siglip", "timm_model_pretrained": False, "image_size": 48}


def open_clip(vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None, **model: Any) -> Any:
    """Saves a model of open_clip's classes."""

    def write(folder: Path) -> None:
        cfg = {"embed_dim": 12, "vision_cfg": VISION, "text_cfg": WORDS | (text or {})} | model
        cfg["vision_cfg"] = vision if vision and "timm_model_name" in vision else VISION | (vision or {})
        made = "CustomTextCLIP" if cfg.get("custom_text") else "CLIP"
        given = {key: value for key, value in cfg.items() if key != "custom_text"}
        save(folder, cfg, random(getattr(library("open_clip.model"), made)(**given)).state_dict())

    return write


def clip(text: dict[str, Any] | None = None, **config: Any) -> Any:
    """Saves a CLIPModel."""
    towers = {"vision_config": TINY, "text_config": TEXT | (text or {}), "projection_dim": 12}
    return transformers("CLIPModel", lambda: hf.CLIPConfig(**towers | config))


def amended(write: Any, **values: Any) -> Any:
    """Saves the same with other values of keys of `config.json`."""

    def changed(folder: Path) -> None:
        write(folder)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return changed


def siglip(kind: str = "Siglip", vision: dict[str, Any] = TINY, text: dict[str, Any] | None = None) -> Any:
    """Saves a SiglipModel or Siglip2Model."""
    towers = {"vision_config": vision, "text_config": TEXT | (text or {})}
    return transformers(f"{kind}Model", lambda: getattr(hf, f"{kind}Config")(**towers))


def transformers(name: str, config: Callable[[], Any]) -> Any:
    def write(folder: Path) -> None:
        module: nn.Module = random(getattr(hf, name)(config()))
        module.save_pretrained(folder)  # type: ignore[operator]

    return write


CASES: dict[str, tuple[Any, str, dict[str, Any]]] = {  # what saves it, its kind, what is to be seen of our text tower
    "openai": (open_clip(quick_gelu=True), "open_clip", {"pool": "eos", "end_token": 39, "gelu": "quick"}),
    "custom, eos, tanh, scales": (
        open_clip(
            {"pool_type": "avg", "final_ln_after_pool": True},
            {"pool_type": "eos", "eos_id": 7, "act_kwargs": {"approximate": "tanh"}, "ls_init_value": 0.1,
             "norm_kwargs": {"eps": 1e-3}, "mlp_ratio": 2.3},
            custom_text=True, init_logit_bias=-10.0, nonscalar_logit_scale=True,
        ),
        "open_clip",
        {"end_token": 7, "gelu": "tanh", "layer_scale": 0.1, "norm_eps": 1e-3, "mlp_dim": 36},
    ),
    "no projection of texts": (open_clip(text={"proj_type": "none", "width": 12}), "open_clip", {"projection": "none"}),
    "siglip of timm": (
        open_clip(TIMM | {"timm_pool": "map", "timm_proj": "none"}, SIGLIP, embed_dim=24, custom_text=True,
                  init_logit_bias=-10.0, quick_gelu=True),
        "open_clip",
        {"pool": "last", "attention": "full", "projection_bias": True, "gelu": "quick"},
    ),
    "timm's own head": (open_clip(TIMM | {"timm_pool": "map", "timm_proj": None}), "open_clip", {"pool": "eos"}),
    "clip": (clip({"eos_token_id": 5}), "hf_clip_vision", {"end_token": 5, "attention": "causal", "gelu": "quick"}),
    "clip, older end and file": (
        amended(
            clip({"eos_token_id": 2}), text_config={"num_attention_heads": 2}, vision_config={"layer_norm_eps": 0.1},
            text_config_dict=TEXT | {"eos_token_id": 2}, vision_config_dict=TINY,
        ),
        "hf_clip_vision",
        {"end_token": 39, "num_heads": 4},
    ),
    "siglip": (
        amended(siglip(), text_config_dict={"num_attention_heads": 2}), "hf_siglip",
        {"pool": "last", "attention": "full", "gelu": "tanh", "norm_eps": 1e-6},
    ),
    "siglip, a narrower text": (
        siglip(text={"hidden_size": 16, "projection_size": 32}), "hf_siglip", {"width": 16, "projection": "linear"}
    ),
    "siglip2": (siglip("Siglip2", NO_SIZE), "hf_siglip2", {"pool": "last"}),
}  # fmt: skip


@pytest.fixture
def tiny_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small architecture, which neither timm nor this program has."""
    keys = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 3, "class_token": False, "act_layer": "gelu"}
    keys |= {"global_pool": "map"}
    monkeypatch.setitem(ARCHITECTURES, "vit_tiny_siglip", ("VisionTransformer", keys))
    monkeypatch.setitem(library("timm.models")._registry._model_entrypoints, "vit_tiny_siglip", entrypoint(keys))


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in folder.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.mark.parametrize(("write", "kind", "seen"), CASES.values(), ids=CASES)
@pytest.mark.usefixtures("tiny_timm")
def test_there_and_back(write: Any, kind: str, seen: dict[str, Any], tmp_path: Path, capsys: Any) -> None:
    """By the command; the way back has the same tensors bit for bit, which the library loads strictly."""
    theirs, ours, back = (tmp_path / name for name in ("theirs", "ours", "back"))
    write(theirs)
    assert run("--to", "vitruvius", theirs, ours, "--verify") == 0
    assert run("--to", kind, ours, back, "--verify") == 0
    told = capsys.readouterr().out
    for what in ("images", "texts", "logits"):
        found = [line.split() for line in told.splitlines() if line.split()[:3] == [what, "largest", "difference"]]
        assert len(found) == 2 and all(float(words[3].rstrip(",")) < 1e-5 for words in found), told
    assert "carried" not in told
    before, after = tensors_of(theirs), tensors_of(back)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    model = ImageText.from_pretrained(ours)
    assert {key: getattr(model.text_config, key) for key in seen} == seen
    # a run of it: keys beside the weights
    config, _ = parse(["--config", str(ours / "config.yaml"), "--train.steps", "1"])
    assert config.objective == "contrastive"
    resolved = config.resolve(1)
    assert resolved.model == model._description.model and resolved.text == model.text_config
    assert (
        (resolved.contrastive.loss == "sigmoid") == (resolved.contrastive.bias is not None) == ("logit_bias" in before)
    )


@pytest.mark.usefixtures("tiny_timm")
def test_logits_differ_where_towers_do(tmp_path: Path, capsys: Any) -> None:
    """What is verified can fail: with one number of the text tower changed, logits are others."""
    open_clip()(tmp_path / "a")
    assert run("--to", "vitruvius", tmp_path / "a", tmp_path / "b") == 0
    changed = tensors_of(tmp_path / "a")
    changed["transformer.resblocks.1.mlp.c_fc.bias"][3] += 0.5
    save_file(changed, tmp_path / "a" / "open_clip_model.safetensors")
    with open_weights(tmp_path / "b", whole=True) as weights:
        inputs = verify.inputs_for(weights.description)
        ours, theirs = (
            verify.outputs(tmp_path / "b", "vitruvius", *inputs),
            verify.outputs(tmp_path / "a", "open_clip", *inputs),
        )
    found = {d.what: d.small for d in verify.differences(ours, theirs)}
    assert found == {"images": True, "texts": False, "logits": False}


def ours(tmp_path: Path, text: dict[str, Any], image: dict[str, Any], **keys: Any) -> ImageText:
    shape = {"width": 32, "depth": 1, "num_heads": 4, "image_size": 16, "patch_size": 8}
    words = {"width": 16, "depth": 1, "num_heads": 2, "context_length": 9, "vocabulary_size": 40, "end_token": 39}
    model = ImageText(
        ModelConfig(**shape | image),
        TextConfig(**words | text),
        **{"embedding": 12, **keys},  # type: ignore[arg-type]
    )
    random(model)
    return model.eval()


CLIP = {"norm_eps": 1e-5, "pre_norm": True, "patch_bias": False, "pool": "cls", "position": "learned_1d"}
OURS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "open_clip": ("open_clip", {"pool": "last", "attention": "full"}, CLIP, {"bias": -10.0}),
    "open_clip, beyond the bound": ("open_clip", {"gelu": "tanh"}, CLIP, {"max_logit_scale": 1.2}),
    "clip": ("hf_clip_vision", {}, CLIP | {"gelu": "quick"}, {}),
    "siglip of two tables": (
        "hf_siglip", {"pool": "last", "attention": "full", "projection": "linear"},
        {"position": "learned_2d", "pool": "map"}, {"projection": "none", "embedding": 32, "bias": -1.0},
    ),
    "siglip2, without a bias": (
        "hf_siglip2", {"pool": "last", "attention": "full", "projection": "linear", "projection_bias": True},
        {"position": "learned_1d", "pool": "map", "gelu": "tanh"}, {"projection": "none", "embedding": 32},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "image", "keys"), OURS.values(), ids=OURS)
def test_ours_for_them(kind: str, text: Any, image: Any, keys: Any, tmp_path: Path, capsys: Any) -> None:
    """Models that never were theirs: logits are equal, and it is read again as what it was."""
    model = ours(tmp_path, text, image, **keys)
    with torch.no_grad():
        model.get_parameter("pair.logit_scale").fill_(0.7)
    model.save_pretrained(tmp_path / "ours")
    code, told = run("--to", kind, tmp_path / "ours", tmp_path / "theirs", "--verify"), capsys.readouterr()
    bias = f", bias {model.get_parameter('pair.logit_bias').item():.4g}\n" if "bias" in keys else "\n"
    assert code == 0 and f"scale of logits {keys.get('max_logit_scale', 2.014)}{bias}" in told.out, told
    again = ImageText.from_pretrained(tmp_path / "theirs")
    texts = tokens(model.text_config)[:4]
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for a, b in zip(model(images, texts), again(images, texts), strict=True):
            assert (a - b).abs().max() < 1e-5


def test_from_texts(tmp_path: Path) -> None:
    """With the tokens that `data.tokenizer` makes by CLIP's vocabulary, and with those of open_clip's own tokenizer."""
    tokenizer = library("open_clip").tokenizer
    open_clip(text={"vocab_size": 49408})(tmp_path / "theirs")
    texts = [
        "a photo of a cat",
        "Schrödinger's  cat, twice &amp; alive",
        "a very long caption of more than nine tokens",
    ]
    own = make_tokenizer(tokenizer.default_bpe()).encode(texts, 9)
    other = tokenizer.SimpleTokenizer(context_length=9)(texts)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = verify.outputs(tmp_path / "theirs", "vitruvius", images, torch.from_numpy(own))
    expected = verify.outputs(tmp_path / "theirs", "open_clip", images, other)
    assert all(d.small for d in verify.differences(found, expected)) and found.logits is not None
    assert found.logits.std() > 1e-3


def test_towers_alone(tmp_path: Path, capsys: Any) -> None:
    """The image tower of two, of theirs and of ours; where there is one only, nothing changes; what would be lost is
    refused."""
    open_clip()(tmp_path / "theirs")
    assert run("--to", "vitruvius", "--towers", "image", tmp_path / "theirs", tmp_path / "image") == 0
    assert run("--to", "vitruvius", tmp_path / "theirs", tmp_path / "both") == 0
    assert run("--to", "vitruvius", "--towers", "image", tmp_path / "both", tmp_path / "again") == 0
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    models = [VisionTransformer.from_pretrained(tmp_path / name) for name in ("theirs", "image", "both", "again")]
    with torch.no_grad():
        outputs = [model(images) for model in models]
        embedded = ImageText.from_pretrained(tmp_path / "both").encode_image(images)
    assert all(torch.equal(outputs[0], other) for other in (*outputs[1:], embedded)) and outputs[0].shape == (2, 12)
    assert all(model.embeds for model in models)
    for name, why in (("image", "has one tower"), ("again", "has one tower")):
        with pytest.raises(ConversionError, match=why):
            run("--to", "vitruvius", "--towers", "both", tmp_path / name, tmp_path / "new")
        with pytest.raises(ConversionError, match="without a text tower"):
            ImageText.from_pretrained(tmp_path / name)
    with pytest.raises(ConversionError, match=r"timm has no text tower.*--towers image"):
        run("--to", "timm", tmp_path / "both", tmp_path / "new")
    with pytest.raises(ConversionError, match="no place for what came from open_clip"):
        run("--to", "timm", tmp_path / "theirs", tmp_path / "new")


def test_refused(tmp_path: Path) -> None:
    """What this program's text tower is not, by its key; towers that do not join; what is missing."""
    known = library("open_clip.model").CLIPTextCfg.__dataclass_fields__
    assert set(known) == {*open_clip_text.READ, *open_clip_text.REFUSED, *open_clip_text.KNOWN}
    open_clip()(tmp_path / "theirs")
    file = tmp_path / "theirs" / "open_clip_config.json"
    whole = json.loads(file.read_text())

    def refused(match: str, text: dict[str, Any] | None = None, **model: Any) -> None:
        changed = whole["model_cfg"] | {"text_cfg": WORDS | (text or {})} | model
        file.write_text(json.dumps({"model_cfg": changed}))
        with pytest.raises(ConversionError, match=match) as error, open_weights(tmp_path / "theirs", whole=True):
            pass
        assert "--towers image" in str(error.value) or "does not have the tensors" in str(error.value)

    for key, value in {
        "embed_cls": True, "qk_norm": True, "scale_heads": True, "hf_model_name": "roberta-base", "pool_type": "first",
        "proj_type": "mlp", "act_kwargs": {"inplace": True}, "norm_kwargs": {"bias": False}, "new_key": 1,
    }.items():  # fmt: skip
        refused(f"text_cfg.{key}", {key: value})
    refused("multimodal_cfg", multimodal_cfg={"width": 8})
    refused("do not join: texts have 16 features", {"proj_type": "none"})
    refused("no logit_bias", init_logit_bias=-10.0)
    refused(r"should be \[9, 40\]|should be \[40, 20\]", {"width": 20})
    refused(r"resblocks.1.ln_1.weight \[16\]: of no use", {"layers": 1})
    file.unlink()
    with pytest.raises(ConversionError, match="--source_config"), open_weights(tmp_path / "theirs", whole=True):
        pass


def test_refused_of_transformers(tmp_path: Path) -> None:
    siglip(text={"projection_size": 16})(tmp_path / "apart")
    clip({"eos_token_id": 39})(tmp_path / "clip")
    with pytest.raises(ConversionError, match="images have 32 features, and are to be compared in 16"):
        ImageText.from_pretrained(tmp_path / "apart")
    file = tmp_path / "clip" / "config.json"
    whole = json.loads(file.read_text())
    for values, why in (
        ({"text_config": whole["text_config"] | {"rope_theta": 3.0}}, "rope_theta of config.json, text_config"),
        ({"text_config": whole["text_config"] | {"eos_token_id": [1, 2]}}, r"eos_token_id \[1, 2\]"),
        ({"text_config": whole["text_config"] | {"hidden_act": "relu"}}, "'relu' is no activation"),
        ({"text_config": whole["text_config"] | {"num_attention_heads": 5}}, "text.num_heads 5"),
        ({"text_config_dict": {"vocab_size": 41}}, "end_token is 49407, but text.vocabulary_size 41"),
        ({"model_type": "metaclip_2"}, r"model_type of config.json is 'metaclip_2': .* 'clip', .* --towers image"),
    ):
        file.write_text(json.dumps(whole | values))
        with pytest.raises(ConversionError, match=why):
            ImageText.from_pretrained(tmp_path / "clip")


def test_ours_that_they_have_not(tmp_path: Path) -> None:
    """By key, for every kind: nothing is written."""
    last = {"pool": "last", "attention": "full", "projection": "linear"}
    probe = {"position": "learned_1d", "pool": "map"}
    none = {"projection": "none", "embedding": 32}
    cases: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
        ("open_clip", {"pool": "mean"}, CLIP, {}, "text.pool is mean"),
        ("open_clip", {"projection": "mlp"}, CLIP, {}, "text.projection is mlp"),
        ("open_clip", {"qkv_bias": "none"}, CLIP, {}, "text.qkv_bias is none"),
        ("open_clip", {"depth": 2, "attention": "[causal, full]"}, CLIP, {}, "text.attention is causal, full"),
        ("open_clip", {}, CLIP, {"projection_bias": True}, "contrastive.projection_bias is true"),
        ("open_clip", {"gelu": "quick"}, CLIP, {}, "model.gelu is erf and text.gelu quick"),
        ("open_clip", {}, CLIP | {"patch_bias": True}, {}, "model.patch_bias is true"),
        ("hf_clip_vision", {"attention": "full"}, CLIP, {}, "text.attention is full"),
        ("hf_clip_vision", {}, CLIP, {"bias": -10.0}, "contrastive.bias is -10"),
        ("hf_clip_vision", {"end_token": 2}, CLIP, {}, "text.end_token is 2"),
        ("hf_clip_vision", {"projection_bias": True}, CLIP, {}, "text.projection_bias is true"),
        ("hf_siglip", last, probe, {}, "contrastive.projection is linear"),
        ("hf_siglip", last, {"position": "learned_1d", "pool": "gap"}, none, "model.pool is gap"),
        ("timm", last, probe, none, "timm has no text tower"),
    ]  # fmt: skip
    for kind, text, image, keys, why in cases:
        with pytest.raises(ConversionError, match=why):
            ours(tmp_path, text, image, **keys).save_pretrained(tmp_path / "new", kind)
    assert not list(tmp_path.iterdir())
    assert set(PAIRS) == {"open_clip", "hf_clip_vision", "hf_siglip", "hf_siglip2"}


def test_numbers_go_with_them(tmp_path: Path) -> None:
    """A scale beyond CLIP's bound counts as it is, here too, and keeps its shape, of which open_clip takes either; what
    a run has beside its weights is not lost.
    """
    open_clip()(tmp_path / "theirs")
    tensors = tensors_of(tmp_path / "theirs")
    save_file(tensors | {"logit_scale": torch.tensor([4.7])}, tmp_path / "theirs" / "open_clip_model.safetensors")
    assert run("--to", "vitruvius", tmp_path / "theirs", tmp_path / "ours", "--verify") == 0
    assert run("--to", "open_clip", tmp_path / "ours", tmp_path / "back", "--verify") == 0
    assert tensors_of(tmp_path / "back")["logit_scale"].equal(torch.tensor([4.7]))
    with open_weights(tmp_path / "ours", whole=True) as weights:
        pairing = weights.description.pairing
        assert pairing is not None and 109 < pairing.max_logit_scale < 110
        weights.description = replace(weights.description, origin=None)
        save_weights(weights, tmp_path / "new", "open_clip", dtype=torch.bfloat16)
    assert {x.dtype for x in tensors_of(tmp_path / "new").values()} == {torch.bfloat16}
