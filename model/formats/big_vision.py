"""ViT of Google's big_vision, and of the older vision_transformer, as .npz files (Beyer et al. 2022; Dosovitskiy et
al. 2021; Zhai et al. 2023).

Names: `params/img/Transformer/encoderblock_3/MlpBlock_0/Dense_0/kernel`. A file says nothing of the image's size, of
its preparation, of epsilon (1e-6 there) or of the GELU (the tanh form there). Matrices stand input first, those of the
attention with a dim for the heads.

Legend: D width, H heads, K head dim, M MLP width, P patch side, C channels, N patches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model.config import ModelConfig
from model.formats.base import ConversionError, Description, Origin, Preprocessing, Shape
from model.formats.big_vision_file import (
    KEPT,
    MHA,
    POSITIONS,
    Layout,
    Shapes,
    blocks_of,
    image_of,
    layout_of,
    preprocessing_of,
)
from model.formats.expressible import ANY, check_expressible, check_whole_patches
from model.formats.rules import Rule, rule
from model.formats.sources import Source
from model.formats.ways import Joined, Permuted, Same

_OTHER_TOWERS = re.compile(r"(params/|opt/target/)?(txt/.*|t|b)")
_MOSTKEPT = 60_000  # bytes of a comment


@dataclass(frozen=True)
class _Sines:
    """Ours is big_vision's table of sines [N, D], of which its files have nothing."""

    rows: int
    cols: int
    width: int

    def table(self) -> Tensor:
        """Its frequencies end at 1/10000, those of MoCo v3 before."""
        omega = 10_000.0 ** -(torch.arange(self.width // 4, dtype=torch.float64) / (self.width // 4 - 1))
        y, x = torch.meshgrid(
            *(torch.arange(side, dtype=torch.float64) for side in (self.rows, self.cols)), indexing="ij"
        )
        y, x = (place.reshape(-1, 1) * omega for place in (y, x))
        return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1).float()

    def to_ours(self, theirs: object) -> Tensor:
        """As Way."""
        return self.table()

    def to_theirs(self, ours: Tensor) -> list[Tensor]:
        """As Way."""
        if not ours.is_meta and not torch.equal(ours, self.table().to(ours.dtype)):
            raise ConversionError(
                "the positions came as big_vision's fixed sines, for which a file has no place, and were trained away "
                "from them: freeze embed.pos in training"
            )
        return []


class BigVision:
    """One .npz file.

    Args:
        scan: write layers stacked, whatever they were before.
    """

    kind, title, container = "big_vision", "big_vision's ViT", "npz"

    def __init__(self, scan: bool = False) -> None:
        self.scan = scan

    # -- reading -------------------------------------------------------------------------------------------------------

    def recognises(self, source: Source) -> bool:
        """As Format."""
        return any(re.search(r"Transformer/encoderblock(_0)?/LayerNorm_0/scale$", name) for name in source.tensors)

    def describe(self, source: Source, given: Mapping[str, Any]) -> Description:
        """As Format."""
        layout, seen = layout_of(source), Shapes(source)
        kept = source.files.get(KEPT, {})
        p, blocks = layout.prefix, blocks_of(source, layout)
        patch = seen.of(f"{p}embedding/kernel", 4)
        attention = seen.of(blocks[1].format(f"{MHA}_{int(layout.old)}/query/kernel"), 3 + layout.scan)
        mlp = seen.of(blocks[1].format(f"MlpBlock_{3 * layout.old}/Dense_0/kernel"), 2 + layout.scan)
        if patch[0] != patch[1]:
            raise ConversionError(f"{source.path}: {p}embedding/kernel {list(patch)}: patches of this model are square")
        image, class_position = image_of(source, layout, patch[0], given.get("image_size", kept.get("image_size")))
        cls, pooled = f"{p}cls" in source.tensors, f"{p}MAPHead_0/probe" in source.tensors
        if cls and pooled:
            raise ConversionError(f"{source.path} has {p}cls and {p}MAPHead_0: this kind has one or the other")
        head = seen.of(f"{p}head/kernel", 2) if f"{p}head/kernel" in source.tensors else (0, 0)
        model = ModelConfig(
            image_size=image,
            patch_size=patch[0],
            in_channels=patch[2],
            width=patch[3],
            depth=blocks[0],
            num_heads=attention[-2],
            mlp_dim=mlp[-1],
            block="sequential",
            gelu="tanh",
            position="learned_1d",
            class_position=class_position if cls else None,
            pool="cls" if cls else "map" if pooled else "gap",
            num_classes=head[1],
        ).resolve()
        return Description(
            model=model,
            preprocessing=preprocessing_of(kept),
            origin=Origin(kind=self.kind, config=asdict(layout)),
            labels=tuple(kept.get("labels", ())),
        )

    def carries(self, name: str) -> bool:
        """As Format: the text tower, temperature and bias of a model of two towers."""
        return bool(_OTHER_TOWERS.fullmatch(name))

    # -- both ways -----------------------------------------------------------------------------------------------------

    def rules(self, description: Description) -> list[Rule]:
        """As Format."""
        m = description.model
        check_expressible(self.title, m, _allowed(m))
        check_whole_patches(self.title, m)
        sizes, layout = m.sizes, self._layout_for(description)
        last, p = sizes.last, layout.prefix
        width, side = last.width, sizes.patch
        kernel = Permuted((side, side, sizes.channels, width), (3, 2, 0, 1), (width, sizes.patch_features))
        rules = [rule("embed.weight", f"{p}embedding/kernel", way=kernel), rule("embed.bias", f"{p}embedding/bias")]
        tokens = sizes.class_rows + last.rows * last.cols
        if m.pool == "cls":
            rules.append(rule("embed.cls", f"{p}cls", way=Same((1, width), (1, 1, width))))
        if layout.position:
            position = Same((tokens, width), (1, tokens, width))
            rules.append(rule("embed.pos", p + layout.position, way=position))
        else:
            rules.append(rule("embed.pos", way=_Sines(last.rows, last.cols, width)))
        for i in range(sizes.depth):
            rules += self._block(f"blocks.{i}.", layout, i, m)
        rules += _norm("head.norm.", f"{p}Transformer/encoder_norm/")
        if m.pool == "map":
            rules += self._pool(f"{p}MAPHead_0/", m)
        if m.num_classes:
            rules += _dense("head.fc.", f"{p}head/", width, m.num_classes)
        return rules

    def _layout_for(self, description: Description) -> Layout:
        origin = description.origin
        back = origin is not None and origin.kind == self.kind
        layout = Layout(**origin.config) if origin is not None and back else Layout()
        if not self.scan:
            return layout
        return replace(layout, scan=True, old=False, position=POSITIONS[0] if layout.position else "")

    def _block(self, ours: str, layout: Layout, i: int, m: ModelConfig) -> list[Rule]:
        last = m.sizes.last
        width, heads = last.width, (last.heads, last.head_dim)

        def at(name: str) -> str:
            return layout.block(i, name)

        names = [f"{MHA}_0/{x}" for x in ("query", "key", "value")]
        into, bias = Permuted((width, *heads), (1, 2, 0), (width, width)), Same((width,), heads)
        thrice = (width,) * 3
        return [
            *_norm(f"{ours}norm1.", "LayerNorm_0/", at),
            rule(f"{ours}attn.qkv.weight", *(at(f"{n}/kernel") for n in names), way=Joined(thrice, into)),
            rule(f"{ours}attn.qkv.bias", *(at(f"{n}/bias") for n in names), way=Joined(thrice, bias)),
            *_out(f"{ours}attn.proj.", f"{MHA}_0/out/", (*heads, width), at),
            *_norm(f"{ours}norm2.", "LayerNorm_1/", at),
            *_dense(f"{ours}mlp.fc1.", "MlpBlock_0/Dense_0/", width, last.mlp, at),
            *_dense(f"{ours}mlp.fc2.", "MlpBlock_0/Dense_1/", last.mlp, width, at),
        ]

    def _pool(self, p: str, m: ModelConfig) -> list[Rule]:
        last = m.sizes.last
        width, heads, ours = last.width, (last.heads, last.head_dim), "head.pool."
        into, bias = Permuted((width, *heads), (1, 2, 0), (width, width)), Same((width,), heads)
        a, twice = f"{p}{MHA}_0/", (width,) * 2
        return [
            rule(f"{ours}probe", f"{p}probe", way=Same((1, width), (1, 1, width))),
            rule(f"{ours}q.weight", f"{a}query/kernel", way=into),
            rule(f"{ours}q.bias", f"{a}query/bias", way=bias),
            rule(f"{ours}kv.weight", f"{a}key/kernel", f"{a}value/kernel", way=Joined(twice, into)),
            rule(f"{ours}kv.bias", f"{a}key/bias", f"{a}value/bias", way=Joined(twice, bias)),
            *_out(f"{ours}proj.", f"{a}out/", (*heads, width)),
            *_norm(f"{ours}norm.", f"{p}LayerNorm_0/"),
            *_dense(f"{ours}mlp.fc1.", f"{p}MlpBlock_0/Dense_0/", width, last.mlp),
            *_dense(f"{ours}mlp.fc2.", f"{p}MlpBlock_0/Dense_1/", last.mlp, width),
        ]

    def files(self, description: Description) -> dict[str, Any]:
        """As Format: for the comment of the file, if it has to say anything."""
        m, kept = description.model, dict[str, Any]()
        if description.preprocessing not in (None, Preprocessing(squash=True)):
            assert description.preprocessing is not None
            kept["preprocessing"] = asdict(description.preprocessing)
        if m.image[0] != m.image[1]:
            kept["image_size"] = list(m.image)
        labels = {"labels": list(description.labels)} if description.labels else {}
        if len(json.dumps(kept | labels)) < _MOSTKEPT:
            kept |= labels
        return {KEPT: kept} if kept else {}


def _same(name: str) -> str:
    return name


def _norm(ours: str, theirs: str, at: Any = _same) -> list[Rule]:
    return [rule(f"{ours}weight", at(f"{theirs}scale")), rule(f"{ours}bias", at(f"{theirs}bias"))]


def _dense(ours: str, theirs: str, inputs: int, outputs: int, at: Any = _same) -> list[Rule]:
    kernel = Permuted((inputs, outputs), (1, 0), (outputs, inputs))
    return [rule(f"{ours}weight", at(f"{theirs}kernel"), way=kernel), rule(f"{ours}bias", at(f"{theirs}bias"))]


def _out(ours: str, theirs: str, shape: Shape, at: Any = _same) -> list[Rule]:
    kernel = Permuted(shape, (2, 0, 1), (shape[2], shape[0] * shape[1]))
    return [rule(f"{ours}weight", at(f"{theirs}kernel"), way=kernel), rule(f"{ours}bias", at(f"{theirs}bias"))]


def _allowed(m: ModelConfig) -> dict[str, object]:
    """See check_expressible."""
    classes = {"class_tokens": int(m.pool == "cls"), "class_position": ANY if m.pool == "cls" else True}
    return {"gelu": "tanh", "pool": {"map", "gap", "cls"}, **classes}
