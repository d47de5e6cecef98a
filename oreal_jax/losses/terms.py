"""The algebra of the losses: one function per term, one value per token."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oreal_jax.losses.scored import Scalar


def masked_sum(values: Float[Array, "B T"], where: Bool[Array, "B T"]) -> Scalar:
    """Sum over the mask."""
    return jnp.sum(values, where=where)


def clone(log_probs: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """Behaviour cloning: -log p (OREAL, L1 in section 2.2)."""
    return -log_probs


def reinforce(
    log_probs: Float[Array, "B T"], advantage: Float[Array, "B"]
) -> Float[Array, "B T"]:
    """Policy gradient on samples of the policy itself.

    The ratio p / stop(p) is 1 and its gradient that of log p: the released trainer's
    importance ratio, strictly on-policy.
    """
    ratio = jnp.exp(log_probs - jax.lax.stop_gradient(log_probs))
    return -ratio * advantage[:, None]


def kl_k1(
    log_probs: Float[Array, "B T"], reference: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """KL(policy || reference), estimator k1: log p - log reference.

    Unbiased in value; its expected gradient on-policy is zero. The released "kl" is
    its negative, which rewards divergence.
    """
    return log_probs - reference


def kl_k2(
    log_probs: Float[Array, "B T"], reference: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """KL estimator k2 (released name: "mse"): half the squared log-ratio."""
    return 0.5 * jnp.square(reference - log_probs)


def kl_k3(
    log_probs: Float[Array, "B T"], reference: Float[Array, "B T"]
) -> Float[Array, "B T"]:
    """KL estimator k3 (released name: "unbias"): exp(d) - d - 1, never negative.

    d = log reference - log p. From J. Schulman, "Approximating KL Divergence".
    """
    difference = reference - log_probs
    return jnp.expm1(difference) - difference


def running_mean(
    values: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Mean of `values` over the masked entries up to and including each one."""
    total = jnp.cumsum(jnp.where(where, values, 0), axis=-1)
    seen = jnp.cumsum(where, axis=-1).astype(values.dtype)
    return total / jnp.maximum(1, seen)


def sequence_mean(
    values: Float[Array, "B T"], where: Bool[Array, "B T"]
) -> Float[Array, "B"]:
    """Mean of `values` over the masked entries of each row; 0 for an empty row."""
    total = jnp.sum(jnp.where(where, values, 0), axis=-1)
    size = jnp.sum(where, axis=-1).astype(values.dtype)
    return total / jnp.maximum(1, size)
