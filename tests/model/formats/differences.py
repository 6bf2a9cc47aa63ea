"""`python -m tests.model.formats.differences`: how far our model is from transformers' own classes, a row each.

Small models with random weights (the norms', biases' and scales' too), on four photographs, in fp32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from model.formats.api import open_weights
from tests.model.formats.test_huggingface import CASES, randomised
from tools.benchmark.table import Row, show
from tools.convert.images import photographs
from tools.convert.runners import RUNNERS, vitruvius


def row(case: str) -> Row:
    """The largest differences of one class."""
    kind, make, _ = CASES[case]
    with tempfile.TemporaryDirectory() as folder:
        model = randomised(make())
        model.save_pretrained(folder)  # type: ignore[operator]
        with open_weights(Path(folder)) as weights:
            images = photographs(3, weights.description.model.image, None)
            ours = vitruvius.run_weights(weights, images)
        theirs = RUNNERS[kind](Path(folder), images)
    logits = None
    if ours.logits is not None and theirs.logits is not None:
        logits = f"{float((ours.logits - theirs.logits).abs().max()):.1e}"
    features = f"{float((ours.features - theirs.features).abs().max()):.1e}"
    return {"kind": kind, "model": case, "class": type(model).__name__, "features": features, "logits": logits}


if __name__ == "__main__":
    show([row(case) for case in CASES])
