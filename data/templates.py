"""The templates that captions and prompts are made of unless the user gives others, and the names of classes in them.

Texts are short: a text tower's time goes by its tokens, and bytes are many.
"""

from __future__ import annotations

from data.captions import ATTRIBUTES, Captions, TemplateCaptions, read_templates
from data.config import DataConfig
from data.datasets import Dataset

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# What photographs of data.kind textures show, by the names of their files.
_TEXTURES = {
    "brick": "brick wall",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "hubble_deep_field": "galaxies",
    "ihc": "stained tissue",
    "moon": "moon",
    "motorcycle_left": "motorcycle",
    "page": "printed page",
    "retina": "retina",
    "rocket": "rocket",
    "text": "formulas",
}

# The last template says most. Of prompts, each is true of any image that was not augmented.
_TEMPLATES = {
    "digits": (
        "{class}",
        "the digit {class}",
        "a {scale} {class}",
        "a {brightness} {class}",
        "{class}, {orientation}",
        "a {scale} {class}, {orientation}",
        "a {scale} {brightness} {class}, {orientation}",
    ),
    "textures": (
        "{class}",
        "{class} up close",
        "a photo of {class}",
        "{brightness} {class}",
        "{class}, {orientation}",
        "{class}, {scale}, {orientation}",
        "{class}, {scale} and {brightness}, {orientation}",
    ),
}
_PROMPTS = {
    "digits": ("{class}", "the digit {class}", "a medium {class}", "{class}, upright"),
    "textures": ("{class}", "{class} up close", "a photo of {class}", "{class}, upright"),
}

# After CLIP's (Radford et al., 2021), of those that suit any picture.
_PHOTOS = (
    "{class}",
    "a photo of {class}",
    "a photo of a {class}",
    "a close-up photo of a {class}",
    "a bright photo of a {class}",
    "a cropped photo of the {class}",
    "a picture of the {class}",
)


def captions_of(dataset: Dataset, config: DataConfig) -> Captions:
    """What can be said of a set whose classes are all that is known of its images.

    Raises:
        ValueError: for files of templates that are none.
    """
    templates: tuple[str, ...] = _TEMPLATES.get(config.kind, _PHOTOS)
    if config.templates is not None:
        templates = read_templates(config.templates, "data.templates", ATTRIBUTES)
    names = class_words(dataset, config.kind)
    return TemplateCaptions(names=names, templates=templates, class_prompts=class_prompts(config))


def class_prompts(config: DataConfig) -> tuple[str, ...]:
    """The templates of zero-shot classification.

    Raises:
        ValueError: for a file of templates that is none.
    """
    if config.prompts is None:
        return _PROMPTS.get(config.kind, _PHOTOS)
    return read_templates(config.prompts, "data.prompts", ())


def class_words(dataset: Dataset, kind: str) -> tuple[str, ...]:
    """The names of classes as a text has them: folders' names without underscores, numbers of nameless ones."""
    if kind == "digits":
        return _DIGITS
    if dataset.class_names is None:
        return tuple(f"class {number}" for number in range(dataset.num_classes))
    return tuple(_TEXTURES.get(name, name) if kind == "textures" else _spoken(name) for name in dataset.class_names)


def _spoken(name: str) -> str:
    return " ".join(name.replace("_", " ").split()) or name
