"""timm's VisionTransformer, and the distilled one: constructor arguments, our model, and rules between their tensors.

Legend: D width, M MLP width, N patches, R registers, c class tokens.
"""

from __future__ import annotations

from typing import Any

from model.config import ModelConfig
from model.formats.base import ConversionError
from model.formats.expressible import ANY, check_expressible
from model.formats.rules import Rule, rule
from model.formats.timm.arguments import DISTILLED, VIT, Constructor
from model.formats.timm.common import (
    AddedRows,
    bias_rule,
    image_of,
    mlp_of,
    norm_rules,
    patch_of,
    qkv_rules,
    ratio_of,
    refuse_unless,
)
from model.formats.ways import Constant, Joined, Kept, Reordered, Same, Sum, Way

_GELU = {"gelu": "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}
_POOL = {"token": "cls", "avg": "gap", "map": "map"}
_PLAIN: dict[str, set[Any]] = {  # arguments that this model has no other values of, and what the others are
    "scale_attn_norm": {False}, "scale_mlp_norm": {False}, "final_norm": {True}, "embed_layer": {"PatchEmbed"},
    "embed_norm_layer": {None, ""}, "norm_layer": {"layernorm", "rmsnorm"}, "attn_layer": {"attn", "Attention", ""},
    "block_fn": {"Block", "ParallelScalingBlock"}, "mlp_layer": {"Mlp", "SwiGLUPacked"},
    "global_pool": set(_POOL), "pos_embed": {"learn", "none", ""},
}  # fmt: skip


def model_of(made: Constructor) -> ModelConfig:
    """Our model. Raises ConversionError, by name, for an argument that ours has not."""
    a = made.arguments
    refuse_unless(made, _PLAIN)
    _check_together(made)
    gated, layernorm = a["mlp_layer"] == "SwiGLUPacked", a["norm_layer"] == "layernorm"
    if not gated:
        refuse_unless(made, {"act_layer": set(_GELU)})
    classes = 2 if made.name == DISTILLED else int(bool(a["class_token"]))
    learned = a["pos_embed"] == "learn"
    after = a["global_pool"] == "avg" if a["fc_norm"] is None else bool(a["fc_norm"])
    return ModelConfig(
        image_size=image_of(made),
        patch_size=patch_of(made),
        in_channels=a["in_chans"],
        width=a["embed_dim"],
        depth=a["depth"],
        num_heads=a["num_heads"],
        mlp_dim=mlp_of(a["embed_dim"], a["mlp_ratio"]) // (2 if gated else 1),
        block="parallel" if a["block_fn"] == "ParallelScalingBlock" else "sequential",
        norm=a["norm_layer"],
        norm_eps=a["norm_eps"],
        mlp="swiglu" if gated else "gelu",
        layer_scale=float(a["init_values"] or 0),
        qk_norm=bool(a["qk_norm"]),
        qk_norm_bias=True if a["qk_norm"] and layernorm else None,
        qkv_bias="all" if a["qkv_bias"] else "none",
        gelu=None if gated else _GELU[a["act_layer"]],  # type: ignore[arg-type]
        patch_bias=not a["pre_norm"],
        pre_norm=bool(a["pre_norm"]),
        position="learned_1d" if learned else "none",
        class_tokens=classes,
        class_position=not a["no_embed_class"] if learned and classes else None,
        registers=a["reg_tokens"],
        pool=_POOL[a["global_pool"]],  # type: ignore[arg-type]
        norm_after_pool=after,
        num_classes=a["num_classes"],
    ).resolve()


def _check_together(made: Constructor) -> None:
    """Refuse arguments that ours has, but not with each other."""
    a = made.arguments
    prefix, pool = int(bool(a["class_token"])) + a["reg_tokens"], a["global_pool"]
    parallel, gated = a["block_fn"] == "ParallelScalingBlock", a["mlp_layer"] == "SwiGLUPacked"
    wrong = {
        "global_pool map without pool_include_prefix: a probe that does not see class token and registers": (
            pool == "map" and prefix and not a["pool_include_prefix"]
        ),
        "pool_include_prefix True: a mean over class token and registers too": (
            pool == "avg" and prefix and a["pool_include_prefix"]
        ),
        "norm_layer rmsnorm with global_pool map: pooling with an RMSNorm": (
            pool == "map" and a["norm_layer"] == "rmsnorm"
        ),
        "mlp_layer SwiGLUPacked with global_pool map: pooling with its activation": pool == "map" and gated,
        "act_layer other than silu with mlp_layer SwiGLUPacked": gated and a["act_layer"] != "silu",
        "init_values 0 in ParallelScalingBlock: a LayerScale that begins at 0": parallel and a["init_values"] == 0,
        "dynamic_img_pad with images that do not fill their patches": (
            a["dynamic_img_pad"] and image_of(made) != image_of(made, whole=False)
        ),
        "fc_norm True, reg_tokens, no_embed_class, no pos_embed or another pooling than token": (
            made.name == DISTILLED
            and (a["fc_norm"] or a["reg_tokens"] or a["no_embed_class"] or a["pos_embed"] != "learn" or pool != "token")
        ),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ConversionError(f"timm's {made.name} has {what}: this model has not")


# -- of our model ------------------------------------------------------------------------------------------------------


def made_of(model: ModelConfig) -> Constructor:
    """What timm is to call for a model of ours. Raises ConversionError, by name, for what it has not."""
    check_expressible(
        "timm's VisionTransformer",
        model,
        {
            "block": {"parallel", "sequential"}, "norm": {"layernorm", "rmsnorm"}, "norm_eps": ANY,
            "mlp": {"gelu", "swiglu"}, "layer_scale": ANY, "qk_norm": {True, False}, "qk_norm_bias": {True, False},
            "bias": ANY, "norm_bias": ANY, "qkv_bias": {"all", "none", "qv"}, "gelu": ANY, "patch_bias": ANY,
            "pre_norm": {True, False}, "position": {"learned_1d", "none"}, "class_position": ANY,
            "pool": {"cls", "gap", "map"}, "norm_after_pool": {True, False}, "class_tokens": ANY, "registers": ANY,
            "classifier_bias": ANY,
        },
    )  # fmt: skip
    _check_ours(model)
    m, sizes = model, model.sizes
    gated, distilled = m.mlp == "swiglu", sizes.class_tokens == 2
    assert m.mlp_dim and m.width
    values: dict[str, Any] = {
        "img_size": m.image, "patch_size": m.patch_size, "in_chans": m.in_channels, "num_classes": m.num_classes,
        "global_pool": {v: k for k, v in _POOL.items()}[str(m.pool)], "embed_dim": m.width, "depth": m.depth,
        "num_heads": m.num_heads, "mlp_ratio": ratio_of(m.width, m.mlp_dim * (2 if gated else 1)),
        "qkv_bias": m.qkv_bias != "none", "qk_norm": m.qk_norm, "scale_attn_norm": False, "scale_mlp_norm": False,
        "proj_bias": True, "init_values": m.layer_scale or None, "class_token": sizes.class_tokens > 0,
        "pos_embed": "learn" if m.position == "learned_1d" else "none", "reg_tokens": m.registers,
        "no_embed_class": sizes.class_rows == 0, "pre_norm": m.pre_norm, "final_norm": True,
        "fc_norm": bool(m.norm_after_pool), "pool_include_prefix": m.pool == "map" and sizes.prefix > 0,
        "embed_layer": "PatchEmbed", "embed_norm_layer": None, "norm_layer": m.norm, "norm_eps": m.norm_eps,
        "act_layer": "silu" if gated else {v: k for k, v in _GELU.items()}[str(m.gelu)],
        "block_fn": "ParallelScalingBlock" if m.block == "parallel" else "Block",
        "mlp_layer": "SwiGLUPacked" if gated else "Mlp", "attn_layer": "attn", "dynamic_img_pad": False,
    }  # fmt: skip
    return Constructor(name=DISTILLED if distilled else VIT, arguments=values)


def _check_ours(m: ModelConfig) -> None:
    sizes, gated, parallel = m.sizes, m.mlp == "swiglu", m.block == "parallel"
    wrong = {
        f"model.image_size {m.image_size} in patches of {m.patch_size}, the last ones filled up": (
            any(side % sizes.patch for side in sizes.image)
        ),
        "model.attention of another kind than full": any(k != "full" for k in sizes.last.kinds),
        "model.patch_bias true with model.pre_norm": bool(m.patch_bias and m.pre_norm),
        "model.mlp swiglu in model.block parallel": gated and parallel,
        "model.mlp swiglu with model.pool map": gated and m.pool == "map",
        "model.norm rmsnorm with model.pool map": m.norm == "rmsnorm" and m.pool == "map",
        "model.qkv_bias qv in model.block parallel": m.qkv_bias == "qv" and parallel,
        "model.class_tokens 2 with registers, a norm after the pooling, or no position of their own": (
            sizes.class_tokens == 2 and bool(m.registers or m.norm_after_pool or not sizes.class_rows)
        ),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ConversionError(f"{what}: timm's VisionTransformer has no such models")


# -- tensors -----------------------------------------------------------------------------------------------------------


def rules(model: ModelConfig, made: Constructor) -> list[Rule]:
    """Between the tensors of our model and those of theirs that is made so."""
    m, width, sizes = model, model.sizes.last.width, model.sizes
    kernel = (width, sizes.channels, sizes.patch, sizes.patch)
    found = [rule("embed.weight", "patch_embed.proj.weight", way=Same((width, sizes.patch_features), kernel))]
    if not made["pre_norm"]:
        found.append(bias_rule("embed.bias", "patch_embed.proj.bias", width, bool(m.patch_bias)))
    found += _tokens(m, made)
    if m.pre_norm:
        found += norm_rules("embed.norm", "norm_pre", m, width)
    block = _parallel if m.block == "parallel" else _sequential
    for i in range(sizes.depth):
        found += block(m, made, f"blocks.{i}.")
    found += norm_rules("head.norm", "fc_norm" if m.norm_after_pool else "norm", m, width)
    if m.pool == "map":
        found += _pool(width)
    for ours, theirs in {"head.fc": "head", "head.fc_distill": "head_dist"}.items():
        if m.num_classes and (ours == "head.fc" or sizes.class_tokens == 2):
            found.append(rule(f"{ours}.weight", f"{theirs}.weight"))
            found.append(bias_rule(f"{ours}.bias", f"{theirs}.bias", m.num_classes, bool(m.classifier_bias)))
    return found


def _tokens(m: ModelConfig, made: Constructor) -> list[Rule]:
    """Class tokens, registers, positions: theirs may have one for each of them, ours for class tokens alone."""
    sizes, width = m.sizes, m.sizes.last.width
    c, r, n = sizes.class_tokens, sizes.registers, sizes.last.rows * sizes.last.cols
    found = []
    if c:
        names = ("cls_token", "dist_token")[:c]
        found.append(rule("embed.cls", *names, way=Joined((1,) * c, Same((1, width), (1, 1, width)))))
    rows = 0 if made["no_embed_class"] or m.position != "learned_1d" else c + r  # of prefix tokens, there
    if r:
        way: Way = Same((r, width), (1, r, width))
        reads = ("pos_embed",) if rows else ()
        if rows:
            way = AddedRows(c, r, width)
        found.append(Rule(ours="embed.registers", theirs=("reg_token",), way=way, reads=reads))
    if m.position == "learned_1d":
        kept = ((0, c), (c + r, c + r + n)) if rows else ((0, n),)
        whole, here = rows + n, sum(b - a for a, b in kept)
        assert here == sizes.class_rows + n, "class tokens have a position here and there"
        found.append(rule("embed.pos", "pos_embed", way=Kept(kept, whole, 1, (here, width), (1, whole, width))))
    return found


def _pool(width: int) -> list[Rule]:
    names = ("q", "kv", "proj", "norm", "mlp.fc1", "mlp.fc2")
    found = [rule(f"head.pool.{x}.{k}", f"attn_pool.{x}.{k}") for x in names for k in ("weight", "bias")]
    return [rule("head.pool.probe", "attn_pool.latent", way=Same((1, width), (1, 1, width))), *found]


def _linear(ours: str, theirs: str, made: Constructor, width: int) -> list[Rule]:
    """With a bias here, whether they have one or not."""
    bias = rule(f"{ours}.bias", f"{theirs}.bias")
    return [
        rule(f"{ours}.weight", f"{theirs}.weight"),
        bias if made["proj_bias"] else rule(f"{ours}.bias", way=Constant((width,))),
    ]


def _sequential(m: ModelConfig, made: Constructor, at: str) -> list[Rule]:
    width, mlp = m.sizes.last.width, m.sizes.last.mlp * (2 if m.mlp == "swiglu" else 1)
    found = norm_rules(f"{at}norm1", f"{at}norm1", m, width) + norm_rules(f"{at}norm2", f"{at}norm2", m, width)
    found += qkv_rules(m, width, f"{at}attn.qkv", f"{at}attn.qkv")
    found += _qk_norms(m, f"{at}attn.core.", f"{at}attn.")
    for name, out in {"attn.proj": width, "mlp.fc1": mlp, "mlp.fc2": width}.items():
        found += _linear(at + name, at + name, made, out)
    if m.layer_scale:
        found += [rule(f"{at}scale{i}", f"{at}ls{i}.gamma") for i in (1, 2)]
    return found


def _qk_norms(m: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    found: list[Rule] = []
    for name in ("q_norm", "k_norm") if m.qk_norm else ():
        found += norm_rules(ours + name, theirs + name, m, m.sizes.last.head_dim, bias=bool(m.qk_norm_bias))
    return found


def _parallel(m: ModelConfig, made: Constructor, at: str) -> list[Rule]:
    """Theirs puts fc1 before q, k and v; what is one output projection here, is two there, with a bias each."""
    width, mlp = m.sizes.last.width, m.sizes.last.mlp
    order = Reordered((width, width, width, mlp), (3, 0, 1, 2))
    found = norm_rules(f"{at}norm", f"{at}in_norm", m, width)
    found.append(rule(f"{at}in_proj.weight", f"{at}in_proj.weight", way=order))
    if m.qkv_bias == "none":
        found.append(rule(f"{at}fc1_bias", f"{at}mlp_bias"))
    else:
        found.append(rule(f"{at}in_proj.bias", f"{at}in_proj.bias", way=order))
    found += _qk_norms(m, f"{at}core.", at)
    halves = (f"{at}attn_out_proj", f"{at}mlp_out_proj")
    found.append(rule(f"{at}out_proj.weight", *(f"{half}.weight" for half in halves), way=Joined((width, mlp), dim=1)))
    biases = tuple(f"{half}.bias" for half in halves) if made["proj_bias"] else ()
    found.append(rule(f"{at}out_proj.bias", *biases, way=Sum() if biases else Constant((width,))))
    return found + ([rule(f"{at}scale", f"{at}ls.gamma")] if m.layer_scale else [])
