"""Two towers as one ordered list of layers, image first: `image.embed` ... `image.head`, `text.embed` ... `text.head`,
`pair`.

The image's embedding rides along the text tower's layers, so that stages may be cut anywhere; or there is one tower,
which is given two views of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Literal

import torch

from model.build import Build, Tower, check_parallel
from model.config import ModelConfig
from model.embed import Embedding
from model.heads import Head, pooled_features
from model.inputs import MicroBatch
from model.layers import LayerSpec, block_layers, head_gives, measured
from model.pair import Pair
from model.predictor import Predictor
from model.projection import ProjectedHead, Projection
from model.text import TextConfig
from model.text_layers import TextEmbedding, TextHead

IMAGE, TEXT, PAIR, PREDICTOR = "image", "text", "pair", "predictor"
TOWERS = (IMAGE, TEXT)
"""What the names of layers may begin with."""


def build_towers(
    image: ModelConfig,
    text: TextConfig | None,
    *,
    embedding: int,
    projection: Projection = "linear",
    projection_bias: bool = False,
    temperature: float = 0.07,
    learn_temperature: bool = True,
    max_logit_scale: float = 100.0,
    bias: float | None = None,
    predictor: int = 0,
    local_crops: int = 0,
) -> list[LayerSpec]:
    """The layers of contrastive training, in order, measured as `model.build_layers` does.

    Args:
        image: resolved; its classifier is replaced by the projection. text: resolved; None: two views of each image,
            first views before second ones in a micro-batch. embedding: features of both towers' embeddings.
            projection: from pooled features to them, unless the text tower has its own. projection_bias: of
            the image's, if it is linear; the text tower has a key of its own. temperature: at the start.
            learn_temperature: whether it is trained. max_logit_scale: bound of its inverse. bias: of logits, at the
            start; None: none. predictor: of two views, hidden features of what turns queries into guesses of keys; 0:
            nothing does. local_crops: views of each image beside these two, behind them in a micro-batch.

    Raises:
        ValueError: a tower without a projection whose features are not the embedding's.
    """
    return list(
        _towers(
            image, text, embedding, projection, projection_bias=projection_bias, temperature=temperature,
            learns=learn_temperature, most=max_logit_scale, bias=bias, predictor=predictor, local_crops=local_crops,
        )
    )  # fmt: skip


@cache
def _towers(
    image: ModelConfig,
    text: TextConfig | None,
    embedding: int,
    projection: Projection,
    *,
    projection_bias: bool,
    temperature: float,
    learns: bool,
    most: float,
    bias: float | None,
    predictor: int,
    local_crops: int,
) -> tuple[LayerSpec, ...]:
    """Measured once in a process."""
    views = 2 + local_crops if text is None else 1
    layers = image_tower(image, embedding, projection, projection_bias=projection_bias, views=views)
    if predictor:
        before = layers[-1]
        guess = partial(Predictor, embedding=embedding, hidden=predictor, is_share=before.gives == "shares")
        layers.append(replace(before, name=PREDICTOR, factory=guess, gives="vectors", reads=()))
    ends = layers[-1:]
    if text is not None:
        layers += text_tower(text, embedding, projection, rides=(layers[-1].name,))
        ends = [*ends, layers[-1]]
    pair = partial(
        Pair, embedding=embedding, shares=tuple(end.gives == "shares" for end in ends), temperature=temperature,
        learns=learns, most=most, bias=bias, local_crops=local_crops,
    )  # fmt: skip
    rides = tuple(end.name for end in ends[:-1])
    layers.append(LayerSpec(name=PAIR, factory=pair, gives="vectors", rides=rides, joins=True, per_sample=views))
    sizes = image.sizes
    images = torch.empty(views, sizes.channels, *sizes.image, device="meta")
    texts = None
    if text is not None and text.context_length is not None:
        texts = torch.zeros(1, text.context_length, dtype=torch.int64, device="meta")
    return tuple(measured(layers, Build(config=image), MicroBatch.of(images, texts)))


def image_tower(
    image: ModelConfig, embedding: int, projection: Projection, *, projection_bias: bool = False, views: int = 1,
    name: str = IMAGE,
) -> list[LayerSpec]:  # fmt: skip
    """`image.embed` to `image.head`, not measured. Arguments as of `build_towers`; views: of each sample. name: of the
    tower."""
    config = projected(image, embedding, projection, projection_bias=projection_bias)
    _check_width(pooled_features(Build(config=config)), embedding, projection, "contrastive.projection", "image")
    head = partial(ProjectedHead, outputs=embedding) if projection == "mlp" else Head
    layers = [
        LayerSpec(name="embed", factory=Embedding, reads=("images",)),
        *block_layers(config, f"{name}."),
        LayerSpec(name="head", factory=head, stage=config.sizes.last.index, gives=head_gives(config)),
    ]
    tower = Tower(name=name, config=config)
    return [replace(spec, name=_under(name, spec.name), tower=tower, per_sample=views) for spec in layers]


def projected(
    image: ModelConfig, embedding: int, projection: Projection, *, projection_bias: bool = False
) -> ModelConfig:
    """The image tower as a model by itself, whose classifier is a linear projection. Arguments as of `build_towers`."""
    linear = projection == "linear"
    bias = projection_bias if linear else image.classifier_bias
    return replace(image, num_classes=embedding if linear else 0, classifier_bias=bias, head_bias=None)


def text_tower(
    text: TextConfig, embedding: int, projection: Projection, *, rides: tuple[str, ...] = (), name: str = TEXT
) -> list[LayerSpec]:
    """`text.embed` to `text.head`, not measured. Arguments as of `build_towers`; rides: as of LayerSpec. name: of the
    tower."""
    projection = text.projection or projection
    config = text.model(embedding, projection)
    _check_width(config.sizes.last.width, embedding, projection, "text.projection", "text")
    assert text.pool is not None and text.end_token is not None and text.vocabulary_size is not None
    head = partial(
        TextHead, pool=text.pool, end_token=text.end_token, projection=projection, outputs=embedding
    )  # fmt: skip
    reads: tuple[Literal["texts"], ...] = () if text.pool == "last" else ("texts",)
    layers = [
        LayerSpec(
            name="embed", factory=partial(TextEmbedding, vocabulary=text.vocabulary_size), reads=("texts",),
            begins=bool(rides),
        ),
        *block_layers(config, f"{name}."),
        LayerSpec(name="head", factory=head, gives=head_gives(config), reads=reads),
    ]  # fmt: skip
    tower = Tower(name=name, config=config, shares_tokens=False)
    return [replace(spec, name=_under(name, spec.name), tower=tower, rides=rides) for spec in layers]


def _under(tower: str, name: str) -> str:
    return name if name.startswith(f"{tower}.") else f"{tower}.{name}"


def _check_width(features: int, embedding: int, projection: Projection, key: str, tower: str) -> None:
    if projection == "none" and features != embedding:
        raise ValueError(
            f"{key} is none, but the {tower} tower's pooled features are {features} and contrastive.embedding is "
            f"{embedding}: set that to {features}, or take projection linear or mlp"
        )


def check_towers(layers: Sequence[LayerSpec], tensor_size: int, context_size: int = 1) -> None:
    """Raise ValueError where towers cannot be split over this many tensor- and context-parallel ranks."""
    for tower in dict.fromkeys(spec.tower for spec in layers if spec.tower is not None):
        try:
            check_parallel(tower.config, tensor_size, context_size if tower.shares_tokens else 1)
        except ValueError as error:
            own = str(error).replace("model.num_classes", "contrastive.embedding")
            if tower.frozen:
                raise ValueError(f"of the {tower.name} tower {own.replace('model.', '')}") from error
            raise ValueError(own.replace("model.", "text.") if tower.name == TEXT else own) from error
    for spec in layers:
        given = getattr(spec.factory, "keywords", {})
        for name, key in (("vocabulary", "text.vocabulary_size"), ("hidden", "contrastive.predictor")):
            if (size := given.get(name, tensor_size)) < tensor_size:
                raise ValueError(
                    f"{key} {size} cannot be split over parallel.tensor_parallel_size {tensor_size}: use a size of at "
                    f"most {size}"
                )
