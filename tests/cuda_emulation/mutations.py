"""Mistakes made on purpose in the CUDA sources: launch conditions not asked for, guards and barriers left out.

One module has all of them, each behind simt::mutation(number), which is false until a test turns that one on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ARGUMENTS = r"\((?:[^()]|\([^()]*\))*\)"
# What is found, and what stands in its place while the mutation is on ("" for a statement that is left out).
KINDS = {
    "alignment": (rf"(?<!bool )\baligned{ARGUMENTS}", "true"),
    "packing": (rf"(?<!bool )\bpacks{ARGUMENTS}", "true"),
    "multiple": (r"[\w.]+ % N == 0", "true"),
    "team": (r"\bteam == 32\b", "team != 32"),
    "guard": (r"if \(\w+ >= [\w.]+\) return;", ""),
    "barrier": (r"__syncthreads\(\);", ""),
}
# The function that a condition is in matters to nobody here: the text of the line tells them apart.
HARMLESS = {
    ("team", "forward_kernel"): "a persistent grid of any size walks over all rows",
}


@dataclass(frozen=True, kw_only=True)
class Mutation:
    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} without {self.kind}: {self.text}"


def plant(text: str, file: str, planted: list[Mutation]) -> str:
    """`text` with a mutation at every place that offers one; they join `planted`, where the index is the number."""

    def switch(match: re.Match[str]) -> str:
        kind = next(name for name in KINDS if match.group(name))
        number, replacement = len(planted), KINDS[kind][1]
        line = text.count("\n", 0, match.start()) + 1
        planted.append(Mutation(file=file, line=line, kind=kind, text=match[0]))
        if replacement:
            return f"(simt::mutation({number}) ? ({replacement}) : ({match[0]}))"
        return f"if (!simt::mutation({number})) {{ {match[0]} }}"

    return re.sub("|".join(f"(?P<{name}>{pattern})" for name, (pattern, _) in KINDS.items()), switch, text)
