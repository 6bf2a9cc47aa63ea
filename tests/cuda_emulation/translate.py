"""CUDA C++ to plain C++: launches and shared arrays are the only syntax that a C++ compiler would not take.

Line numbers stay, and a #line names the original: debuggers, sanitizers and the emulator then do.
"""

from __future__ import annotations

import re
from pathlib import Path

OPEN, CLOSE = "([{", ")]}"
NAME = re.compile(r"[\w:]")
SHARED = re.compile(r"__shared__\s+([\w:]+(?:<[^;=]*?>)?)\s+(\w+\s*\[[^;]*);")


def translate(text: str, path: Path | str) -> str:
    """The C++ of the CUDA file `path` that holds `text`; ValueError on what is not emulated."""
    if re.search(r"extern\s+__shared__", text):
        raise ValueError(f"{path}: dynamic shared memory is not emulated; give it a type and a size")
    return f'#line 1 "{path}"\n' + SHARED.sub(_shared, _launches(text, Path(path).name))


def end_of_bracket(text: str, start: int) -> int:
    """Behind the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in OPEN) - (text[i] in CLOSE)
        if depth == 0:
            return i + 1
    raise ValueError("a bracket is not closed")


def split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in OPEN) - (c in CLOSE)
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _start_of_name(text: str, end: int) -> int:
    """Where the name that ends at `end`, with its template arguments, starts."""
    i = end
    if text[i - 1] == ">":
        depth = 0
        while depth or i == end:
            i -= 1
            depth += (text[i] == ">") - (text[i] == "<")
    while NAME.match(text[i - 1]):
        i -= 1
    return i


def _launches(text: str, file: str) -> str:
    """kernel<<<config>>>(arguments) becomes simt::launch("file:line", simt::config(config), kernel, arguments)."""
    while (at := text.find("<<<")) >= 0:
        begin, close = _start_of_name(text, at), text.index(">>>", at)
        end = end_of_bracket(text, close + 3)
        kernel, config, arguments = text[begin:at], text[at + 3 : close], text[close + 4 : end - 1]
        where = f'"{file}:{text.count(chr(10), 0, at) + 1}, {kernel.partition("<")[0]}"'
        call = f"[=](auto... simt_a) {{ {kernel}(simt_a...); }}"
        passed = ", ".join([where, f"simt::config({config})", call, *([arguments] if arguments.strip() else [])])
        text = f"{text[:begin]}simt::launch({passed}){text[end:]}"
    return text


def _shared(match: re.Match[str]) -> str:
    """__shared__ T a[n], b[m]; becomes a reference to the running block's array for each."""
    out = []
    for part in split(match[2]):
        name, bracket, sizes = part.strip().partition("[")
        out.append(f"auto& {name.strip()} = simt::shared<{match[1]}{bracket}{sizes}>([] {{}});")
    return " ".join(out)
