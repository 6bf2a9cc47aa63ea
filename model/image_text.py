"""Both towers on one process: an ordinary module for anybody's training loop or tools."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from model.build import Build
from model.config import ModelConfig
from model.formats.api import open_weights
from model.formats.base import ConversionError, Description, Pairing
from model.formats.weights import Which
from model.inputs import MicroBatch
from model.kernels import Backend, Kernels
from model.layers import LayerSpec
from model.pretrained import Pretrained
from model.projection import Projection
from model.stage import Stage
from model.text import TextConfig
from model.towers import IMAGE, PAIR, TEXT, build_towers


class ImageText(Pretrained, Stage):
    """An image tower and a text tower on one process, with their initial weights, for use outside the engine.

    It computes in the format of its weights (`.bfloat16()`, `.half()`, `.double()`); embeddings are normalised in fp32
    at least. In training mode drop-path draws from torch's generator, anew at each call.

    Args:
        image, text: resolved or not. embedding, projection, projection_bias, temperature, learn_temperature,
            max_logit_scale, bias: as of `build_towers`. seed: of the weights; None: they are whatever is in memory, to
            be filled. device: where it lives. kernels: which form of them runs.

    Example:
        >>> image, text = ModelConfig(preset="vit_ti16"), TextConfig(width=192, depth=4, num_heads=3)
        >>> model = ImageText(image, text, embedding=128)
        >>> texts = torch.full((2, 77), 257)  # of the end token alone
        >>> left, right, scale, bias = model(torch.randn(2, 3, 224, 224), texts)
        >>> (scale * left @ right.T + bias).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        image: ModelConfig,
        text: TextConfig,
        *,
        embedding: int,
        projection: Projection = "linear",
        projection_bias: bool = False,
        temperature: float = 0.07,
        learn_temperature: bool = True,
        max_logit_scale: float = 100.0,
        bias: float | None = None,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
    ) -> None:
        image, text = image.resolve(), text.resolve()
        layers = build_towers(
            image, text, embedding=embedding, projection=projection, projection_bias=projection_bias,
            temperature=temperature, learn_temperature=learn_temperature, max_logit_scale=max_logit_scale, bias=bias,
        )  # fmt: skip
        super().__init__(layers, Build(config=image, seed=seed or 0, kernels=Kernels(kernels)))
        self.text_config = text
        pairing = Pairing(
            text=text, loss="infonce" if bias is None else "sigmoid", embedding=embedding, projection=projection,
            projection_bias=projection_bias, temperature=temperature, bias=bias,
            max_logit_scale=0.0 if math.isinf(max_logit_scale) else max_logit_scale,
        )  # fmt: skip
        model = replace(image, num_classes=0, classifier_bias=None, head_bias=None).resolve()
        self._description = Description(model=model, pairing=pairing)
        self._materialise(seed, device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        kind: str = "auto",
        *,
        config: str | Path | None = None,
        weights: Which = "weights",
        leave_out: Sequence[str] = (),
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
    ) -> ImageText:
        """Both towers with the weights of a checkpoint: of a contrastive run, or of another library's whole model.

        Args:
            path, kind, config, weights, leave_out, device, kernels: as of `VisionTransformer.from_pretrained`.

        Raises:
            ValueError: there is none, it is damaged, has one tower, or has what these have not; by name.
        """
        source = open_weights(
            Path(path), kind, config=None if config is None else Path(config), leave_out=leave_out, which=weights,
            whole=True,
        )  # fmt: skip
        with source as found:
            return cls.described(found.description, path=path, device=device, kernels=kernels)._filled(found)

    @classmethod
    def described(
        cls,
        description: Description,
        *,
        path: str | Path = "it",
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
    ) -> ImageText:
        """Both towers of a description, to be filled. Raises ConversionError if it is of one model.

        Args:
            path: that it describes, for the message. device, kernels: as of the class.
        """
        if (p := description.pairing) is None:
            raise ConversionError(
                f"{path} is one model of images, without a text tower: VisionTransformer.from_pretrained takes it"
            )
        model = cls(
            description.model, p.text, embedding=p.embedding, projection=p.projection,
            projection_bias=p.projection_bias, temperature=p.temperature, bias=p.bias,
            max_logit_scale=p.max_logit_scale or math.inf, seed=None, device=device, kernels=kernels,
        )  # fmt: skip
        model._description = description
        return model

    def forward(  # type: ignore[override]
        self, images: Tensor | MicroBatch, texts: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """[B, C, H, W] and tokens [B, S], or a micro-batch of both, whose sample ids drop-path goes by.

        Returns:
            Embeddings of unit length, image [B, E] and text [B, E], and what their products become logits with:
            scale [] and bias [].

        Raises:
            ValueError: there is not one text for each image.
        """
        batch = images if isinstance(images, MicroBatch) else MicroBatch.of(images, texts, training=self.training)
        if batch.images is None or batch.texts is None or len(batch.images) != len(batch.texts):
            counts = [0 if given is None else len(given) for given in (batch.images, batch.texts)]
            raise ValueError(
                f"there are {counts[0]} images and {counts[1]} texts: give one text for each image; encode_image and "
                "encode_text take as many as you like"
            )
        flow: tuple[Tensor, ...] = ()
        for spec in self.specs:
            flow = self._run(spec, flow, batch)
        return flow

    def encode_image(self, images: Tensor, *, normalize: bool = False) -> Tensor:
        """[B, C, H, W] -> [B, E], of unit length if they are to be."""
        found = self.tower(IMAGE, MicroBatch.of(images, None, training=self.training))
        return F.normalize(found, dim=1) if normalize else found

    def encode_text(self, texts: Tensor, *, normalize: bool = False) -> Tensor:
        """Tokens [B, S], filled up at the right -> [B, E], of unit length if they are to be."""
        found = self.tower(TEXT, MicroBatch.of(None, texts, training=self.training))
        return F.normalize(found, dim=1) if normalize else found

    def tower(self, name: str, batch: MicroBatch) -> Tensor:
        """What a tower, `image` or `text`, makes of its part of a micro-batch [B, E]."""
        flow: tuple[Tensor, ...] = ()
        for spec in self.specs:
            if spec.tower is not None and spec.tower.name == name:
                flow = self._run(spec, flow, batch)
        return flow[0]

    def _run(self, spec: LayerSpec, flow: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """In the format of the weights."""
        given, rides = spec.parted(flow)
        layer = self.get_submodule(spec.name)
        if spec.name == PAIR:
            joined: tuple[Tensor, ...] = layer(given, batch, rides)
            return joined
        dtype = next(w for w in (*layer.parameters(), *self.parameters()) if w.dim() == 2).dtype
        return (layer(None if given is None else given.to(dtype), batch), *rides)
