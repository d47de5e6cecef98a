"""The OREAL objective, as released and as printed, and the token reward loss.

Correct completions are cloned and incorrect ones pushed down, token by token in
proportion to the token weights; a KL penalty limits the change of the policy.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from oreal_jax.losses import terms, weights
from oreal_jax.losses.advantages import reshaped, rloo
from oreal_jax.losses.aggregation import sequence_sum, token_mean
from oreal_jax.losses.scored import Advantage, Counts, Metrics, PerToken, Scalar, Scored

Kl = Callable[[PerToken, PerToken], PerToken]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Oreal:
    """OREAL as released (InternLM/OREAL 2859cc0; published 7B settings).

    positive_weight * P + negative_weight * N + kl_weight * KL, where

    P  = mean over correct tokens of omega+ A (-log pi)
    N  = mean over incorrect tokens of omega- (-A) pi / stop(pi)
    KL = mean over all tokens of kl(log pi, log reference)

    omega+ = weight_correct(q), omega- = weight_incorrect(1 - q), q = credit(scores).
    With the factor A, as in all released configs, P has the gradient of REINFORCE;
    without it (`clone_times_advantage=False`), that of cloning, as in the paper.
    `importance_cap` weights P and N by min(pi / pi_old, cap); None, as released: by 1.

    Differs from `OrealPaper` in its KL to the reference model, RLOO for correct and
    incorrect samples, means over tokens and running credit; from `XtunerOreal` in its
    token weights.
    """

    advantage: Advantage = rloo
    positive_weight: float = 1.0
    negative_weight: float = 0.5
    kl_weight: float = 0.01
    clone_times_advantage: bool = True
    credit: weights.Credit = weights.running_credit
    weight_correct: weights.Weighting = weights.ThresholdWeights()
    weight_incorrect: weights.Weighting = weights.ThresholdWeights()
    kl: Kl = terms.kl_k3
    importance_cap: float | None = None

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        omega = weights.token_weights(
            scored, self.credit, self.weight_correct, self.weight_incorrect
        )
        importance = terms.truncated_importance(
            scored.log_probs, scored.old_log_probs, self.importance_cap
        )
        factor = scored.advantage[:, None] if self.clone_times_advantage else 1.0
        positive = terms.clone(scored.log_probs) * omega * factor * importance
        negative = terms.reinforce(scored.log_probs, scored.advantage)
        negative = negative * omega * importance
        kl = self.kl(scored.kl_log_probs, scored.reference_log_probs)
        loss, metrics = weighted_sum(
            token_mean(positive, scored.correct_tokens, counts.correct),
            token_mean(negative, scored.incorrect_tokens, counts.incorrect),
            token_mean(kl, scored.completion, counts.all),
            (self.positive_weight, self.negative_weight, self.kl_weight),
        )
        return loss, metrics | weight_metrics(omega, scored, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrealPaper:
    """OREAL as printed: Eq. 11 of arXiv:2502.06781v1, with the weights of Eq. 10.

    Mean over completions of their sums over tokens of

        omega+ (-log pi)                           where correct
        eta omega- F(1-p) log(pi / pi_old)         where incorrect
        beta kl(log pi, log pi_old)                everywhere

    F is the identity, so F(1-p) = 1-p, computed as -`advantage` (1 if `advantage` is
    `outcome`). Eq. 11 omits F(1-p) and gives no value for eta; 0.5 is the release's.
    Strictly on-policy, the KL to pi_old is 0, and so is its gradient with k2 or k3.
    """

    advantage: Advantage = reshaped
    eta: float = 0.5
    beta: float = 0.01
    kl: Kl = terms.kl_k3

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        half = weights.ThresholdWeights(threshold=0.5)
        omega = weights.token_weights(scored, weights.token_credit, half, half)
        positive = terms.clone(scored.log_probs) * omega
        factor = -scored.advantage[:, None] * omega
        negative = terms.suppress(scored.log_probs, scored.old_log_probs, factor)
        kl = self.kl(scored.log_probs, scored.old_log_probs)
        loss, metrics = weighted_sum(
            sequence_sum(positive, scored.correct_tokens, counts.all),
            sequence_sum(negative, scored.incorrect_tokens, counts.all),
            sequence_sum(kl, scored.completion, counts.all),
            (1.0, self.eta, self.beta),
        )
        return loss, metrics | weight_metrics(omega, scored, counts)


def weighted_sum(
    positive: Scalar, negative: Scalar, kl: Scalar, factors: tuple[float, float, float]
) -> tuple[Scalar, Metrics]:
    """Return the weighted sum of the three terms, and the terms as metrics."""
    policy = factors[0] * positive + factors[1] * negative
    return policy + factors[2] * kl, {
        "actor/pg_loss": policy,
        "actor/positive_loss": positive,
        "actor/negative_loss": negative,
        "actor/kl_loss": kl,
    }


def weight_metrics(omega: PerToken, scored: Scored, counts: Counts) -> Metrics:
    """Return the mean weight by outcome and the share of tokens with weight 0."""
    correct, incorrect = scored.correct_tokens, scored.incorrect_tokens
    zero = (omega == 0).astype(omega.dtype)
    return {
        "oreal/omega_correct/mean": token_mean(omega, correct, counts.correct),
        "oreal/omega_incorrect/mean": token_mean(omega, incorrect, counts.incorrect),
        "oreal/omega_zero_share": token_mean(zero, scored.completion, counts.all),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenReward:
    """Cross-entropy loss of the token reward model, trained on outcomes (Eq. 12).

    Mean over completions of the cross-entropy of sigmoid(mean token score) and outcome.
    """

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        logit = terms.completion_mean(scored.token_scores, scored.completion)
        cross_entropy = terms.outcome_cross_entropy(logit, scored.correct)
        accurate = ((logit > 0) == scored.correct).astype(logit.dtype)
        present = jnp.any(scored.completion, axis=-1)
        mean = lambda x: jnp.sum(x, where=present) / counts.all.sequences
        loss = mean(cross_entropy)
        accuracy = mean(accurate)
        return loss, {"token_reward/loss": loss, "token_reward/accuracy": accuracy}
