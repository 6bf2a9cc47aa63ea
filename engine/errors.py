"""The ways a run can end early, and their exit codes (part of the interface that batch scripts rely on)."""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USAGE = 2
EXIT_STOPPED = 3  # on request, after saving: the same command goes on
EXIT_DIVERGED = 4
FINAL = (EXIT_USAGE, EXIT_STOPPED, EXIT_DIVERGED)  # another try would end alike, or is not wanted


class ConfigError(ValueError):
    """What the user asked for cannot be: the message says what was given, why it cannot be, and what would work."""


class DivergedError(RuntimeError):
    """Loss or gradients stayed NaN or Inf although steps were skipped, or the weights or what they give are."""


class DriftError(RuntimeError):
    """What several ranks have copies of is not the same on all of them: one has computed or kept something wrong."""


class OutputError(RuntimeError):
    """What a run must write cannot be written, and nothing that it could do instead would keep it."""
