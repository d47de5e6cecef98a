"""A loss of your own: ten lines in a config file, without registration.

    oreal train configs/my_loss.py                       # after `make demo`
    oreal losses runs/demo/run/trajectories --loss configs/my_loss.py --loss released

This one clones correct completions, ignores incorrect ones, and weights a completion by
how rarely its prompt is solved. It is a starting point, not a recommendation.
"""

import dataclasses

import smollm2_arithmetic  # the config next to this one

from oreal_jax.losses import (
    Advantage,
    Counts,
    Metrics,
    Scalar,
    Scored,
    rloo,
    terms,
    token_mean,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RareCloning:
    """weight * mean over correct tokens of A (-log pi), with A = 2 K/(K-1) (1-p)."""

    advantage: Advantage = rloo
    weight: float = 0.5

    def __call__(self, scored: Scored, counts: Counts) -> tuple[Scalar, Metrics]:
        """Compute the loss, and metrics for metrics.jsonl."""
        clone = terms.clone(scored.log_probs) * scored.advantage[:, None]
        loss = self.weight * token_mean(clone, scored.correct_tokens, counts.correct)
        return loss, {"actor/pg_loss": loss}


config = dataclasses.replace(
    smollm2_arithmetic.config, loss=RareCloning(), token_reward=None, freeze_steps=0
)
