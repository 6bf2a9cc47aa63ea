"""Contrastive losses over the pairs of all data ranks, in blocks, gradients in closed form (`docs/contrastive.md`)."""

from parallel.contrastive.affinity import affinity
from parallel.contrastive.momentum import momentum, queued
from parallel.contrastive.pairs import Gradients
from parallel.contrastive.positives import nt_xent, supervised, supervised_views
from parallel.contrastive.queue import KeyQueue
from parallel.contrastive.sigmoid import sigmoid
from parallel.contrastive.softmax import info_nce

__all__ = [
    "Gradients",
    "KeyQueue",
    "affinity",
    "info_nce",
    "momentum",
    "nt_xent",
    "queued",
    "sigmoid",
    "supervised",
    "supervised_views",
]
