"""Files of big_vision, read and run by timm, which has a reader of its own for them: big_vision itself is no package.
`tests/tools/big_vision_oracle.py` compares with big_vision's own code.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tools.convert.libraries import library
from tools.convert.runners import Outputs

Arrays = Mapping[str, np.ndarray[Any, Any]]


def run(path: Path, images: Tensor) -> Outputs:
    """Of an .npz file."""
    with np.load(path) as archive:
        arrays = {name: _in_fp32(archive[name]) for name in archive.files}
    prefix = next(p for p in ("params/img/", "params/", "img/", "opt/target/", "") if f"{p}embedding/kernel" in arrays)
    if not _positions(arrays, prefix):
        kernel = arrays[f"{prefix}embedding/kernel"]
        rows, cols = (side // kernel.shape[0] for side in images.shape[2:])
        arrays[f"{prefix}pos_embedding"] = _sines(rows, cols, kernel.shape[3])
    model = library("timm.models.vision_transformer").VisionTransformer(**_arguments(arrays, prefix, images))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/fp32.npz", allow_pickle=False, **arrays)  # timm reads bf16 with JAX alone
        model.load_pretrained(f"{folder}/fp32.npz", prefix)
        model.eval()
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        return Outputs(features, model.head(features) if model.num_classes else None)


def _in_fp32(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.dtype.kind == "V":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float().numpy()
    return values.astype(np.float32)


def _positions(arrays: Arrays, p: str) -> list[np.ndarray[Any, Any]]:
    return [x for n, x in arrays.items() if n.startswith(p) and n.endswith("pos_embedding") and "txt/" not in n]


def _sines(rows: int, cols: int, width: int) -> np.ndarray[Any, Any]:
    """[1, N, D]: what big_vision computes where there are no positions, in fp32 as there; timm has none of it."""
    y, x = np.mgrid[:rows, :cols].astype(np.float32)
    omega = np.float32(1) / np.float32(10_000) ** (np.arange(width // 4, dtype=np.float32) / (width // 4 - 1))
    y, x = np.outer(y.ravel(), omega), np.outer(x.ravel(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)[None]


def _arguments(arrays: Arrays, p: str, images: Tensor) -> dict[str, Any]:
    """Of timm's class."""
    start = f"{p}Transformer/encoderblock"
    scan = f"{start}/LayerNorm_0/scale" in arrays
    first = f"{start}/" if scan else f"{start}_0/"
    queries = next(x for n, x in arrays.items() if n.startswith(first) and n.endswith("/query/kernel"))
    hidden = next(x for n, x in arrays.items() if n.startswith(first) and n.endswith("/Dense_0/kernel"))
    patch, width = arrays[f"{p}embedding/kernel"].shape[0], arrays[f"{p}embedding/kernel"].shape[-1]
    positions = _positions(arrays, p)
    cls, patches = f"{p}cls" in arrays, math.prod(side // patch for side in images.shape[2:])
    return {
        "img_size": tuple(images.shape[2:]),
        "patch_size": patch,
        "in_chans": images.shape[1],
        "embed_dim": width,
        "depth": len(hidden) if scan else sum(n.endswith("/query/kernel") for n in arrays if n.startswith(f"{start}_")),
        "num_heads": queries.shape[-2],
        "mlp_ratio": (hidden.shape[-1] + 0.5) / width,  # they multiply, and cut
        "num_classes": arrays[f"{p}head/kernel"].shape[1] if f"{p}head/kernel" in arrays else 0,
        "global_pool": "token" if cls else "map" if f"{p}MAPHead_0/probe" in arrays else "avg",
        "class_token": cls,
        "no_embed_class": cls and positions[0].shape[1] == patches,
        "fc_norm": False,
        "act_layer": "gelu_tanh",
    }
