"""Where samples come from: data sets, their order, augmentation, and micro-batches. Knows nothing of models."""

from data.batch import Batch
from data.build import build_datasets, describe_datasets
from data.chosen import chosen_batches, pixels_of, spread
from data.config import DataConfig
from data.datasets import Dataset
from data.errors import BadSampleError, TooManyBadError, UnreadableImageError
from data.held_out_stream import EvalStream
from data.loader import StepBatches, TrainStream
from data.mixing import order_of
from data.portions import Circle, Cut, put_together
from data.reading import BadSample
from data.relay import Relay
from data.texts import Texts, TextShape, captions_fingerprint, prompts
from data.tokenizers import Tokenizer
from data.workers import WorkerLostError

__all__ = [
    "BadSample",
    "BadSampleError",
    "Batch",
    "Circle",
    "Cut",
    "DataConfig",
    "Dataset",
    "EvalStream",
    "Relay",
    "StepBatches",
    "TextShape",
    "Texts",
    "Tokenizer",
    "TooManyBadError",
    "TrainStream",
    "UnreadableImageError",
    "WorkerLostError",
    "build_datasets",
    "captions_fingerprint",
    "chosen_batches",
    "describe_datasets",
    "order_of",
    "pixels_of",
    "prompts",
    "put_together",
    "spread",
]
