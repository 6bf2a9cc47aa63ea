"""Pictures of runs from the files in their folders (docs/runs.md). Imports no torch."""
