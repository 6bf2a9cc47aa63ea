"""big_vision's own ViT against ours, by hand: it is no package, and needs JAX, which must not be beside this program.

    git clone https://github.com/google-research/big_vision /tmp/big_vision
    python3 -m venv /tmp/jax && /tmp/jax/bin/pip install jax flax einops ml_collections absl-py
    python tests/tools/big_vision_oracle.py images /tmp/oracle
    /tmp/jax/bin/python tests/tools/big_vision_oracle.py make /tmp/oracle /tmp/big_vision
    python tests/tools/big_vision_oracle.py compare /tmp/oracle

`make` runs big_vision/models/vit.py with random parameters, saves them as its checkpoints are, and its logits;
`compare` prints the largest difference to what this program makes of the same files.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT, SIZE = Path(__file__).parents[2], 32
SMALL = {"width": 48, "depth": 3, "num_heads": 4, "mlp_dim": 80, "patch_size": (8, 8), "num_classes": 10}
MODELS: dict[str, dict[str, Any]] = {
    "gap": {"pool_type": "gap"},
    "map": {"pool_type": "map"},
    "tok": {"pool_type": "tok"},
    "gap_scan": {"pool_type": "gap", "scan": True},
    "map_scan": {"pool_type": "map", "scan": True},
    "tok_scan": {"pool_type": "tok", "scan": True},
    "sincos2d": {"pool_type": "gap", "posemb": "sincos2d"},
    "sincos2d_tok_scan": {"pool_type": "tok", "posemb": "sincos2d", "scan": True},
    "no_head": {"pool_type": "map", "num_classes": None},
    "map_bf16": {"pool_type": "map", "scan": True},
}


def images(folder: Path) -> None:
    """Photographs [4, C, H, W], -1 to 1."""
    sys.path.insert(0, str(ROOT))
    from tools.convert.images import photographs

    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "images.npy", photographs(3, (SIZE, SIZE), None).numpy())


def make(folder: Path, big_vision: Path) -> None:
    """A file, and big_vision's logits, of each model."""
    import flax.training.checkpoints  # type: ignore[import-not-found]
    import jax  # type: ignore[import-not-found]

    for name in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):  # of which it takes opening of remote files
        sys.modules[name] = ModuleType(name)
    sys.path.insert(0, str(big_vision))
    from big_vision.models import vit  # type: ignore[import-not-found]

    jax.config.update("jax_default_matmul_precision", "highest")
    x = np.load(folder / "images.npy").transpose(0, 2, 3, 1)
    for i, (name, keys) in enumerate(MODELS.items()):
        model = vit.Model(**SMALL | keys)
        made = flax.traverse_util.flatten_dict(model.init(jax.random.PRNGKey(0), x)["params"], sep="/")
        r = np.random.default_rng(i)
        params = {k: r.normal(0.05, 0.2, v.shape).astype(np.float32) for k, v in made.items()}
        if name.endswith("bf16"):
            params = {k: v.astype(jax.numpy.bfloat16) for k, v in params.items()}
        np.savez(folder / f"{name}.npz", **{f"params/{k}": v for k, v in params.items()})
        tree = flax.traverse_util.unflatten_dict({k: v.astype(np.float32) for k, v in params.items()}, sep="/")
        logits, out = model.apply({"params": tree}, x)
        np.savez(folder / f"{name}.outputs", logits=logits, features=out["pre_logits"])


def compare(folder: Path) -> None:
    """The largest differences."""
    sys.path.insert(0, str(ROOT))
    import torch

    from model.formats.api import open_weights
    from tools.convert.runners.vitruvius import run_weights

    x = torch.from_numpy(np.load(folder / "images.npy"))
    for name, keys in MODELS.items():
        given = {"image_size": SIZE} if "posemb" in keys else {}
        with open_weights(folder / f"{name}.npz", given=given) as weights, torch.no_grad():
            ours = run_weights(weights, x)
        with np.load(folder / f"{name}.outputs.npz") as theirs:
            features = np.abs(ours.features.numpy() - theirs["features"]).max()
            logits = 0.0 if ours.logits is None else np.abs(ours.logits.numpy() - theirs["logits"]).max()
            spread = theirs["logits"].std()
        print(f"{name:18} features {features:.1e}   logits {logits:.1e}   (of standard deviation {spread:.1f})")


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    {"images": images, "make": make, "compare": compare}[command](*map(Path, paths))
