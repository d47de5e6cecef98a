"""What OREAL is compared with: its ancestors, its relatives, and plain cloning.

Every loss is whole: its advantage, its terms and what they are averaged over. Entropy
bonus and clip bounds are settings; strictly on-policy, as this trainer is, a ratio is 1
up to the difference of sampler and trainer, so clipping rarely does anything.
"""

import dataclasses

from oreal_jax.losses import terms
from oreal_jax.losses.advantages import (
    group_centred,
    group_normalised,
    outcome,
    rloo,
)
from oreal_jax.losses.aggregation import (
    Aggregate,
    FixedLength,
    sequence_mean,
    token_mean,
)
from oreal_jax.losses.scored import Advantage, Counts, Metrics, Scalar, Scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNCloning:
    """Clones correct completions and ignores the rest: mean of A (-log p), correct
    tokens.

    A is 1 for a correct completion. On solutions, this is supervised fine-tuning; on
    the correct samples of a model, OREAL's L1 without its KL (section 2.2, lemma 2.1).
    Differs from `Reinforce` in that incorrect completions do nothing.
    """

    advantage: Advantage = outcome

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss."""
        scored = scored.masked()
        clone = terms.clone(scored.log_probs) * scored.advantage[:, None]
        loss = token_mean(clone, scored.correct_tokens, counts.correct)
        return loss, {"actor/pg_loss": loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Policy gradient: mean over tokens of -A p/stop(p), and a KL to the reference.

    The first rung of OREAL's ablation (Williams 1992), with A the outcome; its second
    with `advantage=rloo`. `importance_cap` as in `Oreal`. Differs from `Oreal` in one
    denominator for correct and incorrect tokens together, and in no weights.
    """

    advantage: Advantage = outcome
    kl_weight: float = 0.01
    entropy_weight: float = 0.0
    importance_cap: float | None = None

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss and its terms."""
        scored = scored.masked()
        gain = terms.reinforce(scored.log_probs, scored.advantage)
        if self.importance_cap is not None:
            gain = gain * terms.truncated_importance(
                scored.log_probs, scored.old_log_probs, self.importance_cap
            )
        policy = token_mean(gain, scored.completion, counts.all)
        kl = terms.kl_k3(scored.kl_log_probs, scored.reference_log_probs)
        penalty = token_mean(kl, scored.completion, counts.all)
        entropy = token_mean(scored.entropy, scored.completion, counts.all)
        loss = policy + self.kl_weight * penalty - self.entropy_weight * entropy
        return loss, {"actor/pg_loss": policy, "actor/kl_loss": penalty}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grpo:
    """Clipped surrogate with a group-normalised advantage (arXiv:2402.03300), averaged
    over each completion and then over completions, and a KL (k3) to the reference.

    Differs from `Reinforce` in its normalised advantage, in its ratio to the policy
    that drew the tokens, and in that a token of a long completion weighs less.
    """

    advantage: Advantage = group_normalised
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.04
    aggregate: Aggregate = sequence_mean

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss and its terms."""
        scored = scored.masked()
        gain = terms.clipped_surrogate(
            scored.log_probs,
            scored.old_log_probs,
            scored.advantage,
            low=self.clip_low,
            high=self.clip_high,
        )
        policy = self.aggregate(gain, scored.completion, counts.all)
        kl = terms.kl_k3(scored.kl_log_probs, scored.reference_log_probs)
        penalty = self.aggregate(kl, scored.completion, counts.all)
        loss = policy + self.kl_weight * penalty
        return loss, {"actor/pg_loss": policy, "actor/kl_loss": penalty}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrGrpo:
    """GRPO without its two biases (arXiv:2503.20783): no division by the spread of a
    prompt's rewards, none by a completion's length; no KL.

    `longest` is the length that all completions are divided by.
    """

    longest: int
    advantage: Advantage = group_centred
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss."""
        grpo = Grpo(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_weight=0.0,
            aggregate=FixedLength(self.longest),
        )
        return grpo(scored, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dapo:
    """GRPO with a higher upper clip bound, a mean over tokens and no KL
    (arXiv:2503.14476).

    Its dynamic sampling is `keep` (prompts that are all correct or all incorrect are
    left out); its overlong filter is not part of a loss.
    """

    advantage: Advantage = group_normalised
    clip_low: float = 0.2
    clip_high: float = 0.28

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """The loss."""
        grpo = Grpo(
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_weight=0.0,
            aggregate=token_mean,
        )
        return grpo(scored, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class XtunerOreal:
    """OREAL without token rewards as XTuner V1 has it (InternLM/xtuner, v1/rl/oreal):

    positive_weight * (clone_weight * C + S+) + negative_weight * S- + kl_weight * KL

    C  = mean over correct tokens of -log p
    S+ = mean over correct tokens of the clipped surrogate, S- the same over incorrect
    ones
    KL = mean over all tokens of k3 to the reference

    Differs from `Oreal` without token weights in that correct completions are both
    cloned and reinforced, and in its clipped ratio to the policy that drew the tokens.
    `dual` bounds the surrogate of incorrect tokens (dual clip).
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
        """The loss and its terms."""
        scored = scored.masked()
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
        positive = token_mean(clone + gain, scored.correct_tokens, counts.correct)
        negative = token_mean(gain, scored.incorrect_tokens, counts.incorrect)
        penalty = token_mean(kl, scored.completion, counts.all)
        policy = self.positive_weight * positive + self.negative_weight * negative
        return policy + self.kl_weight * penalty, {
            "actor/pg_loss": policy,
            "actor/positive_loss": positive,
            "actor/negative_loss": negative,
            "actor/kl_loss": penalty,
        }
