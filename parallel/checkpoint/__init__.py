"""Boxes of logical tensors in files: how they are written, found and read, with every byte checked."""
