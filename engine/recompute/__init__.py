"""What of a forward pass is kept for the backward pass, and what is computed again there."""

from engine.recompute.regions import Recompute as Recompute
from engine.recompute.save_sets import LADDER as LADDER
from engine.recompute.save_sets import SAVE_SETS as SAVE_SETS
from engine.recompute.save_sets import SaveSet as SaveSet
from engine.recompute.save_sets import save_set as save_set
