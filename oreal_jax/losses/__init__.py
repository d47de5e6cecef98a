"""The objectives: pure functions of per-token arrays, never of a model.

A loss is a frozen dataclass whose fields are its hyper-parameters and whose call is
its formula: `loss(scored, counts) -> (scalar, metrics)`. Sums are divided by `Counts`
of the WHOLE batch, so the losses, gradients and metrics of micro-batches add up to
those of the batch. Your own loss is a class in your own config file; nothing is
registered.
"""

from oreal_jax.losses import terms
from oreal_jax.losses.advantages import group_normalised, rloo
from oreal_jax.losses.baselines import BestOfNCloning, Reinforce
from oreal_jax.losses.oreal import Oreal, TokenReward
from oreal_jax.losses.scored import Counts, Metrics, PolicyLoss, Scalar, Scored
from oreal_jax.losses.weights import ThresholdWeights, TopKWeights, unweighted

__all__ = [
    "BestOfNCloning",
    "Counts",
    "Metrics",
    "Oreal",
    "PolicyLoss",
    "Reinforce",
    "Scalar",
    "Scored",
    "ThresholdWeights",
    "TokenReward",
    "TopKWeights",
    "group_normalised",
    "rloo",
    "terms",
    "unweighted",
]
