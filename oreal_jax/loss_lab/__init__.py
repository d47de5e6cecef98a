"""The loss lab: what losses do to trajectories that a run has saved.

No model is needed. A loss is a function of per-token arrays, and a run writes those of
every completion that it learned from. What a loss does to a token is one number, its
coefficient d loss / d log p: descent pulls towards a token where it is negative and
pushes away where it is positive.
"""

from oreal_jax.loss_lab.examination import Examination, agreement, examine, load_loss
from oreal_jax.loss_lab.recorded import Recorded, choose, read
from oreal_jax.loss_lab.show import as_json, draw, tables

__all__ = [
    "Examination",
    "Recorded",
    "agreement",
    "as_json",
    "choose",
    "draw",
    "examine",
    "load_loss",
    "read",
    "tables",
]
