"""timm's Vision Transformers, each made, saved and loaded by timm itself, against ours."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from model import ModelConfig, VisionTransformer
from model.formats.api import open_weights, save_weights
from model.formats.base import ConversionError
from model.formats.rules import expected
from model.formats.timm import arguments, hiera, images, swin, vit
from model.formats.timm.architectures import ARCHITECTURES
from model.formats.timm.arguments import DEFAULTS, HIERA, SWIN, VIT, constructor_of
from model.formats.timm.format import Timm
from model.layers import logical_shapes
from tests.model.formats import timm_models
from tests.model.formats.timm_models import checked, library, randomised, saved
from tools.convert.__main__ import main
from tools.convert.runners import RUNNERS
from tools.convert.runners.timm import load

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
CASES: dict[str, tuple[str, Mapping[str, Any]]] = {
    "augreg": ("vit_base_patch16_224", {}),
    "rectangle": ("vit_base_patch16_224", {"img_size": (32, 48), "patch_size": (8, 8), "in_chans": 1}),
    "no positions": ("vit_base_patch16_224", {"pos_embed": "none", "num_classes": 0}),
    "mae": ("vit_base_patch16_224", {"global_pool": "avg"}),
    "mean, norm before": ("vit_base_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "no biases": ("vit_base_patch16_224", {"qkv_bias": False, "proj_bias": False}),
    "qk norm": ("vit_base_patch16_224", {"qk_norm": True, "norm_layer": "rmsnorm"}),
    "qk norm with bias": ("vit_base_patch16_224", {"qk_norm": True}),
    "registers with positions": ("vit_base_patch16_224", {"reg_tokens": 3}),
    "dinov2": ("vit_base_patch14_reg4_dinov2", {"num_classes": 0}),
    "dinov2 giant": ("vit_giant_patch14_dinov2", {}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {}),
    "deit 3": ("deit3_base_patch16_224", {"init_values": 1e-2}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "siglip 2": ("vit_giantopt_patch16_siglip_256", {}),
    "siglip so400m/14 at 384": ("vit_so400m_patch14_siglip_384", {"img_size": 35}),
    "siglip, mean": ("vit_base_patch16_siglip_gap_224", {}),
    "so150m": ("vit_so150m2_patch16_reg1_gap_256", {}),
    "map over all tokens": ("test_vit3", {}),
    "xp": ("vit_base_patch16_xp_224", {}),
    "pwee": ("vit_pwee_patch16_reg1_gap_256", {"qk_norm": True}),
}
_SUMMED = ("attn_out_proj.bias", "mlp_out_proj.bias", "reg_token", "pos_embed")  # the same sums, not the same terms


@pytest.mark.parametrize("case", CASES)
def test_timm_saves_and_loads(case: str, tmp_path: Path) -> None:
    architecture, changed = CASES[case]
    saved(randomised(architecture, {**TINY, **changed}), tmp_path / "theirs")
    checked(
        tmp_path,
        summed=_SUMMED if case in ("xp", "pwee", "so150m", "registers with positions", "map over all tokens") else (),
    )


def test_models_that_never_came_from_timm(tmp_path: Path) -> None:
    """The recipe of ViT-22B is timm's ParallelScalingBlock; and what else timm has."""
    tiny = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 40, "num_classes": 3}
    models = {
        "vit_22b": {"preset": "vit_22b"},
        "sines": {"position": "sincos_2d", "pool": "cls", "registers": 2, "norm_bias": False},
        "no key bias": {"position": "learned_1d", "qkv_bias": "qv", "pool": "map", "registers": 1, "gelu": "quick"},
        "swiglu": {"position": "learned_1d", "mlp": "swiglu", "pool": "gap", "norm": "rmsnorm", "layer_scale": 0.1},
        "clip's epsilon": {"position": "none", "norm_eps": 1e-5, "pool": "cls", "classifier_bias": False},
    }
    for name, keys in models.items():
        model = VisionTransformer(ModelConfig(**{**tiny, **keys})).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        model.save_pretrained(tmp_path / name, "timm")
        images = torch.randn(2, 3, 16, 16)
        config = json.loads((tmp_path / name / "config.json").read_text())
        direct = (
            library("timm")
            .create_model(
                config["architecture"], **config["model_args"], checkpoint_path=tmp_path / name / "model.safetensors"
            )
            .eval()
        )
        with torch.no_grad():
            ours = model(images)
            torch.testing.assert_close(direct(images), ours, rtol=0, atol=1e-5, msg=name)
            logits = RUNNERS["timm"](tmp_path / name, images).logits
            assert logits is not None
            torch.testing.assert_close(logits, ours, rtol=0, atol=1e-5, msg=name)
        if name == "vit_22b":
            assert type(direct.blocks[0]).__name__ == "ParallelScalingBlock"


def test_bare_files(tmp_path: Path) -> None:
    """Shapes tell what they can, and the rest is asked for, not guessed."""
    model = randomised("deit3_base_patch16_224", {**TINY, "qk_norm": True, "reg_tokens": 2})
    file = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, file)
    with pytest.raises(ConversionError, match=r"--model.norm_eps .*--model.gelu .*--model.pool "):
        open_weights(file).__enter__()
    given = {"norm_eps": 1e-6, "gelu": "erf", "pool": "cls"}
    with open_weights(file, given=given) as weights:
        found = weights.description.model
        save_weights(weights, tmp_path / "again", "timm")
    assert (found.num_heads, found.image, found.class_position, found.registers) == (2, (32, 32), False, 2)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "again").eval()(images), model(images), rtol=0, atol=1e-6)
    torch.save(randomised("vit_base_patch16_224", TINY).state_dict(), file)
    for missing in ("num_heads", "pool"):
        keys = {k: v for k, v in {**given, "num_heads": 2}.items() if k != missing}
        with pytest.raises(ConversionError, match=f"--model.{missing}"):
            open_weights(file, given=keys).__enter__()
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"architecture": "vit_base_patch16_224", "num_classes": 5, "model_args": TINY}))
    with open_weights(file, config=config) as weights:
        assert (weights.description.model.norm_eps, weights.description.preprocessing) == (1e-6, None)
    for names in ("blocks.0.attns.0.qkv.weight", "blocks.0.attn.q_proj.weight", "blocks.0.attn.rel_pos_h"):
        torch.save({**model.state_dict(), names: torch.zeros(2)}, file)
        config.unlink(missing_ok=True)
        with pytest.raises(ConversionError, match="is not read"):
            open_weights(file, given=given).__enter__()


def test_a_bare_file_is_verified_with_what_was_said_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, config = tmp_path / "weights.pth", tmp_path / "other.json"
    torch.save(randomised("vit_base_patch16_224", TINY).state_dict(), file)
    config.write_text(json.dumps({"architecture": "vit_base_patch16_224", "model_args": TINY}))
    keys = {"num_heads": "2", "norm_eps": "1e-6", "gelu": "erf", "pool": "cls"}
    ways = ([f"--model.{k}={v}" for k, v in keys.items()], ["--source_config", str(config)])
    for i, flags in enumerate(ways):
        assert main(["--to", "vitruvius", str(file), str(tmp_path / f"ours{i}"), "--verify", *flags]) == 0
        assert "timm and vitruvius" in capsys.readouterr().out


# -- every architecture ------------------------------------------------------------------------------------------------


def test_the_table_is_what_timm_has() -> None:
    found = {
        name: (cls.__name__, timm_models.plain(cls, given))
        for module in timm_models.OURS
        for name, cls, given in timm_models.entry_points(module)
    }
    assert found == ARCHITECTURES, "python -m tests.model.formats.timm_models > model/formats/timm/architectures.py"


def test_every_argument_of_the_constructors_is_known() -> None:
    for module in timm_models.OURS:
        for cls in {cls for _, cls, _ in timm_models.entry_points(module)}:
            named = set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}
            assert named <= {*DEFAULTS[cls.__name__], *arguments._NO_MATTER}, cls


def test_every_architecture_is_read_or_refused_by_name() -> None:
    """Built on the meta device, one block deep: the tensors that we expect, norms and activations as we have them."""
    refused, done = set(), set()
    for module in timm_models.OURS:
        for name, cls, given in timm_models.entry_points(module):
            made = constructor_of({"architecture": name, "pretrained_cfg": timm_models.published(name)})
            family = {SWIN: swin, HIERA: hiera}.get(cls.__name__, vit)
            try:
                family.model_of(made)
            except ConversionError as error:
                assert any(key in str(error) for key in (*ARCHITECTURES[name][1], "q_pool")), name
                refused.add(name)
                continue
            few = {"depth": 1, "embed_dim": 24 * 16, "num_heads": 8} if family is vit else {"depths": (2, 2, 2, 2)}
            few |= {"img_size": made["img_size"], "num_classes": made["num_classes"], "in_chans": made["in_chans"]}
            alike = str(sorted((k, str(v)) for k, v in given.items() if k not in few))
            if alike not in done:
                done.add(alike)
                _compare(cls, given | few, replace(made, arguments={**made.arguments, **few}))
    assert refused == {name for name in ARCHITECTURES if name.startswith(("aimv2", "beit3", "hiera"))} | {
        "vit_base_patch16_18x2_224", "vit_small_patch16_18x2_224", "vit_base_patch16_rpn_224",
        "vit_intern300m_patch14_448", "vit_dlittle_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256",
        "vit_dwee_patch16_reg1_gap_256", "vit_so150m_patch16_reg4_map_256",
        *(name for name in ARCHITECTURES if "_radio_" in name),
    }  # fmt: skip


def _compare(cls: type, given: Mapping[str, Any], made: arguments.Constructor) -> None:
    nn = torch.nn
    theirs = cls(**given, device="meta", weight_init="skip")
    family = swin if cls.__name__ == SWIN else vit
    ours = family.model_of(made)
    wanted = expected(family.rules(ours, made), logical_shapes(ours))
    assert {n: tuple(x.shape) for n, x in theirs.state_dict().items()} == wanted
    norms = [m for m in theirs.modules() if "Norm" in type(m).__name__]
    assert {m.eps for m in norms} == {ours.norm_eps}
    acts = {type(m) for m in theirs.modules() if type(m).__name__ in ("GELU", "GELUTanh", "QuickGELU", "SiLU")}
    gelu = {"erf": nn.GELU, "tanh": library("timm.layers").GELUTanh, "quick": library("timm.layers").QuickGELU}
    assert acts == {nn.SiLU if ours.mlp == "swiglu" else gelu[str(ours.gelu)]}
    heads = {m.num_heads for m in theirs.modules() if hasattr(m, "num_heads")}
    assert heads == {s.heads for s in ours.sizes.stages}


@pytest.mark.parametrize("module", timm_models.OTHERS)
def test_models_of_other_classes_are_refused_by_name(module: str) -> None:
    for name, *_ in timm_models.entry_points(module):
        with pytest.raises(ConversionError, match=name):
            constructor_of({"architecture": name})


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"scale_attn_norm": True}, "scale_attn_norm"),
        ({"final_norm": False}, "final_norm"),
        ({"global_pool": "avgmax"}, "global_pool"),
        ({"global_pool": "prr"}, "global_pool"),
        ({"global_pool": ""}, "global_pool"),
        ({"act_layer": "relu"}, "act_layer"),
        ({"norm_layer": "simplenorm"}, "norm_layer"),
        ({"embed_norm_layer": "layernorm"}, "embed_norm_layer"),
        ({"attn_layer": "diff"}, "attn_layer"),
        ({"patch_size": [16, 8]}, "patch_size"),
        ({"dynamic_img_pad": True, "img_size": 230}, "dynamic_img_pad"),
        ({"reg_tokens": 2, "global_pool": "map"}, "pool_include_prefix"),
        ({"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
        ({"global_pool": "map", "class_token": False, "norm_layer": "rmsnorm"}, "rmsnorm"),
        ({"features_only": True}, "features_only"),
        ({"use_naflex": True}, "use_naflex"),
        ({"attn_gate": True}, "attn_gate"),
    ],
)
def test_arguments_that_our_model_has_not_are_refused_by_name(changed: Mapping[str, Any], named: str) -> None:
    config = {"architecture": "vit_base_patch16_224", "model_args": changed}
    with pytest.raises(ConversionError, match=named):
        vit.model_of(constructor_of(config))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"position": "rope_2d"}, "model.position"),
        ({"norm_eps": 1e-12}, "model.norm_eps"),
        ({"pool": "cls_gap"}, "model.pool"),
        ({"attention": "window", "window_size": 2}, "model.attention"),
        ({"image_size": 15}, "model.image_size"),
        ({"pre_norm": True}, "model.patch_bias"),
        ({"mlp": "swiglu", "pool": "map"}, "model.mlp"),
        ({"norm": "rmsnorm", "pool": "map"}, "model.norm"),
        ({"mlp": "swiglu", "block": "parallel"}, "model.mlp"),
        ({"qk_norm": True, "qk_norm_over": "width"}, "model.qk_norm_over"),
        ({"global_tokens": 1, "attention": "global_tokens"}, "global_tokens"),
        ({"class_tokens": 2, "class_position": False}, "model.class_tokens"),
        ({"class_tokens": 2, "registers": 1}, "model.class_tokens"),
    ],
)
def test_models_that_timm_has_not_are_refused_by_name(changed: Mapping[str, Any], named: str, tmp_path: Path) -> None:
    keys = {
        "image_size": 16,
        "patch_size": 4,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "position": "learned_1d",
        "pool": "cls",
    }
    model = VisionTransformer(ModelConfig(**{**keys, **changed}))
    with pytest.raises(ConversionError, match=named):
        model.save_pretrained(tmp_path / "there", "timm")
    assert not (tmp_path / "there").exists()


# -- published models --------------------------------------------------------------------------------------------------


def _hub(architecture: str, pool: str, size: int, **more: Any) -> dict[str, Any]:
    """A config.json as timm's own models have it on the Hub."""
    images = {"input_size": [3, size, size], "fixed_input_size": True, "interpolation": "bicubic", "num_classes": 0}
    classes = more.pop("num_classes", 0)
    return {"architecture": architecture, "num_classes": classes, "global_pool": pool, "pretrained_cfg": images | more}


def test_published_configs() -> None:
    published = {
        "vit_base_patch16_224.augreg2_in21k_ft_in1k": (
            _hub("vit_base_patch16_224", "token", 224, num_classes=1000, crop_pct=0.9, mean=[0.5] * 3, std=[0.5] * 3),
            {"image_size": 224, "pool": "cls", "class_position": True, "norm_eps": 1e-6, "num_classes": 1000},
        ),
        "vit_so400m_patch14_siglip_384.webli": (
            _hub("vit_so400m_patch14_siglip_384", "map", 384, crop_mode="squash", crop_pct=1.0),
            {"image_size": 378, "pool": "map", "class_tokens": 0, "mlp_dim": 4304, "gelu": "erf"},
        ),
        "vit_large_patch14_clip_336.openai": (
            _hub("vit_large_patch14_clip_quickgelu_336", "token", 336),
            {"pre_norm": True, "patch_bias": False, "gelu": "quick", "norm_eps": 1e-5},
        ),
        "vit_giant_patch14_reg4_dinov2.lvd142m": (
            _hub("vit_giant_patch14_reg4_dinov2", "token", 518),
            {"mlp": "swiglu", "mlp_dim": 4096, "registers": 4, "class_position": False, "image_size": 518},
        ),
        "swin_large_patch4_window12_384.ms_in22k": (
            _hub("swin_large_patch4_window12_384", "avg", 384, num_classes=21841),
            {"norm_eps": 1e-5, "relative_position": True, "pre_norm": True, "position": "none"},
        ),
    }  # fmt: skip
    for name, (config, keys) in published.items():
        model = Timm().describe(_Nothing({"config.json": config}), {}).model
        assert {key: getattr(model, key) for key in keys} == keys, name


def test_images_of_all_published_weights_are_prepared_as_ours_can() -> None:
    registry, count = library("timm.models._registry"), 0
    for name, found in registry._model_pretrained_cfgs.items():
        if (architecture := name.partition(".")[0]) in ARCHITECTURES:
            config = {"architecture": architecture, "pretrained_cfg": found.to_dict()}
            p = images.preprocessing_of(config, constructor_of(config))
            assert p is not None
            assert (p.mean, p.std, p.interpolation) == (tuple(found.mean), tuple(found.std), found.interpolation), name
            count += 1
    assert count > 200


class _Nothing:
    """A source without tensors."""

    path, shards = Path("published"), ()

    def __init__(self, files: Mapping[str, Any]) -> None:
        self.files, self.tensors = files, {}

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        raise AssertionError(name)


@pytest.mark.parametrize(
    "changed", [{"reg_tokens": 1}, {"no_embed_class": True}, {"global_pool": "avg"}, {"pos_embed": ""}]
)
def test_distilled_models_that_are_none_are_refused_by_name(changed: Mapping[str, Any]) -> None:
    made = constructor_of({"architecture": "deit_tiny_distilled_patch16_224", "model_args": changed})
    with pytest.raises(ConversionError, match=next(iter(changed)).replace("global_pool", "pooling")):
        vit.model_of(made)


def test_what_config_json_says_twice_must_agree() -> None:
    config = {"architecture": "vit_base_patch16_224", "global_pool": "avg"}
    with pytest.raises(ConversionError, match="global_pool avg"):
        constructor_of(config)
    assert constructor_of(config | {"model_args": {"global_pool": "avg"}})["global_pool"] == "avg"
    assert (
        constructor_of({"architecture": "vit_base_patch16_clip_224", "model_args": {"norm_layer": "LayerNorm"}})[
            "norm_eps"
        ]
        == 1e-6
    )


def test_a_fine_tuned_model_keeps_its_architecture(tmp_path: Path) -> None:
    saved(randomised("vit_base_patch16_siglip_224", TINY), tmp_path / "theirs")
    with open_weights(tmp_path / "theirs") as weights:
        m = VisionTransformer.from_pretrained(tmp_path / "theirs")
        assert m.preprocessing is not None and weights.description.origin is not None
        description = replace(weights.description, model=replace(weights.description.model, num_classes=7).resolve())
    config = Timm().files(description)["config.json"]
    assert (config["architecture"], config["model_args"]["num_classes"]) == ("vit_base_patch16_siglip_224", 7)
    assert constructor_of(config).name == VIT and load_file(tmp_path / "theirs" / "model.safetensors")
