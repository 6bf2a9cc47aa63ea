"""Both towers on one process: an ordinary module for anybody's training loop or tools."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.build import Build
from model.config import ModelConfig
from model.inputs import MicroBatch
from model.kernels import Backend, Kernels
from model.layers import LayerSpec
from model.projection import Projection
from model.stage import Stage
from model.text import TextConfig
from model.towers import IMAGE, PAIR, TEXT, build_towers
from parallel.layout import attach_info, info_of
from parallel.random import initialise


class ImageText(Stage):
    """An image tower and a text tower on one process, with their initial weights, for use outside the engine.

    It computes in the format of its weights (`.bfloat16()`, `.half()`, `.double()`); embeddings are normalised in fp32
    at least. In training mode drop-path draws from torch's generator, anew at each call.

    Args:
        image, text: resolved or not. embedding, projection, temperature, learn_temperature, max_logit_scale, bias: as
            of `build_towers`. seed: of the weights. device: where it lives. kernels: which form of them runs.

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
        temperature: float = 0.07,
        learn_temperature: bool = True,
        max_logit_scale: float = 100.0,
        bias: float | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
    ) -> None:
        image, text = image.resolve(), text.resolve()
        layers = build_towers(
            image, text, embedding=embedding, projection=projection, temperature=temperature,
            learn_temperature=learn_temperature, max_logit_scale=max_logit_scale, bias=bias,
        )  # fmt: skip
        super().__init__(layers, Build(config=image, seed=seed, kernels=Kernels(kernels)))
        self.text_config = text
        for name, meta in list(self.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(torch.empty(meta.shape, device=device), requires_grad=meta.requires_grad)
            attach_info(parameter, info_of(meta))
            setattr(self.get_submodule(owner), leaf, parameter)
        initialise(self, seed)
        self.to(device)

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
        return self._encode(IMAGE, MicroBatch.of(images, None, training=self.training), normalize)

    def encode_text(self, texts: Tensor, *, normalize: bool = False) -> Tensor:
        """Tokens [B, S], filled up at the right -> [B, E], of unit length if they are to be."""
        return self._encode(TEXT, MicroBatch.of(None, texts, training=self.training), normalize)

    def _encode(self, tower: str, batch: MicroBatch, normalize: bool) -> Tensor:
        flow: tuple[Tensor, ...] = ()
        for spec in self.specs:
            if spec.tower is not None and spec.tower.name == tower:
                flow = self._run(spec, flow, batch)
        return F.normalize(flow[0], dim=1) if normalize else flow[0]

    def _run(self, spec: LayerSpec, flow: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """In the format of the weights."""
        given, rides = spec.parted(flow)
        layer = self.get_submodule(spec.name)
        if spec.name == PAIR:
            joined: tuple[Tensor, ...] = layer(given, batch, rides)
            return joined
        dtype = next(w for w in (*layer.parameters(), *self.parameters()) if w.dim() == 2).dtype
        return (layer(None if given is None else given.to(dtype), batch), *rides)
