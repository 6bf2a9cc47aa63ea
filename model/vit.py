"""Layers put together: a pipeline stage, and the whole model on one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from model.build import Build
from model.config import ModelConfig
from model.inputs import MicroBatch
from model.layers import LayerSpec, build_layers
from model.resize import resize_weights
from parallel.layout import attach_info, info_of
from parallel.random import initialise


class Stage(nn.Module):
    """Consecutive layers of the list, their parameters on the meta device; names are those of the whole model."""

    def __init__(self, specs: Sequence[LayerSpec], build: Build) -> None:
        super().__init__()
        self.specs, self.precision = tuple(specs), build.precision
        for spec in specs:
            parent: nn.Module = self
            *path, leaf = spec.name.split(".")
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, nn.ModuleDict())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, spec.factory(build.at(spec.stage)))

    @property
    def layers(self) -> list[tuple[str, nn.Module]]:
        """Names and modules, in forward order."""
        return [(spec.name, self.get_submodule(spec.name)) for spec in self.specs]

    def forward(self, inputs: tuple[Tensor, ...], batch: MicroBatch) -> tuple[Tensor, ...]:
        """Rows of the boundary before (nothing for the first stage) -> those of the boundary after, or logits."""
        x = inputs[0] if inputs else None
        for spec in self.specs:
            x = self._run(spec.name, x, batch)
        assert x is not None
        return (x,)

    def _run(self, layer: str, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """One layer, on what it computes in."""
        x = None if x is None else x.to(self.precision.of_layer(layer))
        y: Tensor = self.get_submodule(layer)(x, batch)
        return y


class VisionTransformer(Stage):
    """The whole model on one process, with its initial weights, for use outside the engine.

    Args:
        config: resolved or not. seed: of the weights and of drop-path. device: where it lives.

    Example:
        >>> model = VisionTransformer(ModelConfig(preset="vit_ti16"))
        >>> model.logits(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 1000])
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        config = config.resolve()
        super().__init__(build_layers(config), Build(config=config, seed=seed))
        self.sizes = config.sizes
        for name, meta in list(self.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            parameter = nn.Parameter(torch.empty(meta.shape, device=device))
            attach_info(parameter, info_of(meta))
            setattr(self.get_submodule(owner), leaf, parameter)
        initialise(self, seed)
        self.to(device)

    def logits(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, classes]."""
        batch = MicroBatch.of_images(images, training=self.training)
        return self((), batch)[0]

    def load(self, weights: Mapping[str, Tensor], source: ModelConfig | None = None) -> None:
        """Take over logical weights, resized where `source` had another image size, aspect ratio or patch size.

        Args:
            weights: whole tensors by their names in the model. source: the configuration that they were trained with
                (default: that of this model).

        Raises:
            ValueError: names or shapes that do not fit this model.
        """
        if source is not None:
            before, now = source.resolve().sizes, self.sizes
            weights = resize_weights(
                weights,
                position=str(source.resolve().position),
                source_grid=(before.stages[0].rows, before.stages[0].cols),
                target_grid=(now.stages[0].rows, now.stages[0].cols),
                channels=now.channels,
                source_patch=before.patch,
                target_patch=now.patch,
                class_token=bool(before.class_tokens),
            )
        own = dict(self.named_parameters())
        if strange := sorted(own.keys() ^ weights.keys()):
            raise ValueError(f"weights: {', '.join(strange[:5])} are not in both the weights and the model")
        for name, parameter in own.items():
            if weights[name].shape != parameter.shape:
                raise ValueError(
                    f"weights: {name} has shape {list(weights[name].shape)}, the model wants {list(parameter.shape)}"
                )
            parameter.data.copy_(weights[name])

    def features(self, images: Tensor) -> list[tuple[Tensor, int]]:
        """The map of each stage of the pyramid (one, without a pyramid), after its last block, for dense tasks.

        Args:
            images: [B, C, H, W].

        Returns:
            ([B, D, rows, cols], stride in pixels) of each stage, from fine to coarse; prefix tokens are left out.
        """
        batch, stages = MicroBatch.of_images(images, training=self.training), self.sizes.stages
        maps, x = [], None
        for spec, following in pairwise(self.specs):
            x = self._run(spec.name, x, batch)
            here = stages[spec.stage]
            if following.name == "head" or following.stage != spec.stage:
                patches = x.unflatten(0, (batch.size, -1))[:, self.sizes.prefix :]
                maps.append((patches.transpose(1, 2).unflatten(2, (here.rows, here.cols)), here.stride))
        return maps
