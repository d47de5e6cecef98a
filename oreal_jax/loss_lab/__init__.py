"""The loss lab: coefficients of losses for the tokens of saved trajectories.

It needs no model: a loss is a function of per-token arrays, and a run saves those of
every completion that it trains on. A token's coefficient is d loss / d log pi:
gradient descent raises pi where it is negative and lowers pi where it is positive.
"""

# ruff: noqa: F401 (re-exports)
from oreal_jax.loss_lab.coefficients import LossResult, agreement, evaluate_loss
from oreal_jax.loss_lab.load import (
    SavedTrajectory,
    load_loss,
    load_trajectories,
    select,
)
from oreal_jax.loss_lab.tables import make_tables, plot, to_json
