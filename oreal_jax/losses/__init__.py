"""Losses: pure functions of per-token arrays, which never see a model.

A loss is a frozen dataclass, called as `loss(scored, counts) -> (scalar, metrics)`: its
fields are hyper-parameters, its call is the formula, its `advantage` turns the rewards
of a group into advantages. Means divide by the `Counts` of the WHOLE batch, so losses,
gradients and metrics of micro-batches add up. Define your own in your config file.

Equations of the paper (arXiv:2502.06781v1) and the functions that compute them:

| equation | formula | function |
|---|---|---|
| R_RLOO | R_i - mean of the other K - 1 rewards | `advantages.rloo` |
| R* | (1 - p) R of incorrect samples | `advantages.reshaped` |
| L1 | -log pi of correct samples | `terms.clone` |
| L2 | F(1-p) log(pi / pi_old) of incorrect samples | `terms.suppress` |
| L2, as released | -A pi / stop(pi) of incorrect samples | `terms.reinforce` |
| KL of L1, L2 and Eq. 11 | KL(pi, pi_old), estimated by k3 | `terms.kl_k3` |
| Eq. 10 | q = sigmoid(w), as printed | `weights.token_credit` |
| Eq. 10 | q = sigmoid(mean of w so far), as released | `weights.running_credit` |
| Eq. 10 | max(2q - 1, 0) and max(1 - 2q, 0) | `weights.ThresholdWeights` |
| Eq. 10 | omega+ where correct, omega- where incorrect | `weights.token_weights` |
| Eq. 11 | L_total | `OrealPaper` |
| Eq. 12 | cross-entropy of sigmoid(mean of w) | `terms.outcome_cross_entropy` |
| Eq. 12 | its mean over completions | `TokenReward` |

`Oreal`, the default, is the released loss: `rloo`, L1 times A, L2 and credit as
released. `OrealPaper` is Eq. 11.
"""

# ruff: noqa: F401 (re-exports)
from oreal_jax.losses import advantages, oreal, presets, terms, weights
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
