"""The least step time over memory, as a picture: what a smaller budget costs, and what else was planned."""

from __future__ import annotations

from pathlib import Path

from tools.plan.evaluate import Evaluator, Prediction
from tools.plan.layouts import Space
from tools.plan.search import Found, Search

SHARES = (0.8, 0.6, 0.4, 0.25)
"""Of what the best layout takes: budgets with which the search is made again."""
_GB = 1e9


def front(space: Space, evaluator: Evaluator, first: Prediction) -> list[Prediction]:
    """The best layouts within ever smaller budgets; prices and costs are known by now."""
    found = [first]
    for share in SHARES:
        budget = int(share * first.peak)
        if found[-1].peak <= budget:
            continue
        best = Search(space, evaluator, budget).best(1).best
        if not best:
            break
        found.append(best[0])
    return found


def draw(space: Space, evaluator: Evaluator, found: Found, file: Path) -> None:
    """Write the picture."""
    from tools.figures import COLORS, FAINT, new_figure, save, style

    ends = front(space, evaluator, found.best[0])
    with style():
        figure = new_figure(8.0, 4.6)
        axes = figure.subplots()
        axes.set_title(f"Least step time over memory of a rank, {evaluator.ranks} ranks of {evaluator.cluster.name}")
        axes.set_xlabel("GB of the fullest rank")
        axes.set_ylabel("seconds per step")
        grids = list(dict.fromkeys(p.layout.grid for p in (*ends, *found.best)))
        x, y = [p.peak / _GB for p in reversed(ends)], [p.seconds for p in reversed(ends)]
        axes.step(x, y, where="post", color=FAINT, linewidth=1.0, zorder=2)
        for number, grid in enumerate(grids):
            own = [p for p in (*ends, *found.best) if p.layout.grid == grid]
            on = [p for p in own if p in ends]
            color = COLORS[number % len(COLORS)]
            name = "pipeline {} x data {} x context {} x tensor {}".format(*grid)
            axes.scatter(
                [p.peak / _GB for p in own], [p.seconds for p in own], s=42, zorder=3, label=name,
                facecolors=[color if p in on else "white" for p in own], edgecolors=color,
            )  # fmt: skip
        most, limit = max(p.peak for p in (*ends, *found.best)), evaluator.budget
        if most > limit / 2:
            axes.axvline(limit / _GB, color=FAINT, linestyle=(0, (2, 2)), linewidth=0.9, zorder=1)
        axes.set_ylim(0, 1.08 * max(p.seconds for p in (*ends, *found.best)))
        axes.set_xlim(0, 1.05 * (limit if most > limit / 2 else most) / _GB)
        axes.legend(loc="lower left")
        save(figure, file)
