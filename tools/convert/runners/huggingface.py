"""transformers' own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.formats.sources import open_source
from tools.convert.libraries import library
from tools.convert.runners import Outputs

_BASES = {  # by the type of a config: the class without a classifier, and the one with
    "vit": ("ViTModel", "ViTForImageClassification"),
    "siglip": ("SiglipModel", "SiglipForImageClassification"),
    "siglip_vision_model": ("SiglipVisionModel", "SiglipForImageClassification"),
    "siglip2": ("Siglip2Model", "Siglip2ForImageClassification"),
    "siglip2_vision_model": ("Siglip2VisionModel", "Siglip2ForImageClassification"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification"),
    "dinov3_vit": ("DINOv3ViTModel", ""),
    "clip": ("CLIPModel", ""),
    "clip_vision_model": ("CLIPVisionModel", ""),
}


def run(path: Path, images: Tensor, texts: Tensor | None = None) -> Outputs:
    """Of a folder with `config.json`, by the class whose weights it has."""
    folder = path if path.is_dir() else path.parent
    model = load(folder)
    with torch.no_grad():
        return _outputs(model, images) if texts is None else _both(model, images, texts)


def load(folder: Path) -> Any:
    """The model, in fp32. Raises RuntimeError where the class wants other tensors than there are."""
    transformers, source = library("transformers"), open_source(folder)
    config = source.files["config.json"]
    plain, classifying = _BASES[config["model_type"]]
    name = classifying if "classifier.weight" in source.tensors else plain
    if config["model_type"] == "clip_vision_model" and "visual_projection.weight" in source.tensors:
        name = "CLIPVisionModelWithProjection"
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    model, found = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, **options
    )
    wrong = {key: sorted(found[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if found[key]}
    if wrong and options != {} and set(wrong) == {"unexpected_keys"}:  # a pooler, which was left out
        wrong = {} if all(key.startswith("pooler.") for key in wrong["unexpected_keys"]) else wrong
    if wrong:
        raise RuntimeError(f"{name} does not fit {folder}: {wrong}")
    return model.eval()


def _both(model: Any, images: Tensor, texts: Tensor) -> Outputs:
    given = _patches(images, model.config) if "Siglip2" in type(model).__name__ else {"pixel_values": images}
    found = model(**given, input_ids=texts)
    embeddings = [model.get_image_features(**given), model.get_text_features(input_ids=texts)]
    left, right = (side if isinstance(side, Tensor) else side.pooler_output for side in embeddings)
    return Outputs(left, found.logits_per_image, right)


def _outputs(model: Any, images: Tensor) -> Outputs:
    """Features as the classifier sees them; of a class with one also its logits."""
    name, config = type(model).__name__, model.config
    given = _patches(images, config) if "Siglip2" in name else {"pixel_values": images}
    if name in ("SiglipModel", "Siglip2Model", "CLIPModel"):
        pooled = model.vision_model(**given).pooler_output
        return Outputs(pooled, model.visual_projection(pooled) if name == "CLIPModel" else None)
    if name == "CLIPVisionModelWithProjection":
        return Outputs(model.vision_model(**given).pooler_output, model(**given).image_embeds)
    if not name.endswith("ForImageClassification"):
        found = model(**given)
        if name == "ViTModel":
            return Outputs(found.last_hidden_state[:, 0], None)
        pooled = found.pooler_output
        return Outputs(found.last_hidden_state.mean(1) if pooled is None else pooled, None)
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits = model(**given).logits
    return Outputs(seen[0], logits)


def _patches(images: Tensor, config: Any) -> dict[str, Tensor]:
    """As the processor of SigLIP 2 gives them: rows of numbers, each a patch by rows, columns and channels."""
    side = getattr(config, "vision_config", config).patch_size
    b, c, h, w = images.shape
    tiles = images.reshape(b, c, h // side, side, w // side, side).permute(0, 2, 4, 3, 5, 1)
    rows = tiles.reshape(b, -1, side * side * c)
    return {
        "pixel_values": rows,
        "pixel_attention_mask": torch.ones(b, rows.shape[1], dtype=torch.int64),
        "spatial_shapes": torch.tensor([[h // side, w // side]] * b),
    }
