"""Benchmarks: `python -m tools.benchmark step | peers | kernels`."""
