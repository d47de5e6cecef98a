"""What a step's scores say: does the sampler agree with the trainer, does the token
reward model tell right from wrong."""

from collections.abc import Sequence

import jax
import numpy as np

from oreal_jax.data.packing import Batch, Slot
from oreal_jax.rollout import TokenScores, Trajectory
from oreal_jax.train.step import Scores


def agreement(
    kept: Sequence[Trajectory], slots: Sequence[Slot], scores: Scores, batch: Batch
) -> dict[str, float]:
    """Difference of token probabilities between sampler and trainer, and the area under
    the token reward model's ROC curve. Attaches the scores to the trajectories."""
    arrays = jax.device_get(
        (
            scores.log_probs,
            batch.reference_log_probs,
            scores.entropy,
            scores.token_scores,
        )
    )
    differences, means = [], []
    for trajectory, (micro, place) in zip(kept, slots, strict=True):
        size = len(trajectory.completion.tokens)
        said = TokenScores(*(values[micro, place, :size] for values in arrays))
        trajectory.scores = said
        change = np.exp(said.log_probs) - np.exp(trajectory.old_log_probs)
        differences.append(np.abs(change))
        means.append(said.token_scores.mean())
    difference = np.concatenate(differences)
    correct = np.array([t.correct for t in kept])
    return {
        "training/rollout_probs_diff_mean": float(difference.mean()),
        "training/rollout_probs_diff_max": float(difference.max()),
        "token_reward/auc": roc_area(np.array(means), correct),
    }


def roc_area(scores: np.ndarray, correct: np.ndarray) -> float:
    """Probability that a right completion scores above a wrong one (ties count half).

    NaN where one kind is absent.
    """
    right, wrong = scores[correct], scores[~correct]
    if not right.size or not wrong.size:
        return float("nan")
    gap = right[:, None] - wrong[None]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))
