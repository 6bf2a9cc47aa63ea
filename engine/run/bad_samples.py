"""Bad samples of a run (data.mending): named in bad_samples.jsonl, counted, and too many of them an end of it.

The ranks that decode find them; all learn of them where they meet anyway, at the end of a step and of an evaluation,
and count alike, so that all end alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import torch

from data import BadSample, EvalStream, TooManyBadError, TrainStream
from engine.assembly import Assembly
from engine.errors import DriftError
from engine.run.journal import Journal
from engine.run.metrics import MetricsWriter
from engine.run.progress import Progress
from engine.run.run_dir import BAD_SAMPLES
from parallel import comm

_TOLD = 5  # lines on the console, in each attempt


class BadSamples:
    """Collects them from the streams of this rank.

    Args:
        decides: this rank finds them. sizes: images for training, and held out. writer: on rank 0 alone.
    """

    def __init__(
        self,
        assembly: Assembly,
        train: TrainStream,
        held_out: EvalStream,
        *,
        decides: bool,
        sizes: tuple[int, int],
        progress: Progress,
        writer: MetricsWriter | None,
    ) -> None:
        self._grid, self._data = assembly.grid, assembly.config.data
        self._train, self._held_out, self._sizes = train, held_out, sizes
        self._decides, self._progress, self._writer = decides, progress, writer
        self._journal: Journal | None = None
        self._told = 0

    def vote(self) -> float:
        """How many this rank has found in a step."""
        return float(len(self._train.bad))

    def after_step(self, step: int, total: float) -> None:
        """Of a step, in which all ranks have found `total`. Collective if there are any.

        Raises:
            TooManyBadError: on every rank, for a larger share of an epoch than may be.
        """
        if not total:
            return
        found = self._of_all(self._train.bad)
        self._train.bad = []
        self._write("train", step, found)
        p, repeats, size = self._progress, self._data.repeats, self._sizes[0]
        p.mended += len(found)
        for one in found:
            epoch = one.place // (size * repeats)
            p.mended_in_epoch = 1 + (p.mended_in_epoch if epoch == p.mended_epoch else 0)
            p.mended_epoch = epoch
            self._check(-(-p.mended_in_epoch // repeats), size, "training", one)

    def after_evaluation(self, step: int) -> None:
        """Of a pass over all held-out samples. Collective. Raises TooManyBadError on every rank."""
        if not self._data.mends:
            return
        own = torch.tensor([float(len(self._held_out.bad))], device=comm.device_of(self._grid.world))
        if comm.all_reduce(own, self._grid.world).item():
            found = self._of_all(self._held_out.bad)
            self._held_out.bad = []
            self._write("eval", step, found)
            self._check(len(found), self._sizes[1], "held-out", found[-1])

    def counted(self) -> Mapping[str, int]:
        """For a line of metrics; nothing where there can be none."""
        return {"bad_samples": self._progress.mended} if self._data.mends else {}

    def close(self) -> None:
        """Nothing more is written."""
        if self._journal is not None:
            self._journal.close()

    def _of_all(self, own: Sequence[BadSample]) -> list[BadSample]:
        """Of all ranks, each once, by place. Raises DriftError where ranks with the same samples disagree."""
        given = (self._grid.data.index, [tuple(one) for one in own]) if self._decides else None
        found = dict[int, dict[int, BadSample]]()
        for rank, of_rank in enumerate(comm.gather_objects(given, self._grid.world)):
            if of_rank is None:
                continue
            bad = {one[0]: BadSample(*one) for one in of_rank[1]}
            if others := found.setdefault(of_rank[0], bad).keys() ^ bad.keys():
                one = (found[of_rank[0]] | bad)[min(others)]
                raise DriftError(
                    f"rank {rank} and another that has the same samples disagree on whether sample {one.sample} is bad "
                    f"({one.cause}): see that all hosts have the same files"
                )
        return sorted(one for of in found.values() for one in of.values())

    def _write(self, event: str, step: int, found: Sequence[BadSample]) -> None:
        """A line for each in the file, and, of the first few times, one on the console."""
        if self._writer is None:
            return
        path = self._writer.path.parent / BAD_SAMPLES
        if self._journal is None:
            self._journal = Journal(path, self._writer.say, goes_on=path.exists())
        for one in found:
            where: dict[str, Any] = {"draw": one.place, "sample": one.sample, "instead": one.instead}
            line = {"event": event, "step": step, **(where if event == "train" else {"sample": one.sample})}
            line |= {"cause": one.cause, "wall_time": round(time.time(), 3)}
            self._journal.write(json.dumps(line).encode() + b"\n")
        if self._told < _TOLD:
            self._told += 1
            what = "drawn anew" if event == "train" else "left out"
            more = f"; later ones are told in {path} alone" if self._told == _TOLD else ""
            count = f"{len(found)} bad sample{'s' * (len(found) > 1)}"
            self._writer.say(f" step {step}: {count} {what}, such as: {found[0].cause}{more}")

    def _check(self, count: int, size: int, which: str, last: BadSample) -> None:
        allowed = min(ceil(self._data.max_bad_share * size), size - 1)
        if count > allowed:
            raise TooManyBadError(
                f"{count} of {size} {which} samples are bad so far, the last: {last.cause}. data.max_bad_share "
                f"{self._data.max_bad_share:g} allows {allowed}: mend the data (all that were found are named in "
                f"{BAD_SAMPLES} of the run_dir), or raise it"
            )
