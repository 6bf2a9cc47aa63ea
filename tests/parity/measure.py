"""Prints the largest differences on the ladder (docs/numerics.md): `python -m tests.parity.measure 1 2 4 8`."""

from __future__ import annotations

import sys
from functools import cache

from parallel.process_group import World
from tests.distributed import run_ranks
from tests.parity.cases import Case, cases
from tests.parity.climb import Climb, climb, climb_all
from tests.parity.test_ladder import TIMEOUT, relative

reference = cache(lambda case: climb(World(), case.config()))


def differences(ours: Climb, theirs: Climb) -> dict[str, float]:
    """Each quantity's largest difference, as the ladder takes it."""
    pairs = {"loss": (ours.losses, theirs.losses), "gradient norm": (ours.grad_norms, theirs.grad_norms)}
    out = {name: max(abs(a - b) / abs(b) for a, b in zip(*pair, strict=True)) for name, pair in pairs.items()}
    out["first gradients"] = max(relative(ours.first_grads[n], g) for n, g in theirs.first_grads.items())
    out["parameters"] = max(relative(ours.parameters[n], p) for n, p in theirs.parameters.items())
    out["evaluation loss"] = abs(ours.evaluation[0] / theirs.evaluation[0] - 1)
    return out


def main(sizes: list[int]) -> None:
    """The largest difference of each quantity, and the case it is from, per world size."""
    for ranks in sizes:
        found: dict[Case, Climb] = run_ranks(ranks, climb_all, cases(ranks), timeout=2 * TIMEOUT[ranks])[0]
        table = {case: differences(ours, reference(case.one_process)) for case, ours in found.items()}
        for what in next(iter(table.values())):
            worst = max(table, key=lambda case, what=what: table[case][what])  # type: ignore[misc]
            print(f"{ranks} ranks, {len(table)} cases: {what:16} {table[worst][what]:.1e}  {worst}", flush=True)


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [1, 2])
