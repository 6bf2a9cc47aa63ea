"""What a model's configuration resolves to, and each mistake in one line that names key, value and cure."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from model import PRESETS, Build, ModelConfig, StageConfig, build_layers, check_parallel
from tests.model.small import TINY

STAGES = (
    StageConfig(depth=2, width=16, num_heads=4),
    StageConfig(depth=1, width=24, num_heads=2),
    StageConfig(depth=1, width=24, num_heads=3, mlp_dim=10),
)
NAMED = tuple(replace(stage, attention="full") for stage in STAGES)
PYRAMID = ModelConfig(stages=STAGES, image_size=32, patch_size=2, num_classes=5)


def with_stage(index: int, **changes: Any) -> dict[str, Any]:
    """The pyramid with a stage changed, as changes of TINY."""
    stages = [replace(s, **changes) if i == index else s for i, s in enumerate(STAGES)]
    return {"width": None, "depth": None, "num_heads": None, "stages": tuple(stages)}


def test_resolve_fills_in() -> None:
    resolved = ModelConfig(preset="vit_b16", image_size=384, depth=3).resolve()
    assert (resolved.width, resolved.depth, resolved.image_size, resolved.pool) == (768, 3, 384, "cls")
    assert TINY.resolve().mlp_dim == 64
    assert (TINY.resolve().window_size, TINY.resolve().grid_size) == (7, 7)
    pools = ("map", "gap", "cls", "cls_gap")
    assert [replace(TINY, pool=pool).resolve().class_tokens for pool in pools] == [0, 0, 1, 1]
    assert replace(TINY, window_size=4, attention="window").resolve().grid_size == 4
    assert TINY.resolve().norm_eps == 1e-6


@pytest.mark.parametrize(
    ("given", "norm_bias", "qkv_bias"),
    [
        ({}, True, "all"),
        ({"bias": False}, False, "none"),
        ({"bias": False, "norm_bias": True}, True, "none"),
        ({"qkv_bias": "qv"}, True, "qv"),
        ({"qkv_bias": "none", "norm_bias": False}, False, "none"),
    ],
    ids=str,
)
def test_which_biases(given: dict[str, Any], norm_bias: bool, qkv_bias: str) -> None:
    config = replace(TINY, **given).resolve()
    assert (config.norm_bias, config.qkv_bias) == (norm_bias, qkv_bias)
    heads = {"all": 3, "qv": 2, "none": 0}[qkv_bias]
    for block, own in (("sequential", 0), ("parallel", 64)):
        layers = {layer.name: layer for layer in build_layers(replace(config, block=block))}
        parameters = dict(layers["blocks.0"].factory(Build(config=replace(config, block=block))).named_parameters())
        name = "attn.qkv.bias" if block == "sequential" else "in_proj.bias"
        assert (parameters[name].shape[0] if name in parameters else own) == 16 * heads + own
        assert any("norm" in key and key.endswith("bias") for key in parameters) is norm_bias


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(preset="vit_b16", image_size=384, depth=3),
        TINY,
        PYRAMID,
        replace(PYRAMID, grid_size=2, attention="grid"),
        replace(TINY, window_size=4, attention="grid"),  # the grid's, too
        ModelConfig(preset="hiera_b", attention="full"),  # the preset's windows are not the user's
        ModelConfig(preset="hiera_b", attention="grid", window_size=3),
        ModelConfig(preset="vit_22b", mlp="swiglu", pool="gap"),  # nor is its GELU
        ModelConfig(preset="dinov3_7b", position="learned_2d"),
        replace(TINY, bias=False, qkv_bias="all"),
        ModelConfig(
            preset="vit_22b", norm_bias=True, qkv_bias="qv"
        ),  # whose bias then says nothing, but is the preset's
        ModelConfig(preset="internvit_6b", bias=True, norm_eps=1e-5),
        replace(TINY, pool="cls", class_tokens=2, position="learned_1d", class_position=False, classifier_bias=False),
        replace(TINY, pool="cls_gap", num_classes=0, pre_norm=True, norm_after_pool=True, patch_bias=False),
        replace(TINY, pool="gap", class_tokens=1, position="none", gelu="quick"),
        ModelConfig(preset="internvit_6b", qk_norm=False),
        ModelConfig(preset="swin_t", relative_position=False),
    ],
    ids=str,
)
def test_what_is_resolved_resolves_to_itself(config: ModelConfig) -> None:
    assert config.resolve().resolve() == config.resolve()


def test_what_stages_take_from_the_model() -> None:
    own: list[dict[str, Any]] = [{}, {"window_size": 3}, {"window_size": 3, "grid_size": 5}]
    stages = tuple(StageConfig(depth=2, width=8, num_heads=2, attention="window, grid", **changes) for changes in own)

    def sides(**changes: Any) -> list[tuple[int, int]]:
        config = replace(PYRAMID, stages=stages, **changes).resolve()
        return [(stage.window, stage.grid) for stage in config.sizes.stages]

    assert sides() == [(7, 7), (3, 3), (3, 5)]  # a grid goes by the window, unless one is given
    assert sides(window_size=4) == [(4, 4), (3, 3), (3, 5)]
    assert sides(grid_size=2) == [(7, 2), (3, 2), (3, 5)]
    resolved = PYRAMID.resolve()
    assert resolved.width is resolved.depth is resolved.num_heads is resolved.mlp_dim is None
    assert [stage.mlp for stage in resolved.sizes.stages] == [64, 96, 10]


def test_kinds_of_attention() -> None:
    def kinds(base: ModelConfig, **changes: Any) -> list[tuple[str, ...]]:
        return [stage.kinds for stage in replace(base, **changes).resolve().sizes.stages]

    assert kinds(TINY) == [("full", "full")]
    assert kinds(TINY, attention="window, linear") == kinds(TINY, attention=("window", "linear")) == [
        ("window", "linear")
    ]  # fmt: skip
    assert kinds(PYRAMID, attention="grid") == [("grid", "grid"), ("grid",), ("grid",)]
    assert kinds(PYRAMID, attention="[window, full] * 2") == [("window", "full"), ("window",), ("full",)]
    stages = with_stage(0, attention="linear, full")["stages"]  # the others share model.attention
    assert kinds(PYRAMID, stages=stages, attention="window, grid") == [("linear", "full"), ("window",), ("grid",)]
    assert kinds(PYRAMID, stages=stages, attention="grid") == [("linear", "full"), ("grid",), ("grid",)]


def test_images_that_are_not_square_or_do_not_fill_their_patches() -> None:
    sizes = replace(TINY, image_size=(9, 12), patch_size=4).resolve().sizes
    assert (sizes.image, sizes.last.rows, sizes.last.cols, sizes.tokens) == ((9, 12), 3, 3, 9)
    assert replace(TINY, patch_size=9).resolve().sizes.tokens == 1


@pytest.mark.parametrize("given", [{"pool": "cls"}, {"registers": 1}, {"global_tokens": 1}])
def test_what_layers_of_kind_global_tokens_attend_to(given: dict[str, Any]) -> None:
    assert replace(TINY, attention="global_tokens", **given).resolve().sizes.prefix == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "vit_xxl"}, rf"model\.preset 'vit_xxl' is unknown: choose one of {', '.join(PRESETS)}"),
        ({"width": None}, r"model\.width is not set: give it, or a model\.preset, or model\.stages"),
        ({"depth": 0}, r"model\.depth is 0: it must be at least 1"),
        ({"num_classes": -3}, r"model\.num_classes is -3: it must be 0 or more"),
        ({"patch_size": 0}, r"model\.patch_size is 0: it must be at least 1"),
        ({"image_size": 0}, r"model\.image_size is 0: it must be at least 1"),
        ({"image_size": (8, -8)}, r"model\.image_size is \(8, -8\): it must be at least 1"),
        (
            {"num_heads": 3},
            r"model\.num_heads 3 does not divide model\.width 16: use \[1, 2, 4\] heads, .* multiple of 3",
        ),
        (
            {"width": 18, "num_heads": 2, "position": "sincos_2d"},
            r"model\.width 18 must be a multiple of 4 .* sincos_2d",
        ),
        (
            {"num_heads": 8, "position": "rope_2d"},
            r"model\.width 16 over 8 heads gives 2 features each: model\.position rope_2d needs a multiple of 4",
        ),
        ({"rope_base": 0.0}, r"model\.rope_base is 0\.0: it must be at least 0\.001"),
        ({"rope_base": math.nan}, r"model\.rope_base is nan: it must be at least 0\.001"),
        ({"drop_path": 1.0}, r"model\.drop_path is 1\.0: it must be at least 0 and below 1"),
        ({"registers": -1}, r"model\.registers is -1: it must be 0 or more"),
        ({"layer_scale": -0.1}, r"model\.layer_scale is -0\.1: it must be 0 or more"),
        ({"window_size": 0}, r"model\.window_size is 0: it must be at least 1"),
        ({"grid_size": -1}, r"model\.grid_size is -1: it must be at least 1"),
        # kinds of attention
        ({"attention": "dense"}, r"model\.attention: 'dense' is no kind of attention: choose among full, window, .*"),
        ({"attention": "window, full, full"}, r"model\.attention names 3 layers, but there are 2: .*"),
        ({"attention": ("window",)}, r"model\.attention names 1 layer, but there are 2: .*"),
        (
            {"attention": "global_tokens", "pool": "gap"},
            r"model\.attention global_tokens needs model\.global_tokens \(or registers, or pool cls\): set it",
        ),
        (
            {"global_tokens": 3, "attention": "window"},
            r"model\.global_tokens is 3, but no layer attends to them: add kind global_tokens to model\.attention, "
            r"or use model\.registers",
        ),
        # numbers that no machine holds
        ({"depth": 2**63}, r"model\.depth is 9223372036854775808: it must be at most 10000"),
        ({"width": 2**31 - 1}, r"model\.width is 2147483647: it must be at most 1048576"),
        ({"mlp_dim": 10**30}, r"model\.mlp_dim is 10+: it must be at most 16777216"),
        ({"image_size": (8, 10**12)}, r"model\.image_size is \(8, 10+\): it must be at most 1048576"),
        ({"image_size": 2**20, "patch_size": 16}, r"model\.image_size 1048576 in patches .* 16 gives 4294967296 .*"),
        ({"patch_size": 10**6}, r"model\.patch_size is 1000000: it must be at most 4096"),
        ({"layer_scale": 1e39}, r"model\.layer_scale is 1e\+39: it must be at most 10000"),
        ({"head_bias": 1e39}, r"model\.head_bias is 1e\+39: it must be at most 10000"),
        ({"head_bias": -1e39}, r"model\.head_bias is -1e\+39: it must be at least -10000"),
        ({"linear_conv": 100_001}, r"model\.linear_conv is 100001: it must be at most 255"),
        ({"attention": "full * 999999999"}, r"model\.attention 'full \* 999999999' names more than 10000 layers, .*"),
        ({"attention": ""}, r"model\.attention names 0 layers, but there are 2: .*"),
        ({"attention": ()}, r"model\.attention names 0 layers, but there are 2: .*"),
        (with_stage(2, depth=9_999), r"model\.stages have 10002 blocks: they must be at most 10000"),
        # keys without effect
        (
            {"linear_conv": 3},
            r"model\.linear_conv is 3, but no layer of model\.attention is linear: leave it out, or null",
        ),
        ({"feature_map": "focused"}, r"model\.feature_map is focused, but no layer of model\.attention is linear: .*"),
        ({"window_size": 4}, r"model\.window_size is 4, but no layer of model\.attention is window, .* goes by it: .*"),
        ({"window_size": 4, "grid_size": 5, "attention": "grid"}, r"model\.window_size is 4, but no layer .*"),
        ({"grid_size": 4, "attention": "window"}, r"model\.grid_size is 4, but no layer .* is grid and goes by it: .*"),
        ({"rope_base": 50.0}, r"model\.rope_base is 50\.0, but model\.position is learned_2d, not rope_2d: .*"),
        # class tokens, and a head without classes
        ({"class_tokens": 3}, r"model\.class_tokens is 3: it must be at most 2"),
        ({"pool": "cls", "class_tokens": 0}, r"model\.pool is cls, but model\.class_tokens is 0: set it to 1, or .*"),
        ({"pool": "cls_gap", "class_tokens": 0}, r"model\.pool is cls_gap, but model\.class_tokens is 0: .*"),
        ({"pool": "gap", "class_tokens": 2}, r"model\.class_tokens is 2, .*, but model\.pool is gap: set .*"),
        ({"pool": "cls_gap", "class_tokens": 2}, r"model\.class_tokens is 2, .*, but model\.pool is cls_gap: set .*"),
        ({"pool": "gap", "class_tokens": 1}, None),
        (
            {"pool": "cls", "class_position": False},
            r"model\.class_position is False, but model\.position is learned_2d, which has no table of .*",
        ),
        (
            {"pool": "gap", "position": "learned_1d", "class_position": False},
            r"model\.class_position is False, but there are no class tokens: leave it out, or null",
        ),
        ({"num_classes": 0, "head_bias": -1.0}, r"model\.head_bias is -1\.0, but model\.num_classes is 0, so .*"),
        ({"num_classes": 0, "head_bias": 0.0}, None),  # as a run of a softmax loss has it
        ({"num_classes": 0, "classifier_bias": False}, r"model\.classifier_bias is False, but .*num_classes is 0, .*"),
        ({"classifier_bias": False, "head_bias": -1.0}, r"model\.head_bias is -1\.0, .*classifier_bias is false: .*"),
        ({"gelu": "tanh", "mlp": "swiglu", "pool": "gap"}, r"model\.gelu is tanh, but model\.mlp swiglu has none: .*"),
        ({"gelu": "tanh", "mlp": "swiglu", "pool": "map"}, None),  # the pooling's own MLP has a GELU
        ({"norm_eps": 0.0}, r"model\.norm_eps is 0\.0: it must be at least 1e-15"),
        ({"norm_eps": 2.0}, r"model\.norm_eps is 2\.0: it must be at most 1"),
        (
            {"norm": "rmsnorm", "norm_bias": False},
            r"model\.norm_bias is False, but model\.norm is rmsnorm, which has none: leave it out, or null",
        ),
        ({"norm": "rmsnorm", "norm_bias": True}, None),  # as every resolved configuration says
        (
            {"bias": False, "norm_bias": True, "qkv_bias": "qv"},
            r"model\.bias is False, but model\.norm_bias and model\.qkv_bias both say otherwise: .*",
        ),
        ({"bias": False, "norm_bias": True}, None),
        (
            {"qk_norm": True, "norm": "rmsnorm", "qk_norm_bias": True},
            r"model\.qk_norm_bias is True, but model\.norm is rmsnorm, which has none: leave it out, or null",
        ),
        ({"qk_norm_over": "width"}, r"model\.qk_norm_over is width, but model\.qk_norm is False: .*, or set .*"),
        ({"qk_norm_bias": True}, r"model\.qk_norm_bias is True, but model\.qk_norm is False: .* set model\.qk_norm"),
        (
            {"relative_position": True, "attention": "window, full"},
            r"model\.relative_position is true, but layers of model\.attention are full, .*: "
            r"use window and shifted_window alone, or set it to false",
        ),
        (
            {"relative_position": True, "attention": "global_tokens, grid", "global_tokens": 1},
            r"model\.relative_position is true, but layers of model\.attention are global_tokens, grid, .*",
        ),
        ({"relative_position": True}, r"model\.relative_position is true, but layers of .* are full, .*"),
        ({"relative_position": True, "attention": "shifted_window"}, None),
        ({"depth": 1, "drop_path": 0.1}, r"model\.drop_path is 0\.1, but its rates grow from 0 .*: set it to 0"),
        (with_stage(0, window_size=4), r"model\.stages\[0\]\.window_size is 4, but none of its layers is window, .*"),
        (with_stage(1, grid_size=4), r"model\.stages\[1\]\.grid_size is 4, but none of its layers is grid: .*"),
        (
            with_stage(0) | {"stages": NAMED, "attention": "window"},
            r"model\.attention is window, but every entry of model\.stages names its own: .*",
        ),
        (
            with_stage(0) | {"stages": NAMED, "attention": "[window] * 4"},
            r"model\.attention is \[window\] \* 4, but every entry of model\.stages names its own: .*",
        ),
        (with_stage(0, attention="full") | {"attention": "window"}, None),
        ({"linear_conv": 4, "attention": "linear"}, r"model\.linear_conv is 4: the side .* must be odd, or 0"),
        ({"linear_conv": -1}, r"model\.linear_conv is -1: it must be 0 or more"),
        # pyramids
        ({"stages": STAGES}, r"model\.stages stands in the place of model\.width, model\.depth, model\.num_heads: .*"),
        (with_stage(0) | {"mlp_dim": 8}, r"model\.stages stands in the place of model\.mlp_dim: give them per stage"),
        (with_stage(0) | {"stages": ()}, r"model\.stages is empty: give at least one stage, or null"),
        (
            with_stage(1, num_heads=5),
            r"model\.stages\[1\]\.num_heads 5 does not divide model\.stages\[1\]\.width 24: use \[3, 4, 6\] heads, .*",
        ),
        (with_stage(2, depth=0), r"model\.stages\[2\]\.depth is 0: it must be at least 1"),
        (with_stage(0, mlp_dim=-1), r"model\.stages\[0\]\.mlp_dim is -1: it must be at least 1"),
        (with_stage(1, window_size=0), r"model\.stages\[1\]\.window_size is 0: it must be at least 1"),
        (with_stage(0, attention="full"), None),
        (with_stage(0, attention=("full",)), r"model\.stages\[0\]\.attention names 1 layer, but there are 2: .*"),
        (with_stage(1, attention="dense"), r"model\.stages\[1\]\.attention: 'dense' is no kind of attention: .*"),
        (with_stage(0, attention="full") | {"attention": "[full] * 4"}, r"model\.attention names 4 .* there are 2: .*"),
        (with_stage(1) | {"attention": "[full] * 3"}, r"model\.attention names 3 layers, but there are 4: .*"),
        (
            with_stage(2, width=18, num_heads=3) | {"position": "rope_2d"},
            r"model\.stages\[2\]\.width 18 over 3 heads gives 6 features each: .* a multiple of 4",
        ),
        (
            with_stage(0, width=6, num_heads=3) | {"position": "sincos_2d"},
            r"model\.stages\[0\]\.width 6 must be a multiple of 4 for model\.position sincos_2d",
        ),
        (with_stage(1, width=6) | {"position": "sincos_2d"}, None),  # positions are added in the first stage
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_errors_name_key_value_and_cure(changes: dict[str, Any], message: str | None) -> None:
    config = replace(TINY, image_size=changes.pop("image_size", 32), **changes)
    if message is None:
        config.resolve()
        return
    with pytest.raises(ValueError, match=rf"^{message}$"):
        config.resolve()


@pytest.mark.parametrize("preset", [name for name, values in PRESETS.items() if "stages" in values])
def test_the_preset_of_a_pyramid(preset: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^model\.preset {preset} is a pyramid: change model\.stages, not model\.wid"
    ):
        ModelConfig(preset=preset, width=8).resolve()
    config = ModelConfig(preset=preset, stages=STAGES, attention="window").resolve()
    assert [stage.width for stage in config.sizes.stages] == [16, 24, 24]
    assert ModelConfig(preset="vit_b16", stages=STAGES).resolve().depth is None  # the stages win over its shape


# -- over ranks --------------------------------------------------------------------------------------------------------


def _refused(config: ModelConfig, message: str, *sizes: int) -> None:
    with pytest.raises(ValueError, match=rf"^{message}$"):
        check_parallel(config.resolve(), *sizes)


def test_what_tensor_parallelism_cannot_split() -> None:
    for size in (1, 2, 3, 4):  # heads that do not divide are split unevenly
        check_parallel(TINY.resolve(), size)
    check_parallel(replace(TINY, width=50, num_heads=25, num_classes=8).resolve(), 8)
    check_parallel(replace(TINY, mlp_dim=30).resolve(), 4)
    _refused(
        TINY, r"model\.num_heads 4 cannot be split over parallel\.tensor_parallel_size 5: use a size of at most 4", 5
    )
    _refused(
        replace(TINY, mlp_dim=3), r"model\.mlp_dim 3 .* parallel\.tensor_parallel_size 4: use a size of at most 3", 4
    )
    _refused(
        replace(TINY, num_classes=1), r"model\.num_classes 1 .* parallel\.tensor_parallel_size 2: .* of at most 1", 2
    )
    check_parallel(replace(TINY, num_classes=0).resolve(), 4)  # there is nothing to split
    _refused(replace(TINY, num_classes=3), r"model\.num_heads 4 .* parallel\.tensor_parallel_size 5: .* at most 3", 5)


def test_the_narrowest_stage_bounds_tensor_parallelism() -> None:
    check_parallel(PYRAMID.resolve(), 2)
    _refused(
        PYRAMID, r"model\.stages\[1\]\.num_heads 2 .* parallel\.tensor_parallel_size 3: use a size of at most 2", 3
    )
    narrow = replace(PYRAMID, stages=with_stage(2, mlp_dim=1)["stages"])
    _refused(narrow, r"model\.stages\[2\]\.mlp_dim 1 .* parallel\.tensor_parallel_size 2: .* at most 1", 2)


def test_rows_bound_context_parallelism() -> None:
    windows = replace(TINY, image_size=(6, 32), attention="window")  # 3 rows of patches
    check_parallel(windows.resolve(), 1, 3)
    check_parallel(windows.resolve(), 4, 3)  # no head is dealt out
    _refused(
        windows,
        r"parallel\.context_parallel_size 4 is more than the 3 rows of patches of the last stage, which it deals out: "
        r"use at most 3, or larger images",
        1, 4,
    )  # fmt: skip
    pyramid = replace(PYRAMID, attention="linear")  # 16, 8, 4 rows
    check_parallel(pyramid.resolve(), 1, 4)
    _refused(pyramid, r"parallel\.context_parallel_size 5 is more than the 4 rows .* at most 4, .*", 1, 5)


def test_heads_bound_context_parallelism_where_attention_is_full() -> None:
    config = replace(TINY, image_size=32, attention="window, full")
    check_parallel(config.resolve(), 1, 4)
    check_parallel(config.resolve(), 2, 2)
    check_parallel(config.resolve(), 4, 1)
    _refused(
        config,
        r"parallel\.context_parallel_size 3 cannot deal out the 4 heads, over tensor_parallel_size 2, of layers with "
        r"full attention: use at most 2, or another kind of attention",
        2, 3,
    )  # fmt: skip
    _refused(replace(config, width=20, num_heads=5), r".* 3 cannot deal out the 5 heads, .* use at most 2, .*", 2, 3)
    for kind in ("window", "grid", "linear"):
        check_parallel(replace(config, attention=kind).resolve(), 4, 8)
