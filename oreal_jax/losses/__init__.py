"""Losses: pure functions of per-token arrays, which never see a model.

A loss is a frozen dataclass, called as `loss(scored, counts) -> (scalar, metrics)`: its
fields are hyper-parameters, its call is the formula, its `advantage` turns the rewards
of a group into advantages. Means divide by the `Counts` of the WHOLE batch, so losses,
gradients and metrics of micro-batches add up. Define your own in your config file.

Equations of the paper (arXiv:2502.06781v1) and the functions that compute them:

| equation | formula | function |
|---|---|---|
| R_RLOO | R_i - mean of the other K - 1 rewards | `rloo` |
| R* | (1 - p) R of incorrect samples | `reshaped` |
| L1 | -log pi of correct samples | `terms.clone` |
| L2 | F(1-p) log(pi / pi_old) of incorrect samples | `terms.suppress` |
| KL of L1, L2 and Eq. 11 | KL(pi, pi_old), estimated by k3 | `terms.kl_k3` |
| Eq. 10 | q = sigmoid(w), as printed | `token_credit` |
| Eq. 10 | q = sigmoid(mean of w so far), as released | `running_credit` |
| Eq. 10 | omega+ = max(2q - 1, 0), omega- = max(1 - 2q, 0) | `ThresholdWeights` |
| Eq. 10 | omega+ where correct, omega- where incorrect | `token_weights` |
| Eq. 11 | L_total | `OrealPaper` |
| Eq. 12 | cross-entropy of sigmoid(mean of w) and the outcome | `TokenReward` |
"""

# ruff: noqa: F401 (re-exports)
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
    token_weights,
    unweighted,
)
