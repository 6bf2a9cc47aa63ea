"""`python -m tools.evaluate`: what a checkpoint's model is worth (docs/evaluation.md)."""
