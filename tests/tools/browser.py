"""A real browser without a window, driven over a pipe by Chrome's DevTools protocol, without any library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_SECONDS = 60
_SHIFT = 8
_CODES = {
    "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "PageUp": 33, "PageDown": 34,
    "Tab": 9, " ": 32,
}  # fmt: skip


class Browser:
    """One page, 1280 x 960. In a `with`.

    Attributes:
        errors: of the page's script, and what it has logged. requests: addresses that it has asked for.
    """

    def __init__(self, folder: Path) -> None:
        binary = next((found for name in NAMES if (found := shutil.which(name))), None)
        if binary is None:
            pytest.skip(f"there is no browser: none of {', '.join(NAMES)} is installed (Debian: apt install chromium)")
        words = [
            binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "--window-size=1280,960",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" 3<&0 4>&1 >/dev/null', "sh", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=(folder / "browser.log").open("wb"),
        )  # fmt: skip
        self._read, self._count = b"", 0
        self.errors, self.requests = list[str](), list[str]()
        self._session: str | None = None

    def __enter__(self) -> Self:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=_SECONDS)

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        """What the browser answers."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": given}
        if self._session is not None:
            message["sessionId"] = self._session
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._note(answer)

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._read:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))
            part = os.read(self._process.stdout.fileno(), 2**20) if ready else b""
            assert part, "the browser says nothing, or has ended"
            self._read += part
        message, _, self._read = self._read.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.errors.append(json.dumps(given))
            case "Log.entryAdded" if given["entry"]["level"] == "error":  # a warning is that tests look at canvases
                self.errors.append(json.dumps(given))
            case "Network.requestWillBeSent":
                self.requests.append(given["request"]["url"])

    def open(self, path: Path) -> None:
        """Show a file, and wait until its script has run."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Of JavaScript, or what its promise gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until it is true."""
        end = time.monotonic() + _SECONDS
        while not self.value(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def frame(self) -> None:
        """Wait until what was changed is drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key, down and up, and what it changes."""
        code = _CODES.get(key, ord(key[0].upper()))
        given = {"key": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT * shift}
        text = {"text": key} if len(key) == 1 else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **given)
        self.frame()

    def point(self, x: float, y: float, *, click: bool = False) -> None:
        """Move the pointer there, and click."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.frame()

    def screenshot(self, path: Path) -> None:
        """As PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
