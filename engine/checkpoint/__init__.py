"""The state of a run as pieces of logical tensors: what saving and loading work on."""
