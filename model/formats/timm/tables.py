"""How the table of timm's architectures is written: a line each, long ones go on with two spaces."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def read_tables(tables: Mapping[str, str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """(class, arguments) by the name of an architecture.

    Args:
        tables: lines `name key=value key=value`, by class.
    """
    return {
        name: (cls, _arguments(rest))
        for cls, table in tables.items()
        for name, _, rest in (line.partition(" ") for line in table.replace("\n ", "").split("\n") if line)
    }


def _arguments(text: str) -> dict[str, Any]:
    return {key: _value(value) for key, _, value in (word.partition("=") for word in text.split())}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text
