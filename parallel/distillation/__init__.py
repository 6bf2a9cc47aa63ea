"""Losses between what a student and its teachers make of the same images (`docs/distillation.md`); knows no model.

Each gives this rank's share, in fp32: the sum over ranks is the whole. Nothing goes backward to a teacher.
"""

from parallel.distillation.embeddings import cosine_distance
from parallel.distillation.moments import Moments, end_step
from parallel.distillation.relations import gram_difference, map_divergence, relation_divergence
from parallel.distillation.rkd import ROWS_AT_ONCE, angle_difference, distance_difference
from parallel.distillation.sparse import Likeliest, likeliest, sparse_divergence
from parallel.distillation.split import resplit_heads, tokens_of_all
from parallel.distillation.standard import standard_logits

__all__ = [
    "ROWS_AT_ONCE",
    "Likeliest",
    "Moments",
    "angle_difference",
    "cosine_distance",
    "distance_difference",
    "end_step",
    "gram_difference",
    "likeliest",
    "map_divergence",
    "relation_divergence",
    "resplit_heads",
    "sparse_divergence",
    "standard_logits",
    "tokens_of_all",
]
