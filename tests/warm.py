"""Imported once by the server that test ranks are forked from: does what makes torch import its slow parts."""

from model import ModelConfig, build_layers

build_layers(ModelConfig(width=8, depth=1, num_heads=1, image_size=4, patch_size=2, num_classes=2).resolve())
