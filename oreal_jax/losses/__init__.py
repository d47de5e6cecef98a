"""Losses: pure functions of per-token arrays. A loss never sees a model.

A loss is a frozen dataclass whose fields are its hyper-parameters and whose call is
its formula: `loss(scored, counts) -> (scalar, metrics)`. Its `advantage` says what it
wants to know of a prompt's rewards. Sums are divided by `Counts` of the WHOLE batch, so
the losses, gradients and metrics of micro-batches add up to those of the batch. Your
own loss is a class in your own config file; nothing is registered.
"""

from oreal_jax.losses import presets, terms
from oreal_jax.losses.advantages import (
    ZeroOne,
    group_centred,
    group_normalised,
    outcome,
    reshaped,
    rloo,
)
from oreal_jax.losses.aggregation import (
    FixedLength,
    sequence_mean,
    sequence_sum,
    token_mean,
)
from oreal_jax.losses.baselines import (
    BestOfNCloning,
    Dapo,
    DrGrpo,
    Grpo,
    Reinforce,
    XtunerOreal,
)
from oreal_jax.losses.oreal import Oreal, OrealPaper, TokenReward
from oreal_jax.losses.probe import fields_read, has_gradient
from oreal_jax.losses.scored import (
    Advantage,
    Count,
    Counts,
    Metrics,
    PolicyLoss,
    Scalar,
    Scored,
)
from oreal_jax.losses.weights import (
    ThresholdWeights,
    TopKWeights,
    running_credit,
    token_credit,
    unweighted,
)

__all__ = [
    "Advantage",
    "BestOfNCloning",
    "Count",
    "Counts",
    "Dapo",
    "DrGrpo",
    "FixedLength",
    "Grpo",
    "Metrics",
    "Oreal",
    "OrealPaper",
    "PolicyLoss",
    "Reinforce",
    "Scalar",
    "Scored",
    "ThresholdWeights",
    "TokenReward",
    "TopKWeights",
    "XtunerOreal",
    "ZeroOne",
    "fields_read",
    "group_centred",
    "group_normalised",
    "has_gradient",
    "outcome",
    "presets",
    "reshaped",
    "rloo",
    "running_credit",
    "sequence_mean",
    "sequence_sum",
    "terms",
    "token_credit",
    "token_mean",
    "unweighted",
]
