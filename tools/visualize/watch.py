"""Frames of a folder, as a camera writes them: the map of the newest, as often as they come.

Names and times of files are looked at over and over. The newest frame that can be read is shown, and older ones are
overtaken: maps keep up with the camera, not with its past. A frame that is still being written cannot be decoded, or
changes while it is; it is looked at again, and given up when it has not changed for a while.
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from data import UnreadableImageError
from data.listing import SUFFIXES
from engine.errors import ConfigError
from model import ModelConfig
from model.seeing.capture import choose
from tools.places import written_whole
from tools.visualize.models import Looked
from tools.visualize.pictures import overlay, scenes
from tools.visualize.shown import Asked

_POLL = 0.01  # seconds
_PATIENCE = 1.0  # with a file that cannot be decoded and does not change
_REPORT = 1.0
Stamp = tuple[int, int]  # when a file was changed, in ns, and its bytes


@dataclass
class Frames:
    """Those of a folder, and what became of them.

    Attributes:
        folder: whose image files are frames; a file that is written anew is another frame. read: decodes one, or raises
            UnreadableImageError. overtaken, unreadable: how many were not shown.
    """

    folder: Path
    read: Callable[[Path], Tensor]
    overtaken: int = 0
    unreadable: int = 0
    _done: dict[Path, Stamp] = field(default_factory=dict)
    _doubtful: dict[Path, tuple[Stamp, float]] = field(default_factory=dict)  # since when they have not changed

    def newest(self) -> tuple[Path, Tensor] | None:
        """The newest frame that was not shown yet and can be read [C, H, W]; None if there is none now.

        Raises:
            ConfigError: the folder is gone.
        """
        there = self._stamps()
        self._done = {path: stamp for path, stamp in self._done.items() if path in there}
        self._doubtful = {path: since for path, since in self._doubtful.items() if path in there}
        new = sorted(
            (path for path in there if self._done.get(path) != there[path]), key=lambda p: (there[p][0], p.name)
        )
        for i in reversed(range(len(new))):
            path = new[i]
            try:
                image = self.read(path)
            except UnreadableImageError as error:
                self._doubt(path, there[path], str(error))
                continue
            if self._stamps().get(path) != there[path]:
                continue  # it has changed meanwhile
            self._done |= {old: there[old] for old in new[: i + 1]}
            self.overtaken += i
            return path, image
        return None

    def _stamps(self) -> dict[Path, Stamp]:
        found = {}
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if Path(entry.name).suffix.lower() in SUFFIXES and not entry.name.startswith("."):
                        try:
                            about = entry.stat()
                        except FileNotFoundError:  # taken away meanwhile
                            continue
                        found[Path(entry.path)] = about.st_mtime_ns, about.st_size
        except OSError as error:
            raise ConfigError(f"--watch {self.folder} cannot be read: {error.strerror}") from error
        return found

    def _doubt(self, path: Path, stamp: Stamp, why: str) -> None:
        known, since = self._doubtful.get(path, (None, 0.0))
        if known != stamp:
            self._doubtful[path] = stamp, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            print(why, flush=True)
            self._done[path] = stamp
            self.unreadable += 1


def _check(method: str, config: ModelConfig, asked: Asked, texts: int) -> None:
    if texts > 1:
        raise ConfigError(f"--watch shows one map of a frame, and there are {texts} texts: give one --text")
    wanted = choose(config, asked.layers, asked.heads) if method in ("heads", "mean") else {}
    count = sum(len(of.heads) for of in wanted.values()) if method == "heads" else len(wanted)
    if count > 1:
        raise ConfigError(
            f"--watch shows one map of a frame, and --method {method} gives {count} here: name one of --layers"
            + (" and one of --heads" if method == "heads" else "")
        )


def watch(options: argparse.Namespace, looked: Looked, asked: Asked, read: Callable[[Path], Tensor]) -> list[str]:
    """Until SIGINT or SIGTERM, or for as many frames as options.most says; what is to be said at the end.

    Each frame's overlay is METHOD-FRAME.png, whole or not there.

    Raises:
        ConfigError: the method gives several maps of an image; the folder is gone, or `out` full.
    """
    _check(options.method, looked.config, asked, len(options.text or ()))
    frames, times, patch = Frames(options.watch, read), list[float](), looked.config.sizes.patch
    with _until_stopped() as stopped:
        began = reported = time.perf_counter()
        print(f"{options.watch}: waiting for frames, until Ctrl-C", flush=True)
        while not stopped() and len(times) != options.most:
            start = time.perf_counter()
            found = frames.newest()
            if found is None:
                time.sleep(_POLL)
                continue
            path, image = found
            shown = looked.shown(options.method, image[None], asked)
            assert shown is not None
            (scene,) = scenes([path.stem], image[None], looked.how, patch)
            (field_of_it,) = shown.maps.values()
            _write(
                options.out / f"{options.method}-{path.stem}.png", overlay(scene, field_of_it[0].cpu(), shown.smooth)
            )
            now = time.perf_counter()
            began = start if not times else began
            times.append(now - start)
            if now - reported >= _REPORT or len(times) == 1:
                print(_line(path.name, times, now - began, frames), flush=True)
                reported = now
    return [_line("in all", times, time.perf_counter() - began, frames)]


def _line(what: str, times: list[float], seconds: float, frames: Frames) -> str:
    each = f", {sum(times) / len(times) * 1000:.1f} ms each" if times else ""
    rate = len(times) / seconds if times else 0.0
    return (
        f"{what}: {len(times)} maps, {rate:.1f} maps/s{each}; {frames.overtaken} frames overtaken, "
        f"{frames.unreadable} unreadable"
    )


def _write(path: Path, pixels: Any) -> None:
    with written_whole(path) as part:
        Image.fromarray(pixels).save(part, "png", compress_level=1)


@contextmanager
def _until_stopped() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come; a second one ends the process at once, as ever."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    came = list[int]()

    def note(number: int, _: Any) -> None:
        came.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # of a shell's background jobs
                signal.signal(number, note)
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
