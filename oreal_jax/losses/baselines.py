"""Plain objectives: a loss to compare OREAL with, and one for supervised tuning."""

import dataclasses

from oreal_jax.losses import terms
from oreal_jax.losses.scored import Counts, Metrics, Scalar, Scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOfNCloning:
    """Clones right completions and ignores the rest; on solutions, plain SFT."""

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Mean -log p over the tokens of right completions."""
        scored = scored.masked()
        right = scored.completion & scored.correct[:, None]
        loss = terms.masked_sum(terms.clone(scored.log_probs), right) / counts.positive
        return loss, {"actor/pg_loss": loss}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Policy gradient with the batch's advantages, averaged over tokens."""

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Mean -A p/stop(p) over the tokens of all completions."""
        scored = scored.masked()
        gain = terms.reinforce(scored.log_probs, scored.advantage)
        loss = terms.masked_sum(gain, scored.completion) / counts.completion
        return loss, {"actor/pg_loss": loss}
