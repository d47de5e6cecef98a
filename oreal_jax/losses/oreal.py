"""The OREAL objective in both readings, and the loss of its token reward model.

Correct completions are cloned, incorrect ones pushed down, both weighted by the tokens
that carried the outcome; a KL penalty holds the policy where it was. The paper's
equations and the released trainer differ in more than they share: `OrealPaper` and
`Oreal`.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oreal_jax.losses import terms
from oreal_jax.losses.advantages import reshaped, rloo
from oreal_jax.losses.aggregation import sequence_sum, token_mean
from oreal_jax.losses.scored import Advantage, Counts, Metrics, Scalar, Scored
from oreal_jax.losses.weights import (
    Credit,
    ThresholdWeights,
    Weighting,
    running_credit,
    token_credit,
)

Kl = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oreal:
    """OREAL as released (InternLM/OREAL 2859cc0; published 7B settings):

    positive_weight * P + negative_weight * N + kl_weight * KL, where

    P  = sum over correct tokens of  w+ (-log p) A     / correct tokens
    N  = sum over incorrect tokens of  w- (-A) p/stop(p) / incorrect tokens
    KL = sum over all tokens of    kl(log p, log reference) / all tokens
    w+ = weight_correct(q), w- = weight_incorrect(1 - q), q = credit(token scores)

    A in P is there where `clone_times_advantage` is set, as in all released configs;
    P then has the gradient of REINFORCE, and cloning differs from it by its denominator
    alone. Without it the gradient of P is that of plain cloning, as the paper derives.
    `importance_cap` weighs the tokens of P and N by min(p / p_old, cap) where sampler
    and trainer differ (None, as released: not at all).

    Differs from `OrealPaper` in its KL to the fixed initial model, its advantages
    (RLOO on both signs), its means over tokens and its running credit; from
    `XtunerOreal` in its token weights.
    """

    advantage: Advantage = rloo
    positive_weight: float = 1.0
    negative_weight: float = 0.5
    kl_weight: float = 0.01
    clone_times_advantage: bool = True
    credit: Credit = running_credit
    weight_correct: Weighting = ThresholdWeights()
    weight_incorrect: Weighting = ThresholdWeights()
    kl: Kl = terms.kl_k3
    importance_cap: float | None = None

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss, its three terms and the mean token weights."""
        scored = scored.masked()
        weight = token_weights(
            scored, self.credit, self.weight_correct, self.weight_incorrect
        )
        scale = scored.advantage[:, None] if self.clone_times_advantage else 1.0
        clone = terms.clone(scored.log_probs) * weight * scale
        avoid = terms.reinforce(scored.log_probs, scored.advantage) * weight
        kl = self.kl(scored.kl_log_probs, scored.reference_log_probs)
        if self.importance_cap is not None:
            trust = terms.truncated_importance(
                scored.log_probs, scored.old_log_probs, self.importance_cap
            )
            clone, avoid = clone * trust, avoid * trust

        positive = token_mean(clone, scored.correct_tokens, counts.correct)
        negative = token_mean(avoid, scored.incorrect_tokens, counts.incorrect)
        penalty = token_mean(kl, scored.completion, counts.all)
        policy = self.positive_weight * positive + self.negative_weight * negative
        return policy + self.kl_weight * penalty, {
            "actor/pg_loss": policy,
            "actor/positive_loss": positive,
            "actor/negative_loss": negative,
            "actor/kl_loss": penalty,
        } | weight_metrics(weight, scored, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrealPaper:
    """OREAL as printed (arXiv:2502.06781v1, eq. 10 and 11):

    mean over completions of their sums over tokens of
        w+ (-log p)                        where correct
        eta w- (1-p) log(p / p_old)        where incorrect
        beta kl(log p, log p_old)          everywhere
    w+ = max(2 q - 1, 0), w- = max(1 - 2 q, 0), q = sigmoid of the token's own score

    (1-p) is F(1-p) of L2, section 2.3, with F the identity; eq. 11 prints neither it
    nor a value for eta: that of the release stands in. `advantage` gives its negative
    (`outcome` leaves it out).

    Differs from `Oreal` in all that its docstring lists; strictly on-policy, the KL to
    the old policy is 0 and so is its gradient, with k2 and k3.
    """

    advantage: Advantage = reshaped
    eta: float = 0.5
    beta: float = 0.01
    kl: Kl = terms.kl_k3

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss, its three terms and the mean token weights."""
        scored = scored.masked()
        weight = token_weights(
            scored, token_credit, ThresholdWeights(), ThresholdWeights()
        )
        clone = terms.clone(scored.log_probs) * weight
        log_ratio = scored.log_probs - scored.old_log_probs
        avoid = -scored.advantage[:, None] * weight * log_ratio
        kl = self.kl(scored.log_probs, scored.old_log_probs)

        positive = sequence_sum(clone, scored.correct_tokens, counts.all)
        negative = sequence_sum(avoid, scored.incorrect_tokens, counts.all)
        penalty = sequence_sum(kl, scored.completion, counts.all)
        policy = positive + self.eta * negative
        return policy + self.beta * penalty, {
            "actor/pg_loss": policy,
            "actor/positive_loss": positive,
            "actor/negative_loss": negative,
            "actor/kl_loss": penalty,
        } | weight_metrics(weight, scored, counts)


def token_weights(
    scored: Scored, credit: Credit, correct: Weighting, incorrect: Weighting
) -> Float[Array, "B T"]:
    """omega+ on correct completions, omega- on incorrect ones. Without gradient: the
    policy loss never trains the token reward model."""
    probability = jax.lax.stop_gradient(credit(scored.token_scores, scored.completion))
    return jnp.where(
        scored.correct[:, None],
        correct(probability, scored.completion),
        incorrect(1 - probability, scored.completion),
    )


def weight_metrics(
    weight: Float[Array, "B T"], scored: Scored, counts: Counts
) -> Metrics:
    """Mean weight on correct and incorrect tokens; share of tokens without weight."""
    none = (weight == 0).astype(weight.dtype)
    return {
        "oreal/omega_correct/mean": token_mean(
            weight, scored.correct_tokens, counts.correct
        ),
        "oreal/omega_incorrect/mean": token_mean(
            weight, scored.incorrect_tokens, counts.incorrect
        ),
        "oreal/omega_zero_share": token_mean(none, scored.completion, counts.all),
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
        logit = terms.completion_mean(scored.token_scores, scored.completion)
        present = jnp.any(scored.completion, axis=-1)
        entropy = terms.outcome_cross_entropy(logit, scored.correct)
        hit = ((logit > 0) == scored.correct).astype(logit.dtype)
        loss = jnp.sum(entropy, where=present) / counts.all.sequences
        accuracy = jnp.sum(hit, where=present) / counts.all.sequences
        return loss, {"token_reward/loss": loss, "token_reward/accuracy": accuracy}
