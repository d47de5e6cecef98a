"""Terms of the losses: one function each, one value per token.

Notation: pi is the policy's probability of a token, pi_old that of the policy which
generated it, stop(x) is x without gradient, A the advantage of a completion. Gradients
flow through `log_probs` and `token_scores`; everything else is a constant.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oreal_jax.losses.scored import PerToken, TokenMask

# Above it, exp continues as its tangent: exp would overflow, and clipping would remove
# the gradient that brings a diverging policy back.
MAX_EXPONENT = 20.0


def clone(log_probs: PerToken) -> PerToken:
    """Compute -log pi: behaviour cloning of correct samples (L1, section 2.2)."""
    return -log_probs


def suppress(
    log_probs: PerToken, old_log_probs: PerToken, factor: PerToken
) -> PerToken:
    """Compute F log(pi / pi_old), which pushes incorrect samples down (section 2.3).

    This is L2. `factor` is F(1-p); in Eq. 11, times omega-.
    """
    return factor * (log_probs - old_log_probs)


def ratio(log_probs: PerToken, old_log_probs: PerToken) -> PerToken:
    """Compute pi / pi_old, continued as its tangent above exp(20)."""
    difference = log_probs - old_log_probs
    return jnp.exp(jnp.minimum(difference, MAX_EXPONENT)) + _tangent(difference)


def reinforce(log_probs: PerToken, advantage: Float[Array, "B"]) -> PerToken:
    """Compute -A pi / stop(pi): policy gradient on-policy (L2, as released).

    The ratio is 1 and its gradient that of log pi.
    """
    return -ratio(log_probs, jax.lax.stop_gradient(log_probs)) * advantage[:, None]


def clipped_surrogate(
    log_probs: PerToken,
    old_log_probs: PerToken,
    advantage: Float[Array, "B"],
    *,
    low: float,
    high: float,
    dual: float = math.inf,
) -> PerToken:
    """Compute PPO's -min(r A, clip(r, 1 - low, 1 + high) A) with r = pi / pi_old.

    From arXiv:1707.06347. Where A < 0, at most dual |A| (dual clip, arXiv:1912.09729),
    however much the probability of a token has grown. Clipped tokens have no gradient.
    """
    advantage = jnp.broadcast_to(advantage[:, None], log_probs.shape)
    r = ratio(log_probs, old_log_probs)
    surrogate = jnp.maximum(-r * advantage, -jnp.clip(r, 1 - low, 1 + high) * advantage)
    if math.isinf(dual):
        return surrogate
    bounded = jnp.minimum(surrogate, -dual * advantage)
    return jnp.where(advantage < 0, bounded, surrogate)


def truncated_importance(
    log_probs: PerToken, old_log_probs: PerToken, cap: float | None
) -> PerToken:
    """Compute min(stop(pi) / pi_old, cap), or 1 without a cap.

    Corrects for a sampler with other probabilities (other kernels, other precision).
    """
    if cap is None:
        return jnp.ones_like(log_probs)
    return jax.lax.stop_gradient(jnp.minimum(ratio(log_probs, old_log_probs), cap))


def kl_k1(log_probs: PerToken, other: PerToken) -> PerToken:
    """Estimate KL(pi || other) by k1: log pi - log other.

    Its expected gradient on-policy is 0. The released "kl" is its negative, which
    rewards divergence.
    """
    return log_probs - other


def kl_k2(log_probs: PerToken, other: PerToken) -> PerToken:
    """Estimate KL(pi || other) by k2: half the squared log-ratio (released: "mse")."""
    return 0.5 * jnp.square(other - log_probs)


def kl_k3(log_probs: PerToken, other: PerToken) -> PerToken:
    """Estimate KL(pi || other) by k3: exp(d) - d - 1 >= 0 (released: "unbias").

    d = log other - log pi (J. Schulman, "Approximating KL Divergence"); exp continues
    as its tangent above d = 20. The default for the KL of L1, L2 and Eq. 11.
    """
    difference = other - log_probs
    grown = jnp.expm1(jnp.minimum(difference, MAX_EXPONENT)) + _tangent(difference)
    return grown - difference


def outcome_cross_entropy(
    logit: Float[Array, "B"], correct: Bool[Array, "B"]
) -> Float[Array, "B"]:
    """Compute the binary cross-entropy of sigmoid(logit) and the outcome (Eq. 12).

    `logit` is the mean token score of a completion.
    """
    return -jax.nn.log_sigmoid(jnp.where(correct, logit, -logit))


def completion_mean(values: PerToken, where: TokenMask) -> Float[Array, "B"]:
    """Average the masked entries of each row; 0 for an empty row."""
    size = jnp.sum(where, axis=-1).astype(values.dtype)
    return jnp.sum(values, axis=-1, where=where) / jnp.maximum(1, size)


def _tangent(x: PerToken) -> PerToken:
    """Return the linear part of the continued exp, above `MAX_EXPONENT`."""
    return math.exp(MAX_EXPONENT) * jnp.maximum(x - MAX_EXPONENT, 0)
