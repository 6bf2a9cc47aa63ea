"""What is said of an image: captions made from templates, true of the very pixels that a model is shown.

A caption tells the class, and what augmentation did to the image: how it is turned, how large and how bright it is. The
same keyed numbers that augment an image choose these words (data.augment), so that no caption describes what is not
there, in whatever layout and order images are read.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

CHOICES = 2
"""Uniform numbers that a caption is drawn with."""

_SLIGHT, _QUARTER, _OVER = 4, 45, 135  # degrees
_LARGER, _BRIGHTER = 1.05, 1.1  # ratios


@dataclass(frozen=True, kw_only=True)
class Look:
    """How an image looks beside its source, by what was done to it.

    Attributes:
        turned: degrees, counter-clockwise. scale: above 1, things are larger. brightness: above 1, brighter.
    """

    turned: float = 0.0
    scale: float = 1.0
    brightness: float = 1.0

    def words(self) -> dict[str, str]:
        """One for each of ATTRIBUTES."""
        scale = _degree(self.scale, _LARGER, ("small", "medium", "big"))
        brightness = _degree(self.brightness, _BRIGHTER, ("dim", "grey", "bright"))
        return dict(zip(ATTRIBUTES, (_orientation(self.turned), scale, brightness), strict=True))


ATTRIBUTES = ("orientation", "scale", "brightness")
"""What templates may say of an image, beside its class."""


def _orientation(turned: float) -> str:
    degrees = (turned + 180) % 360 - 180
    side = "left" if degrees > 0 else "right"
    if abs(degrees) < _SLIGHT:
        return "upright"
    if abs(degrees) < _QUARTER:
        return f"leaning {side}"
    return f"turned {side}" if abs(degrees) < _OVER else "upside down"


def _degree(ratio: float, threshold: float, words: tuple[str, str, str]) -> str:
    return words[int(ratio > 1 / threshold) + int(ratio >= threshold)]


class Captions(Protocol):
    """What can be said of the images of a set."""

    def one(self, index: int, label: int, look: Look, choices: NDArray[np.float32], turn: int = 0) -> str:
        """A caption of image `index` that looks so.

        Args:
            choices: numbers in [0, 1), [CHOICES], to choose a template by, and the first of what somebody has written.
            turn: how many times the image came right before: of what is written the next ones follow.
        """
        ...

    def every(self, index: int, label: int, look: Look) -> Sequence[str]:
        """All captions of an image, if somebody has written them; else the one that says most."""
        ...

    @property
    def tell_looks(self) -> bool:
        """Whether they say what augmentation has made of an image."""
        return False

    def prompts(self) -> list[list[str]] | None:
        """Of each class, what could be said of any image of it; None where there are no classes."""
        ...

    @property
    def fingerprint(self) -> bytes:
        """All that captions depend on: for ranks to see that theirs are the same."""
        ...


@dataclass(frozen=True, kw_only=True)
class TemplateCaptions(Captions):
    """Captions by templates: `a {scale} {class}, {orientation}`.

    Attributes:
        names: of each class, as a text has it. templates: with `{class}` or `{}`, and words for what an image looks
            like. class_prompts: templates of what is true of every image of a class. The last template says most.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...]
    class_prompts: tuple[str, ...]

    def one(self, index: int, label: int, look: Look, choices: NDArray[np.float32], turn: int = 0) -> str:
        """As Captions."""
        return _fill(self.templates[int(choices[0] * len(self.templates))], self.names[label], look.words())

    def every(self, index: int, label: int, look: Look) -> Sequence[str]:
        """As Captions."""
        return (_fill(self.templates[-1], self.names[label], look.words()),)

    @property
    def tell_looks(self) -> bool:
        """As Captions."""
        return any(f"{{{word}}}" in template for template in self.templates for word in ATTRIBUTES)

    def prompts(self) -> list[list[str]]:
        """As Captions."""
        return [[_fill(prompt, name, {}) for prompt in self.class_prompts] for name in self.names]

    @property
    def fingerprint(self) -> bytes:
        """As Captions."""
        return repr((self.names, self.templates, self.class_prompts)).encode()


@dataclass(frozen=True, kw_only=True)
class GivenCaptions(Captions):
    """Captions that somebody has written, of each image one or several.

    Attributes:
        classes: what can be said of the classes, where there are any.
    """

    classes: TemplateCaptions | None

    def one(self, index: int, label: int, look: Look, choices: NDArray[np.float32], turn: int = 0) -> str:
        """As Captions."""
        found = self.every(index, label, look)
        return found[(int(choices[1] * len(found)) + turn) % len(found)]

    def prompts(self) -> list[list[str]] | None:
        """As Captions."""
        return None if self.classes is None else self.classes.prompts()


def _fill(template: str, name: str, words: dict[str, str]) -> str:
    return template.format(name, **{"class": name}, **words)


def read_templates(path: str, key: str, words: Sequence[str]) -> tuple[str, ...]:
    """The templates of a file, one a line; empty lines and those that begin with # are none.

    Args:
        key: the option that gave the file. words: what templates may name, beside `{class}` and `{}`.

    Raises:
        ValueError: for a file that cannot be read, has none, or a line that is no template.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise ValueError(f"{key}={path} cannot be read ({error}): give a text file, one template a line") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    found = [(number, line) for number, line in found if line and not line.startswith("#")]
    if not found:
        raise ValueError(f"{key}={path} has no templates: write one a line, such as `a photo of a {{class}}`")
    for number, line in found:
        if (wrong := _wrong_with(line, words)) is not None:
            raise ValueError(f"{key}={path}, line {number}: {line!r} {wrong}")
    return tuple(line for _, line in found)


def _wrong_with(template: str, words: Sequence[str]) -> str | None:
    try:
        fields = [name for _, name, *_ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        return f"is no template ({error}): write {{{{ and }}}} for braces that are meant"
    known = ("class", *words)
    unknown = [name for name in fields if name and name not in known]
    if unknown:
        return f"names {{{unknown[0]}}}: there are {', '.join(f'{{{name}}}' for name in known)}"
    if not {"", "class"} & set(fields) or fields.count("") > 1:
        return "must name the class once, as {class} or {}"
    return None
