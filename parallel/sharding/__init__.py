"""Flat parameter and gradient buckets, and how they are reduced and sharded over data-parallel ranks."""

from parallel.sharding.buckets import Bucket, BucketKind, GradientBuffer, Slot

__all__ = ["Bucket", "BucketKind", "GradientBuffer", "Slot"]
