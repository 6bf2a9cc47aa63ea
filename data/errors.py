"""What can go wrong with images once a run has begun."""

from __future__ import annotations


class UnreadableImageError(ValueError):
    """A file is no image that can be decoded: the message names it, the cause, and what to do."""


class BadSampleError(UnreadableImageError):
    """That is a fault of the sample, alike wherever it is read: another can take its place."""


class TooManyBadError(UnreadableImageError):
    """More samples are bad than may be: nothing is to be drawn in their place."""
