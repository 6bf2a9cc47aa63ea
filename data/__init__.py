"""Where samples come from: data sets, their order, augmentation, and micro-batches. Knows nothing of models."""

from data.build import build_datasets
from data.config import DataConfig
from data.datasets import Dataset
from data.loader import Batch, EvalStream, TrainStream
from data.workers import WorkerLostError

__all__ = ["Batch", "DataConfig", "Dataset", "EvalStream", "TrainStream", "WorkerLostError", "build_datasets"]
