"""Batch scripts for SLURM, and what they run on each node before training."""
