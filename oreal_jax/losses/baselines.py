"""Losses to compare OREAL with: plain cloning, REINFORCE, GRPO and its variants.

This trainer is strictly on-policy: a ratio is 1 up to the difference between sampler
and trainer, so clipping rarely has an effect.
"""

import dataclasses

from oreal_jax.losses import terms
from oreal_jax.losses.advantages import group_centred, group_normalised, outcome, rloo
from oreal_jax.losses.aggregation import (
    Aggregate,
    FixedLength,
    sequence_mean,
    token_mean,
)
from oreal_jax.losses.oreal import weighted_sum
from oreal_jax.losses.scored import Advantage, Counts, Metrics, Scalar, Scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNCloning:
    """Cloning of correct completions: mean over their tokens of A (-log pi).

    With A = 1, it is supervised fine-tuning on solutions and, on the correct samples of
    a model, L1 without its KL (section 2.2, lemma 2.1). Differs from `Reinforce` in
    that incorrect completions are ignored.
    """

    advantage: Advantage = outcome

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        clone = terms.clone(scored.log_probs) * scored.advantage[:, None]
        loss = token_mean(clone, scored.correct_tokens, counts.correct)
        return loss, {"actor/pg_loss": loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Policy gradient: mean over tokens of -A pi / stop(pi), KL to the reference.

    The first rung of OREAL's ablation (Williams 1992), with A the outcome; the second
    with `advantage=rloo`. `importance_cap` as in `Oreal`. Differs from `Oreal` in its
    one denominator for correct and incorrect tokens together, and in no token weights.
    """

    advantage: Advantage = outcome
    kl_weight: float = 0.01
    entropy_weight: float = 0.0
    importance_cap: float | None = None

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        gain = terms.reinforce(scored.log_probs, scored.advantage)
        importance = terms.truncated_importance(
            scored.log_probs, scored.old_log_probs, self.importance_cap
        )
        kl = terms.kl_k3(scored.kl_log_probs, scored.reference_log_probs)
        mean = lambda values: token_mean(values, scored.completion, counts.all)
        policy, penalty = mean(gain * importance), mean(kl)
        loss = policy + self.kl_weight * penalty
        loss = loss - self.entropy_weight * mean(scored.entropy)
        return loss, {"actor/pg_loss": policy, "actor/kl_loss": penalty}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """GRPO (arXiv:2402.03300): clipped surrogate, KL (k3) to the reference.

    Averaged over each completion and then over completions. Differs from `Reinforce` in
    its normalised advantage, in its ratio to the policy that generated the tokens, and
    in that tokens of long completions weigh less.
    """

    advantage: Advantage = group_normalised
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.04
    aggregate: Aggregate = sequence_mean

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        gain = terms.clipped_surrogate(
            scored.log_probs,
            scored.old_log_probs,
            scored.advantage,
            low=self.clip_low,
            high=self.clip_high,
        )
        kl = terms.kl_k3(scored.kl_log_probs, scored.reference_log_probs)
        policy = self.aggregate(gain, scored.completion, counts.all)
        penalty = self.aggregate(kl, scored.completion, counts.all)
        loss = policy + self.kl_weight * penalty
        return loss, {"actor/pg_loss": policy, "actor/kl_loss": penalty}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrGrpo:
    """GRPO without its two biases and without KL (Dr. GRPO, arXiv:2503.20783).

    Advantages are not divided by the group's standard deviation, and the sums of all
    completions are divided by the same length, `longest`.
    """

    longest: int
    advantage: Advantage = group_centred
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        return _grpo_without_kl(self, FixedLength(self.longest))(scored, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dapo:
    """GRPO with a higher upper clip bound, a mean over tokens and no KL (DAPO).

    From arXiv:2503.14476. Its dynamic sampling is `TrainConfig.keep` (groups with equal
    verdicts are not trained on); its overlong filter is not part of a loss.
    """

    advantage: Advantage = group_normalised
    clip_low: float = 0.2
    clip_high: float = 0.28

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        return _grpo_without_kl(self, token_mean)(scored, counts)


def _grpo_without_kl(loss: DrGrpo | Dapo, aggregate: Aggregate) -> Grpo:
    low, high = loss.clip_low, loss.clip_high
    return Grpo(clip_low=low, clip_high=high, kl_weight=0.0, aggregate=aggregate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XtunerOreal:
    """OREAL without token rewards, as in XTuner V1 (InternLM/xtuner, v1/rl/oreal).

    positive_weight * (clone_weight * C + S+) + negative_weight * S- + kl_weight * KL

    C  = mean over correct tokens of -log pi
    S+ = mean over correct tokens of the clipped surrogate
    S- = mean over incorrect tokens of the clipped surrogate, bounded by `dual`
    KL = mean over all tokens of k3 to the reference

    Differs from `Oreal` without token weights in that correct completions are both
    cloned and reinforced, and in the clipped ratio to the policy that generated the
    tokens.
    """

    advantage: Advantage = rloo
    positive_weight: float = 1.0
    clone_weight: float = 1.0
    negative_weight: float = 1.0
    kl_weight: float = 0.001
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual: float = 3.0

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss and its metrics."""
        gain = terms.clipped_surrogate(
            scored.log_probs,
            scored.old_log_probs,
            scored.advantage,
            low=self.clip_low,
            high=self.clip_high,
            dual=self.dual,
        )
        clone = terms.clone(scored.log_probs) * self.clone_weight
        kl = terms.kl_k3(scored.kl_log_probs, scored.reference_log_probs)
        return weighted_sum(
            token_mean(clone + gain, scored.correct_tokens, counts.correct),
            token_mean(gain, scored.incorrect_tokens, counts.incorrect),
            token_mean(kl, scored.completion, counts.all),
            (self.positive_weight, self.negative_weight, self.kl_weight),
        )
