"""What is in a checkpoint, and how two of them differ."""
