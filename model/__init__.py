"""What a Vision Transformer is. Sees ranks only through the layers that `parallel` gives it."""

from model.build import Build, Tower, check_parallel
from model.config import ModelConfig, StageConfig
from model.image_text import ImageText
from model.inputs import MicroBatch
from model.layers import LayerSpec, build_layers, makers, ride_of, training_flops
from model.matching import EMBEDDINGS, FEATURES, RELATIONS
from model.packing import Packing
from model.precision import Precision
from model.presets import PRESETS
from model.stage import Stage
from model.stored import StoredTeacher
from model.targets import Shares
from model.taught_towers import TowersTeacher, build_taught_towers
from model.teachers import MATCH, TEACHER, Matching, Pixels, Teacher, build_student, build_teacher, student_layers
from model.text import TEXT_PRESETS, TextConfig
from model.towers import TOWERS, build_towers, check_towers
from model.vit import VisionTransformer

__all__ = [
    "EMBEDDINGS",
    "FEATURES",
    "MATCH",
    "PRESETS",
    "RELATIONS",
    "TEACHER",
    "TEXT_PRESETS",
    "TOWERS",
    "Build",
    "ImageText",
    "LayerSpec",
    "Matching",
    "MicroBatch",
    "ModelConfig",
    "Packing",
    "Pixels",
    "Precision",
    "Shares",
    "Stage",
    "StageConfig",
    "StoredTeacher",
    "Teacher",
    "TextConfig",
    "Tower",
    "TowersTeacher",
    "VisionTransformer",
    "build_layers",
    "build_student",
    "build_taught_towers",
    "build_teacher",
    "build_towers",
    "check_parallel",
    "check_towers",
    "makers",
    "ride_of",
    "student_layers",
    "training_flops",
]
