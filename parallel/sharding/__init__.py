"""Flat buckets of parameters and gradients, and what of them is shared out over ranks: ZeRO stages 0 to 3."""

from parallel.sharding.fragments import Fragment, Fragments, Group, Holding, Span
from parallel.sharding.pieces import StatePiece
from parallel.sharding.plan import ShardingPolicy
from parallel.sharding.store import ParameterStore

__all__ = ["Fragment", "Fragments", "Group", "Holding", "ParameterStore", "ShardingPolicy", "Span", "StatePiece"]
