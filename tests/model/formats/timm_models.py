"""timm's models as timm itself makes them: all there are, and small random ones, to compare with.

`python -m tests.model.formats.timm_models` prints model/formats/timm/architectures.py for the timm that is installed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from model.formats.api import open_weights, save_weights
from model.formats.timm.arguments import DEFAULTS
from model.formats.weights import Weights
from tools.convert.libraries import library
from tools.convert.runners import Outputs, vitruvius
from tools.convert.runners.timm import run
from tools.convert.verify import differences, images_for

OURS = ("vision_transformer", "deit", "swin_transformer", "hiera")
OTHERS = (
    "beit", "eva", "hieradet_sam2", "naflexvit", "swin_transformer_v2", "swin_transformer_v2_cr", "vitamin",
    "vision_transformer_hybrid", "vision_transformer_relpos", "vision_transformer_sam",
)  # fmt: skip
_RUN = {"pretrained_filter_fn", "pretrained_strict", "feature_cfg", "dynamic_img_size", "weight_init"}


def entry_points(module: str) -> Iterator[tuple[str, type, dict[str, Any]]]:
    """(name, class, arguments) of all models of a module of timm's, none of them built."""
    library("timm")
    registry = importlib.import_module("timm.models._registry")
    source = importlib.import_module(f"timm.models.{module}")
    with mock.patch.object(source, "build_model_with_cfg", _caught), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that are given up
        for name in sorted(registry._module_to_models[module]):
            yield name, *registry._model_entrypoints[name]().caught


def _caught(cls: type, variant: str, pretrained: bool = False, pretrained_cfg: Any = None, **arguments: Any) -> Any:
    found = mock.Mock()
    found.caught = (cls, {k: v for k, v in arguments.items() if k not in _RUN})
    return found


def published(name: str) -> dict[str, Any]:
    """What timm knows of the images and classes of an architecture's first published weights."""
    registry = importlib.import_module("timm.models._registry")
    now = registry._deprecated_models.get(name, name).partition(".")[0]
    return dict(registry.get_pretrained_cfg(now).to_dict())


def plain(cls: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments in the values of model.formats.timm.arguments, without those that are the class's own."""
    values = {key: value for key, value in arguments.items() if key != "norm_layer"}
    if (norm := arguments.get("norm_layer")) is not None:
        values["norm_layer"] = _name(norm).lower()
        values["norm_eps"] = norm.keywords["eps"] if isinstance(norm, functools.partial) else 1e-6
    values = {key: _plain(value) for key, value in values.items()}
    defaults = DEFAULTS[cls.__name__]
    return {key: value for key, value in values.items() if key not in defaults or value != defaults[key]}


def _plain(value: Any) -> Any:
    if value is importlib.import_module("timm.layers").SwiGLUPacked:
        return "SwiGLUPacked"
    if inspect.isclass(value) or isinstance(value, functools.partial):
        return {"SiLU": "silu", "GELU": "gelu"}.get(_name(value), _name(value))
    return value


def _name(value: Any) -> str:
    value = value.func if isinstance(value, functools.partial) else value
    return value if isinstance(value, str) else str(value.__name__)


def randomised(architecture: str, arguments: Mapping[str, Any]) -> Any:
    """A model of timm's, all of whose parameters are random."""
    torch.manual_seed(0)
    model = library("timm").create_model(architecture, **arguments).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            factor = "gamma" in name or (p.dim() == 1 and name.endswith("weight"))
            p.copy_(torch.randn_like(p) * 0.2 + float(factor))
    return model


def saved(model: Any, folder: Path, *, safe: bool = True) -> None:
    """As timm saves a model for the Hub."""
    library("timm")
    importlib.import_module("timm.models").save_for_hf(model, folder, safe_serialization=safe)


@torch.no_grad()
def checked(folder: Path, summed: Sequence[str] = ()) -> Weights:
    """What timm has saved in `theirs`: read, compared with timm's own outputs, taken into a checkpoint of this program
    and back, and, without what is known of where it came from, to timm once more.

    Args:
        summed: ends of names of tensors whose sums are kept, and they are not.
    """
    theirs, images = folder / "theirs", {}
    with open_weights(theirs) as weights:
        assert weights.kind == "timm"
        images = images_for(weights.description)
        same(run(theirs, images), vitruvius.run_weights(weights, images))
        save_weights(weights, folder / "ours")
    with open_weights(folder / "ours") as ours:
        save_weights(ours, folder / "back", "timm")
        ours.description = replace(ours.description, origin=None)
        save_weights(ours, folder / "fresh", "timm")
    before, after = _tensors(theirs), load_file(folder / "back" / "model.safetensors")
    assert sorted(before) == sorted(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert all(name.endswith(tuple(summed)) for name in changed) and (changed or not summed), changed
    configs = [json.loads((f / "config.json").read_text()) for f in (theirs, folder / "back", folder / "fresh")]
    assert configs[0] == configs[1]
    for key in ("mean", "std", "interpolation", "crop_mode"):
        assert configs[2]["pretrained_cfg"][key] == configs[0]["pretrained_cfg"][key], key
    same(run(theirs, images), run(folder / "back", images))
    same(run(theirs, images), run(folder / "fresh", images))
    direct = library("timm").create_model(
        configs[2]["architecture"],
        **configs[2]["model_args"],
        checkpoint_path=folder / "fresh" / "model.safetensors",
    )
    assert direct.num_classes == configs[0]["num_classes"]
    return weights


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "model.safetensors"
    return load_file(file) if file.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)


def same(first: Outputs, second: Outputs) -> None:
    """Whether two outputs are equal but for rounding."""
    found = list(differences(first, second))
    assert len(found) == 1 + (first.logits is not None)
    for difference in found:
        assert difference.largest <= 1e-5 and difference.cosine > 1 - 1e-6, difference


_HEAD = '''"""Which arguments timm's architectures have: what names stand for that are functions in timm 1.0.31.

Those of its classes VisionTransformer, VisionTransformerDistilled (DeiT), SwinTransformer and Hiera, without what is
the class's default, also those with arguments that this program refuses. Made by `python -m
tests.model.formats.timm_models`, and compared with the timm that is installed by tests/model/formats/test_timm.py.
"""

from __future__ import annotations

from model.formats.timm.tables import read_tables

_TABLES = {
'''
_FOOT = '''}

ARCHITECTURES = read_tables(_TABLES)
"""By name: of the class, and arguments in the values of `model.formats.timm.arguments`."""
'''


def module() -> str:
    """The text of model/formats/timm/architectures.py."""
    tables: dict[str, list[str]] = {}
    for source in OURS:
        for name, cls, arguments in entry_points(source):
            words = [f"{k}={v!r}".replace(" ", "").replace("'", "") for k, v in plain(cls, arguments).items()]
            wrapped = textwrap.wrap(" ".join([name, *words]), 118, subsequent_indent="  ", break_on_hyphens=False)
            tables.setdefault(cls.__name__, []).extend(wrapped)
    sections = ['    "{}": """\n{}\n""",\n'.format(cls, "\n".join(lines)) for cls, lines in tables.items()]
    return _HEAD + "".join(sections) + _FOOT


if __name__ == "__main__":
    print(module(), end="")
