"""The OREAL objective as released (InternLM/OREAL 2859cc0), and its token reward loss.

Right completions are cloned, wrong ones pushed down in proportion to their advantage,
both weighted by the tokens that carried the outcome; a KL penalty holds the policy
near the initial model.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from oreal_jax.losses import terms
from oreal_jax.losses.scored import Counts, Metrics, Scalar, Scored
from oreal_jax.losses.weights import ThresholdWeights

Weighting = Callable[[Float[Array, "B T"], Bool[Array, "B T"]], Float[Array, "B T"]]
Kl = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oreal:
    """positive_weight * P + negative_weight * N + kl_weight * KL, where

    P  = sum over right tokens of  w+ (-log p) A     / right tokens
    N  = sum over wrong tokens of  w- (-A) p/stop(p) / wrong tokens
    KL = sum over all tokens of    kl(log p, log reference) / all tokens
    w+ = weight(q), w- = weight(1 - q), q = sigmoid(running mean of the token scores)

    A in P is there where `clone_times_advantage` is set, as in all released configs.
    The weights take no gradient: the policy loss never trains the token reward model.
    Defaults are the published settings (7B, with token rewards).
    """

    positive_weight: float = 1.0
    negative_weight: float = 0.5
    kl_weight: float = 0.01
    clone_times_advantage: bool = True
    weight_right: Weighting = ThresholdWeights()
    weight_wrong: Weighting = ThresholdWeights()
    kl: Kl = terms.kl_k3

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss, its three terms and the mean token weights."""
        scored = scored.masked()
        completion, right = scored.completion, scored.correct[:, None]
        probability = jax.lax.stop_gradient(
            jax.nn.sigmoid(terms.running_mean(scored.token_scores, completion))
        )
        credit = self.weight_right(probability, completion)
        blame = self.weight_wrong(1 - probability, completion)
        scale = scored.advantage[:, None] if self.clone_times_advantage else 1.0

        clone = terms.clone(scored.log_probs) * credit * scale
        avoid = terms.reinforce(scored.log_probs, scored.advantage) * blame
        kl = self.kl(scored.log_probs, scored.reference_log_probs)

        positive = terms.masked_sum(clone, completion & right) / counts.positive
        negative = terms.masked_sum(avoid, completion & ~right) / counts.negative
        penalty = terms.masked_sum(kl, completion) / counts.completion
        loss = (
            self.positive_weight * positive
            + self.negative_weight * negative
            + self.kl_weight * penalty
        )
        omega = lambda weights, where, count: terms.masked_sum(weights, where) / count
        no_weight = jnp.where(right, credit, blame) == 0
        return loss, {
            "actor/loss": loss,
            "actor/pg_loss": loss - self.kl_weight * penalty,
            "actor/positive_loss": positive,
            "actor/negative_loss": negative,
            "actor/kl_loss": penalty,
            "oreal/omega_right/mean": omega(
                credit, completion & right, counts.positive
            ),
            "oreal/omega_wrong/mean": omega(
                blame, completion & ~right, counts.negative
            ),
            "oreal/omega_zero_share": omega(
                no_weight.astype(loss.dtype), completion, counts.completion
            ),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenReward:
    """Trains the token reward model on outcomes alone (OREAL eq. 12).

    Binary cross-entropy between sigmoid(mean token score) and the verdict, summed over
    completions and divided by their number.
    """

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss, and how often the sign of the mean score is the verdict."""
        scored = scored.masked()
        logit = terms.sequence_mean(scored.token_scores, scored.completion)
        present = jnp.any(scored.completion, axis=-1)
        sign = jnp.where(scored.correct, 1, -1).astype(logit.dtype)
        entropy = jnp.where(present, -jax.nn.log_sigmoid(sign * logit), 0)
        hit = jnp.where(present, (logit > 0) == scored.correct, False)
        loss = jnp.sum(entropy) / counts.sequences
        accuracy = jnp.sum(hit).astype(loss.dtype) / counts.sequences
        return loss, {"token_reward/loss": loss, "token_reward/accuracy": accuracy}
