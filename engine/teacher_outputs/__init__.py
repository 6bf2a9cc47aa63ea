"""What a teacher makes of the images of a run, on the disk: what it is of, and its rows (docs/teacher_outputs.md)."""
