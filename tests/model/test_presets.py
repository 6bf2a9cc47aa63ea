"""Parameter counts against published numbers, on the meta device: nothing is allocated."""

from functools import cache

import pytest
import torch

from model import PRESETS, Build, LayerSpec, ModelConfig, build_layers, training_flops


@cache
def _layers(preset: str, num_classes: int = 1000) -> list[LayerSpec]:
    return build_layers(ModelConfig(preset=preset, num_classes=num_classes).resolve())


def _parameters(preset: str, num_classes: int = 1000) -> int:
    return sum(layer.parameters for layer in _layers(preset, num_classes))


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("vit_ti16", 5_717_416),
        ("vit_s16", 22_050_664),
        ("vit_b16", 86_567_656),
        ("vit_l16", 304_326_632),
        ("vit_h14", 632_045_800),
    ],
)
def test_exactly_as_in_timm(preset: str, published: int) -> None:
    assert _parameters(preset) == published


@pytest.mark.parametrize(("preset", "millions"), [("vit_g14", 1012.61), ("vit_gg14", 1844.44)])
def test_large_ones_to_the_digits_of_timms_tables(preset: str, millions: float) -> None:
    assert round(_parameters(preset) / 1e6, 2) == millions


def test_vit_e() -> None:
    """Chen et al. 2022: 3926 M parameters with the head of its JFT classes."""
    assert _parameters("vit_e14", 29_593) / 1e6 == pytest.approx(3926, rel=0.01)


def test_vit_22b() -> None:
    """Dehghani et al. 2023: 48 blocks of 12 D^2 parameters in matrices, and what else the paper says of them."""
    layers = {layer.name: layer for layer in _layers("vit_22b")}
    config = ModelConfig(preset="vit_22b").resolve()
    block = layers["blocks.47"].factory(Build(config=config))
    sizes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    width, mlp, head_dim = 6144, 24576, 128
    assert sizes == {
        "norm.weight": (width,),  # no bias on LayerNorms and q, k, v
        "in_proj.weight": (3 * width + mlp, width),
        "core.q_norm.weight": (head_dim,),
        "core.k_norm.weight": (head_dim,),
        "fc1_bias": (mlp,),
        "out_proj.weight": (width, width + mlp),
        "out_proj.bias": (width,),
    }
    matrices = 48 * sum(p.numel() for p in block.parameters() if p.dim() == 2)
    assert round(matrices / 1e6) == 21_743
    assert _parameters("vit_22b") / 1e9 == pytest.approx(22, rel=0.02)
    assert layers["blocks.0"].output == (256, width)  # tokens, no class token
    assert layers["head"].output == (1, 1000)


def test_training_flops() -> None:
    """6 per matrix parameter and token, 12 per layer, width and pair of tokens: 33.63 TFLOP for ViT-22B's blocks."""
    blocks = [layer for layer in _layers("vit_22b") if layer.name.startswith("blocks.")]
    flops = training_flops(blocks)
    assert flops == 6 * 48 * 12 * 6144**2 * 256 + 12 * 48 * 6144 * 256**2
    assert round(flops / 1e12, 2) == 33.63
    forward = sum(layer.flops for layer in _layers("vit_b16")) / 2e9  # multiply-adds, as most tables count
    assert forward == pytest.approx(17.56, rel=0.01)


def test_internvit_6b() -> None:
    """Chen et al. 2023: 5903 M parameters at 224 pixels, without a head; 48 blocks, whose QK norms span 25 heads."""
    config = ModelConfig(preset="internvit_6b", image_size=224).resolve()
    layers = build_layers(config)[:-1]
    assert round(sum(layer.parameters for layer in layers) / 1e6) == 5903
    block = layers[1].factory(Build(config=config))
    assert {p.numel() for name, p in block.named_parameters() if "q_norm" in name or "k_norm" in name} == {3200}
    assert {stage.heads for stage in config.sizes.stages} == {25}


def test_dinov3_7b() -> None:
    """Siméoni et al. 2025: 6716 M parameters without a head; 40 blocks, gated MLP, 4 registers."""
    layers = _layers("dinov3_7b")
    assert round(sum(layer.parameters for layer in layers[:-1]) / 1e6) == 6716
    assert layers[0].output == (1 + 4 + 16 * 16, 4096)


def test_swin_t() -> None:
    """Liu et al. 2021."""
    assert _parameters("swin_t") == 28_288_354
    forward = sum(layer.flops for layer in _layers("swin_t")) / 2e9
    assert forward == pytest.approx(4.5, rel=0.01)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_list_of_layers(preset: str) -> None:
    """Names, and shapes after each layer, from the preset's own numbers."""
    values, config, layers = PRESETS[preset], ModelConfig(preset=preset).resolve(), _layers(preset)
    stages = values.get("stages", [{key: values.get(key) for key in ("depth", "width", "num_heads")}])
    prefix = (config.pool == "cls") + values.get("registers", 0)
    side, names, shapes, done = values["image_size"] // values["patch_size"], ["embed"], [], 0
    for i, stage in enumerate(stages):
        names += [f"merges.{i - 1}"] * (i > 0) + [f"blocks.{done + j}" for j in range(stage["depth"])]
        shapes += [(prefix + side**2, stage["width"])] * (1 + stage["depth"])
        side, done = side // 2, done + stage["depth"]
        assert stage["width"] % stage["num_heads"] == 0
    assert [layer.name for layer in layers] == [*names, "head"]
    assert [layer.output for layer in layers] == [*shapes, (1, 1000)]
    for key, value in values.items():
        assert key == "stages" or getattr(config, key) == value
    assert config.qk_norm is (preset in ("vit_22b", "internvit_6b"))
    assert config.bias is (preset not in ("vit_22b", "internvit_6b"))
    assert all(p.device == torch.device("meta") for p in layers[0].factory(Build(config=config)).parameters())
