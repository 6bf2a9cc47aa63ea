"""What can go wrong with images once a run has begun."""

from __future__ import annotations


class UnreadableImageError(ValueError):
    """A file is no image that can be decoded: the message names it, the cause, and what to do."""
