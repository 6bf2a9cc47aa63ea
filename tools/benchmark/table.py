"""How benchmarks report: a table for people, a JSON list of objects for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def show(rows: Sequence[Row], json_file: str | None = None) -> None:
    """Print `rows` (all with the same keys, units in the names) as a table, and write them to `json_file` if given."""
    columns = list(rows[0])
    cells = [[_text(row[name]) for name in columns] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(columns)]
    for line in [columns, ["-" * width for width in widths], *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    if json_file:
        Path(json_file).write_text(json.dumps(list(rows), indent=1) + "\n")


def show_markdown(rows: Sequence[Row]) -> None:
    """Print them as a page of documentation has them, without columns that say nothing."""
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    for line in [columns, ["---"] * len(columns), *([_text(row[name]) for name in columns] for row in rows)]:
        print(f"| {' | '.join(line)} |")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "-" if value is None else str(value)
