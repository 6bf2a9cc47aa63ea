"""The whole model on one process: an ordinary module for anybody's training loop or tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from model.build import Build
from model.checks import check_packed
from model.config import ModelConfig
from model.embed import unfold
from model.formats.api import open_weights
from model.formats.base import Description
from model.formats.weights import Which
from model.inputs import MicroBatch
from model.kernels import Backend, Kernels
from model.layers import build_layers
from model.packing import Packing
from model.pretrained import Pretrained
from model.resize import resize_weights
from model.seeing.capture import Attended, Numbers, Queries, RowsTap, choose, joined
from model.stage import Layers
from model.taps import tapped, tapping

_MOST_SIZES = 16  # of images, whose tables of windows and positions are kept


class VisionTransformer(Pretrained, Layers):
    """The whole model on one process, with its initial weights, for use outside the engine.

    It computes in the format of its weights (`.bfloat16()`, `.half()`, `.double()`), or in that of torch.autocast, with
    the statistics of norms and softmax in fp32 at least, as in the engine. In training mode drop-path draws from
    torch's generator, anew at each call.

    Args:
        config: resolved or not. seed: of the weights; None: they are whatever is in memory, to be
            filled. device: where it lives. kernels: which form of them runs;
            `reference` is plain PyTorch, which every exporter knows.
        dynamic_image_size: whether images of other sizes are taken, with learned positions interpolated (bicubic), the
            others computed. Without, they are a ValueError.

    Example:
        >>> model = VisionTransformer(ModelConfig(preset="vit_ti16"))
        >>> model(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int | None = 0,
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
        dynamic_image_size: bool = False,
    ) -> None:
        config = config.resolve()
        build = Build(config=config, seed=seed or 0, kernels=Kernels(kernels))
        super().__init__(build_layers(config), build)
        self.dynamic_image_size = dynamic_image_size
        self._description = Description(model=config)
        self._other_sizes: dict[tuple[object, ...], Layers] = {}
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
        given: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
        kernels: Backend = "auto",
        dynamic_image_size: bool = False,
    ) -> VisionTransformer:
        """A model with the weights of a checkpoint, of this program or of another library (docs/conversion.md).

        Weights are fp32, whatever they are stored as. Nothing is downloaded, no code is run, and the other library need
        not be installed.

        Args:
            path: of a file or a folder. kind: one of `tools.convert`, or `auto`: it is recognised. config: their
                `config.json`, if it is not beside the tensors. weights: or `average`, of a run with a moving average.
            leave_out: patterns of names of tensors there that may be dropped. given: keys of the model for what the
                checkpoint does not say. device, kernels, dynamic_image_size: as for the class.

        Raises:
            ValueError: there is none, it is damaged, or it has what this model has not; by name.
        """
        source = open_weights(
            Path(path),
            kind,
            config=None if config is None else Path(config),
            given=given,
            leave_out=leave_out,
            which=weights,
        )
        with source as found:
            model = cls(
                found.description.model,
                seed=None,
                device=device,
                kernels=kernels,
                dynamic_image_size=dynamic_image_size,
            )
            return model._filled(found)

    @property
    def embeds(self) -> bool:
        """Whether what it gives are no logits of classes but features to be compared: its classifier is the projection
        of a tower."""
        return self._description.embeds

    def forward(self, images: Tensor | MicroBatch) -> Tensor:
        """[B, C, H, W], or a micro-batch, whose sample ids drop-path goes by -> logits [B, classes]; pooled features
        [B, D] of a model without classes."""
        batch = images if isinstance(images, MicroBatch) else MicroBatch.of_images(images, training=self.training)
        geometry, x = self._geometry(batch), None
        for spec in self.specs:
            x = self._run(spec.name, geometry, x, batch)
        assert x is not None
        return x

    def packed(self, images: Sequence[Tensor]) -> Tensor:
        """Images of several sizes in one pass, each at its own and none seeing another, with positions interpolated.

        Args:
            images: [C, H, W] of each. Sides that do not fill a patch are filled up with zeros.

        Returns:
            Logits, or pooled features, of each: [B, classes]. As of a model with `dynamic_image_size`, one by one.

        Raises:
            ValueError: the model is a pyramid, or its attention is not full.
        """
        check_packed(self.config)
        patch, prefix = self.sizes.patch, self.sizes.prefix
        patches = torch.cat([unfold(image[None], patch)[0] for image in images])
        maps = tuple((-(-image.shape[1] // patch), -(-image.shape[2] // patch)) for image in images)
        packing = Packing(maps, prefix, len(patches) + prefix * len(maps), patches.device)
        batch = MicroBatch.of_images(patches.new_zeros(len(maps), 0), training=self.training)
        y: Tensor = self(replace(batch, images=patches, packing=packing))
        return y

    def logits(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes], or pooled features: calls the model."""
        y: Tensor = self(images)
        return y

    def features(self, images: Tensor) -> list[tuple[Tensor, int]]:
        """The map of each stage of the pyramid (one, without a pyramid), after its last block, for dense tasks.

        Args:
            images: [B, C, H, W].

        Returns:
            ([B, D, rows, cols], stride in pixels) of each stage, from fine to coarse; prefix tokens are left out.
        """
        batch = MicroBatch.of_images(images, training=self.training)
        geometry, x, maps = self._geometry(batch), None, []
        for spec, following in zip(self.specs[:-1], self.specs[1:], strict=True):
            x = self._run(spec.name, geometry, x, batch)
            if following.name == "head" or following.stage != spec.stage:
                here = geometry.sizes.stages[spec.stage]
                patches = x.unflatten(0, (batch.size, -1))[:, self.sizes.prefix :]
                maps.append((patches.transpose(1, 2).unflatten(2, (here.rows, here.cols)), here.stride))
        return maps

    @torch.no_grad()
    def capture(
        self,
        images: Tensor,
        *,
        layers: Sequence[str | int] | None = None,
        heads: Numbers = None,
        queries: Queries = "all",
    ) -> dict[str, Attended]:
        """What tokens attend to in evaluation: rows of attention by layer, fp32, whatever kernels run (docs/seeing.md).

        Args:
            images: [B, C, H, W]. layers, heads, queries: as of model.seeing.capture.choose.

        Raises:
            ValueError: there are no such layers, heads or tokens.
        """
        batch = MicroBatch.of_images(images)
        geometry = self._geometry(batch)
        wanted, places = choose(geometry.config, layers, heads, queries), tapped(geometry)
        taps = {name: RowsTap(places[name], of) for name, of in wanted.items()}
        with tapping(geometry, taps):
            self(batch)
        return joined((piece for tap in taps.values() for piece in tap.pieces), wanted, len(images))

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], source: ModelConfig | None = None) -> None:
        """Take over logical weights, resized where `source` had another image size, aspect ratio or patch size.

        Args:
            weights: whole tensors by their names in the model. source: the configuration that they were trained with
                (default: that of this model).

        Raises:
            ValueError: names or shapes that do not fit this model.
        """
        if source is not None:
            weights = _resized(weights, source.resolve(), self.config)
        own = dict(self.named_parameters())
        if strange := sorted(own.keys() ^ weights.keys()):
            raise ValueError(f"weights: {', '.join(strange[:5])} are not in both the weights and the model")
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(
                    f"weights: {name} has shape {list(weights[name].shape)}, the model wants {list(parameter.shape)}"
                )
            parameter.copy_(weights[name])

    def _geometry(self, batch: MicroBatch) -> Layers:
        """Layers for images of this size, whose parameters are to be ours; self for all that it cannot serve, which the
        embedding refuses."""
        assert batch.images is not None
        size, device = tuple(batch.images.shape[2:]), batch.images.device
        if not self.dynamic_image_size or size == self.sizes.image or len(size) != 2:
            return self
        if (size, device) not in self._other_sizes:
            if len(self._other_sizes) >= _MOST_SIZES:
                self._other_sizes.clear()
            config = replace(self.config, image_size=size).resolve()
            with device:
                self._other_sizes[size, device] = Layers(self.specs, replace(self._build, config=config))
        return self._other_sizes[size, device]

    def _run(self, name: str, geometry: Layers, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """One layer, as `geometry` has it, with our weights; in the format of its matrices, or of autocast."""
        own, layer = self.get_submodule(name), geometry.get_submodule(name)
        matrix = next(w for w in (*own.parameters(), *self.parameters()) if w.dim() == 2)  # a head may have none
        device, dtype = matrix.device.type, matrix.dtype
        narrows = (
            dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        )
        dtype = torch.get_autocast_dtype(device) if narrows else dtype
        x = None if x is None else x.to(dtype)
        y: Tensor
        if layer is own and not narrows:
            y = layer(x, batch)
            return y
        weights: dict[str, Tensor] = {f"{name}.{key}": w for key, w in own.named_parameters()}
        if layer is not own:
            weights = _resized(weights, self.config, geometry.config)
        weights = {key.removeprefix(f"{name}."): w.to(dtype) if narrows else w for key, w in weights.items()}
        with torch.autocast(device, enabled=False):
            y = functional_call(layer, weights, (x, batch))
        return y


def _resized(weights: Mapping[str, Tensor], source: ModelConfig, target: ModelConfig) -> dict[str, Tensor]:
    """Weights by their names in the model, for images and patches of other sizes."""
    before, now = source.sizes, target.sizes
    return resize_weights(
        weights,
        position=str(source.position),
        source_grid=(before.stages[0].rows, before.stages[0].cols),
        target_grid=(now.stages[0].rows, now.stages[0].cols),
        channels=now.channels,
        source_patch=before.patch,
        target_patch=now.patch,
        class_rows=before.class_rows,
        source_windows=before.windows,
        target_windows=now.windows,
    )
