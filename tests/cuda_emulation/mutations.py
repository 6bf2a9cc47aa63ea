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
FUNCTION = re.compile(r"^\S.*?\b(?!__)(\w+)\(", re.MULTILINE)
# What no test can notice, by function and text, and why.
ALLOCATED = "torch allocates it, at a multiple of 64 bytes"
DENSE = "rows that are written lie dim apart: one implies the other"
BEHIND = "rows of y start behind what is beside them and lie both widths apart: two of the conditions imply the third"
HARMLESS = {
    ("gelu_forward", "a.dim % N == 0"): BEHIND,
    ("gelu_forward", "a.y_stride % N == 0"): BEHIND,
    ("gelu_forward", "aligned(a.y)"): BEHIND,
    ("gelu_backward", "aligned(a.grad_input)"): ALLOCATED,
    ("launch_forward", "aligned(a.y)"): ALLOCATED,
    ("launch_forward", "aligned(a.sum)"): ALLOCATED,
    ("launch_backward", "aligned(a.grad_input)"): ALLOCATED,
    ("launch_forward", "a.dim % N == 0"): DENSE,
    ("launch_forward", "packs(a.y_rows, N)"): DENSE,
    ("launch_backward", "a.dim % N == 0"): DENSE,
    ("launch_backward", "packs(a.out_rows, N)"): DENSE,
    ("launch_forward", "team == 32"): "a persistent grid of any size walks over all rows",
}


@dataclass(frozen=True, kw_only=True)
class Mutation:
    file: str
    line: int
    function: str
    kind: str
    text: str

    @property
    def harmless(self) -> str:
        """Why no test can notice it, "" if one must."""
        return HARMLESS.get((self.function, self.text), "")

    def __str__(self) -> str:
        return f"{self.file}:{self.line}, {self.function}, {self.kind}: {self.text}"


def plant(text: str, file: str, planted: list[Mutation]) -> str:
    """`text` with a mutation at every place that offers one; they join `planted`, where the index is the number."""

    def switch(match: re.Match[str]) -> str:
        kind = next(name for name in KINDS if match.group(name))
        number, replacement = len(planted), KINDS[kind][1]
        line = text.count("\n", 0, match.start()) + 1
        *_, function = FUNCTION.findall(text, 0, match.start())
        planted.append(Mutation(file=file, line=line, function=function, kind=kind, text=match[0]))
        if replacement:
            return f"(simt::mutation({number}) ? ({replacement}) : ({match[0]}))"
        return f"if (!simt::mutation({number})) {{ {match[0]} }}"

    return re.sub("|".join(f"(?P<{name}>{pattern})" for name, (pattern, _) in KINDS.items()), switch, text)
