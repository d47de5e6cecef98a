"""The algebra of the losses: one function per term, one value per token.

A gradient flows through `log_probs` (and `token_scores`) alone: whatever else enters a
term is a constant, save where its docstring says otherwise.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Beyond this log-ratio exp goes on as its tangent: it would overflow, and a clip would
# lose the gradient that brings a runaway policy back.
STEEPEST = 20.0


def clone(log_probs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Behaviour cloning: -log p (OREAL, L1 in section 2.2)."""
    return -log_probs


def ratio(
    log_probs: Float[Array, "B T"], old_log_probs: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """p / p_old, continued as its tangent beyond exp(20)."""
    difference = log_probs - old_log_probs
    return jnp.exp(jnp.minimum(difference, STEEPEST)) + _tangent(difference)


def reinforce(
    log_probs: Float[Array, "B T"], advantage: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """Policy gradient on samples of the policy itself: -A p / stop(p).

    The ratio is 1 and its gradient that of log p: the released trainer's importance
    ratio, strictly on-policy.
    """
    return -ratio(log_probs, jax.lax.stop_gradient(log_probs)) * advantage[:, None]


def clipped_surrogate(
    log_probs: Float[Array, "B T"],
    old_log_probs: Float[Array, "B T"],
    advantage: Float[Array, "B"],
    *,
    low: float,
    high: float,
    dual: float = math.inf,
) -> Float[Array, "B T"]:
    """PPO's -min(r A, clip(r, 1 - low, 1 + high) A) with r = p / p_old (1707.06347).

    For A < 0 it is at most dual |A| (dual clip, arXiv:1912.09729): a token that the
    policy has come to like by far pulls no harder. Once clipped, a token has no
    gradient.
    """
    advantage = jnp.broadcast_to(advantage[:, None], log_probs.shape)
    moved = ratio(log_probs, old_log_probs)
    worst = jnp.maximum(
        -moved * advantage, -jnp.clip(moved, 1 - low, 1 + high) * advantage
    )
    if math.isinf(dual):
        return worst
    return jnp.where(advantage < 0, jnp.minimum(worst, -dual * advantage), worst)


def truncated_importance(
    log_probs: Float[Array, "B T"], old_log_probs: Float[Array, "B T"], cap: float
) -> Float[Array, "B T"]:
    """min(stop(p) / p_old, cap): the weight that makes up for a sampler whose
    probabilities are not the trainer's (other kernels, other precision)."""
    weight = jnp.minimum(ratio(log_probs, old_log_probs), cap)
    return jax.lax.stop_gradient(weight)


def kl_k1(
    log_probs: Float[Array, "B T"], other: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """KL(policy || other), estimator k1: log p - log p_other.

    Unbiased in value; its expected gradient on-policy is zero. The released "kl" is
    its negative, which rewards divergence.
    """
    return log_probs - other


def kl_k2(
    log_probs: Float[Array, "B T"], other: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """KL estimator k2 (released name: "mse"): half the squared log-ratio."""
    return 0.5 * jnp.square(other - log_probs)


def kl_k3(
    log_probs: Float[Array, "B T"], other: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """KL estimator k3 (released name: "unbias"): exp(d) - d - 1, never negative.

    d = log p_other - log p, from J. Schulman, "Approximating KL Divergence"; exp
    continued as its tangent beyond d = 20.
    """
    difference = other - log_probs
    grown = jnp.expm1(jnp.minimum(difference, STEEPEST)) + _tangent(difference)
    return grown - difference


def outcome_cross_entropy(
    logit: Float[Array, "B"], correct: Bool[Array, "B"]
) -> Float[Array, "B"]:
    """-log sigmoid(logit) where correct, else -log(1 - sigmoid(logit)) (eq. 12)."""
    return -jax.nn.log_sigmoid(jnp.where(correct, logit, -logit))


def running_mean(
    values: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Mean of `values` over the masked entries up to and including each one."""
    total = jnp.cumsum(jnp.where(where, values, 0), axis=-1)
    seen = jnp.cumsum(where, axis=-1).astype(values.dtype)
    return total / jnp.maximum(1, seen)


def completion_mean(
    values: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Mean of `values` over the masked entries of each row; 0 for an empty row."""
    total = jnp.sum(values, axis=-1, where=where)
    size = jnp.sum(where, axis=-1).astype(values.dtype)
    return total / jnp.maximum(1, size)


def _tangent(x: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """What the tangent of exp at `STEEPEST` adds beyond it."""
    return math.exp(STEEPEST) * jnp.maximum(x - STEEPEST, 0)
