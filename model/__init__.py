"""What a Vision Transformer is. Sees ranks only through the layers that `parallel` gives it."""

from model.build import Build, check_parallel
from model.config import ModelConfig, StageConfig
from model.inputs import MicroBatch
from model.layers import LayerSpec, build_layers, training_flops
from model.precision import Precision
from model.presets import PRESETS
from model.stage import Stage
from model.vit import VisionTransformer

__all__ = [
    "PRESETS",
    "Build",
    "LayerSpec",
    "MicroBatch",
    "ModelConfig",
    "Precision",
    "Stage",
    "StageConfig",
    "VisionTransformer",
    "build_layers",
    "check_parallel",
    "training_flops",
]
