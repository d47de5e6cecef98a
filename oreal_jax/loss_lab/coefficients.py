"""One loss on one batch: its terms, and the coefficient of every token."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oreal_jax.loss_lab.load import SavedTrajectory
from oreal_jax.losses import Counts, PolicyLoss, Scored

MAX_ENTRIES = 2**22  # of an array [B, T] on the device


class LossResult(NamedTuple):
    """Values and gradients of a loss on a batch.

    terms: the loss and its metrics.
    coefficients: d loss / d log pi, one array per completion; where pi of the sampled
        and of the full distribution differ, both change together.
    shares: of the sum of |coefficient|, by outcome and by half of a completion.
    """

    terms: dict[str, float]
    coefficients: list[Float[np.ndarray, "_"]]
    shares: dict[str, float]


def evaluate_loss(
    loss: PolicyLoss, trajectories: Sequence[SavedTrajectory]
) -> LossResult:
    """Evaluate `loss` and its gradient on all of `trajectories` as one batch.

    Computed in parts of bounded size: losses add up over parts.
    """
    lengths = np.array([trajectory.length for trajectory in trajectories])
    correct = jnp.asarray([trajectory.correct for trajectory in trajectories])
    T = int(lengths.max())
    B = min(len(trajectories), max(1, MAX_ENTRIES // T))
    counts = Counts.of(jnp.arange(T)[None] < lengths[:, None], correct)

    @jax.jit
    def differentiate(scored: Scored):
        def value(change):
            log_probs, full = jax.tree.map(
                lambda x: x + change, (scored.log_probs, scored.full_log_probs)
            )
            changed = scored._replace(log_probs=log_probs, full_log_probs=full).masked()
            total, metrics = loss(changed, counts)
            return total, {"loss": total} | metrics

        zero = jnp.zeros_like(scored.log_probs)
        gradient, metrics = jax.grad(value, has_aux=True)(zero)
        return metrics, gradient

    terms: dict[str, float] = {}
    coefficients = []
    for start in range(0, len(trajectories), B):
        part = trajectories[start : start + B]
        metrics, gradient = jax.device_get(differentiate(_scored(loss, part, B, T)))
        for name, value in metrics.items():
            terms[name] = terms.get(name, 0.0) + float(value)
        coefficients += [
            values[: trajectory.length]
            for values, trajectory in zip(gradient, part, strict=False)
        ]
    return LossResult(terms, coefficients, _shares(trajectories, coefficients))


def agreement(a: LossResult, b: LossResult) -> dict[str, float]:
    """Return the cosine of two losses' coefficients, and the share of equal signs."""
    # In double: squares of small coefficients vanish in single precision.
    x, y = (np.concatenate(r.coefficients).astype(np.float64) for r in (a, b))
    norm = np.linalg.norm(x) * np.linalg.norm(y)
    return {
        "cosine": float(x @ y / norm) if norm else 0.0,
        "same_sign": float(np.mean(np.sign(x) == np.sign(y))),
    }


def _scored(
    loss: PolicyLoss, trajectories: Sequence[SavedTrajectory], B: int, T: int
) -> Scored:
    """Return the trajectories as the loss receives them, padded to [B, T]."""
    per_token = np.zeros((6, B, T), np.float32)
    completion, correct = np.zeros((B, T), bool), np.zeros(B, bool)
    advantage = np.zeros(B, np.float32)
    for row, trajectory in enumerate(trajectories):
        per_token[:, row, : trajectory.length] = trajectory.per_token
        completion[row, : trajectory.length] = True
        correct[row] = trajectory.correct
        advantages = loss.advantage(trajectory.rewards[None])[0]
        advantage[row] = advantages[trajectory.sample_index]
    *first, full = per_token
    return Scored(*map(jnp.asarray, (*first, completion, correct, advantage, full)))


def _shares(
    trajectories: Sequence[SavedTrajectory],
    coefficients: Sequence[Float[np.ndarray, "_"]],
) -> dict[str, float]:
    """Return shares of the sum of |coefficient|, and of tokens with coefficient 0.

    The middle token of a completion counts half as early, half as late.
    """
    sizes = [np.abs(values).astype(np.float64) for values in coefficients]
    correct = early = total = 0.0
    for trajectory, size in zip(trajectories, sizes, strict=True):
        half, odd = divmod(len(size), 2)
        total += size.sum()
        correct += size.sum() * trajectory.correct
        early += size[:half].sum() + odd * size[half] / 2
    scale = total or 1.0
    return {
        "correct": correct / scale,
        "incorrect": (total - correct) / scale,
        "early": early / scale,
        "late": (total - early) / scale,
        "untouched_tokens": float(np.mean(np.concatenate(sizes) == 0)),
    }
