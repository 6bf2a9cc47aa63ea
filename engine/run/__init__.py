"""The run: set-up, loop, step, what it writes and how it ends."""
