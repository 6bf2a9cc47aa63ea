"""The `vitruvius` operator library. The native faces define their operators in it, each with shapes for fake tensors
and autograd."""

import torch

LIBRARY = torch.library.Library("vitruvius", "DEF")
