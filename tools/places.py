"""Where commands write. Imported by such as do without torch, whose import takes a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ConfigError


def check_place(path: Path) -> Path:
    """`path`, if a file can go there: to be asked before any work is done for it.

    Raises:
        ConfigError: it is a folder, or its folder is not there or not to be written to.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}: make it, or name another place")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{path} cannot be written: it is not yours to write to: name another place")
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Where to write what then is the file `path`, whole or not at all: who looks at it meanwhile sees the earlier one.

    Raises:
        ConfigError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
