"""Imported once by the server that test ranks are forked from: measures the ladder's models, which makes torch import
its slow parts, and which each rank would do by itself else. What there is by then no rank's garbage collector looks at
again, nor copies by looking.
"""

import gc

import torch

from engine.frozen import frozen_of
from engine.objectives import make_objective
from tests.parity.cases import MODELS, PAIRS, Case

torch.set_num_threads(1)  # threads do not live through a fork
for model in (*MODELS, *PAIRS):
    config = Case(model).config()
    frozen_of(config, make_objective(config).layers)
gc.collect()
gc.freeze()
