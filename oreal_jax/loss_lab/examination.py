"""One loss on one batch: its terms, and the coefficient of every token."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oreal_jax.errors import InputError
from oreal_jax.loss_lab.recorded import Recorded
from oreal_jax.losses import Count, Counts, PolicyLoss, Scored, presets

ENTRIES = 2**22  # numbers of an array [B, T] that is alive at a time


class Examination(NamedTuple):
    """What a loss does to a batch.

    terms: the loss and what it reports. coefficients: d loss / d log p, an array for
    each completion; p moves in the sampled and in the full distribution alike, where
    they differ. shares: of the sum of |coefficient|, by correctness and by half.
    """

    terms: dict[str, float]
    coefficients: list[Float[np.ndarray, "_"]]
    shares: dict[str, float]


def examine(loss: PolicyLoss, recorded: Sequence[Recorded]) -> Examination:
    """Takes `loss` and its gradient on all of `recorded` as one batch.

    The batch is worked off in parts of bounded size: losses add up over parts.
    """
    T = max(trajectory.lists.shape[1] for trajectory in recorded)
    B = min(len(recorded), max(1, ENTRIES // T))
    counts = _counts(recorded)

    @jax.jit
    def differentiate(scored: Scored):
        def value(change):
            log_probs, full = jax.tree.map(
                lambda x: x + change, (scored.log_probs, scored.full_log_probs)
            )
            moved = scored._replace(log_probs=log_probs, full_log_probs=full)
            total, metrics = loss(moved, counts)
            return total, {"loss": total} | metrics

        none = jnp.zeros_like(scored.log_probs)
        gradient, metrics = jax.grad(value, has_aux=True)(none)
        return metrics, gradient

    terms: dict[str, float] = {}
    coefficients = []
    for start in range(0, len(recorded), B):
        part = recorded[start : start + B]
        metrics, gradient = jax.device_get(differentiate(_scored(loss, part, B, T)))
        for name, value in metrics.items():
            terms[name] = terms.get(name, 0.0) + float(value)
        coefficients += [
            gradient[row, : trajectory.lists.shape[1]]
            for row, trajectory in enumerate(part)
        ]
    return Examination(terms, coefficients, _shares(recorded, coefficients))


def load_loss(name: str) -> PolicyLoss:
    """A preset by its name, or the loss of a config file.

    Raises:
        InputError: no preset of this name, or not a config file.
    """
    if name.endswith(".py"):
        from oreal_jax.config import TrainConfig  # imports the model package
        from oreal_jax.config_loading import load

        return load(Path(name), TrainConfig).loss
    if name not in presets.NAMED:
        raise InputError(
            f"--loss {name}: neither a config file (.py) nor one of "
            f"{', '.join(presets.NAMED)}"
        )
    return presets.NAMED[name]


def agreement(one: Examination, other: Examination) -> dict[str, float]:
    """How far two losses want the same: cosine of their coefficients, and the share of
    tokens that both treat alike (pull, push or leave alone)."""
    a, b = np.concatenate(one.coefficients), np.concatenate(other.coefficients)
    # In double: squares of small coefficients vanish in single precision.
    a, b = a.astype(np.float64), b.astype(np.float64)
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return {
        "cosine": float(a @ b / norm) if norm else 0.0,
        "same_sign": float(np.mean(np.sign(a) == np.sign(b))),
    }


def _counts(recorded: Sequence[Recorded]) -> Counts:
    """Denominators of the whole batch."""
    tokens = np.array([trajectory.lists.shape[1] for trajectory in recorded])
    correct = np.array([trajectory.correct for trajectory in recorded])
    size = lambda values: jnp.asarray(max(1, values.sum()), jnp.float32)
    count = lambda kind: Count(size(tokens[kind]), size(kind))
    return Counts(count(correct), count(~correct), count(correct | True))


def _scored(loss: PolicyLoss, part: Sequence[Recorded], B: int, T: int) -> Scored:
    lists = np.zeros((5, B, T), np.float32)
    length, correct = np.zeros(B, int), np.zeros(B, bool)
    advantage, full = np.zeros(B, np.float32), np.zeros((B, T), np.float32)
    for row, trajectory in enumerate(part):
        length[row] = trajectory.lists.shape[1]
        lists[:, row, : length[row]] = trajectory.lists
        given = trajectory.full_log_probs
        full[row, : length[row]] = trajectory.lists[0] if given is None else given
        correct[row] = trajectory.correct
        advantages = loss.advantage(trajectory.rewards[None])
        advantage[row] = advantages[0, trajectory.place]
    completion = np.arange(T)[None] < length[:, None]
    return Scored(*map(jnp.asarray, (*lists, completion, correct, advantage, full)))


def _shares(
    recorded: Sequence[Recorded], coefficients: Sequence[Float[np.ndarray, "_"]]
) -> dict[str, float]:
    """Shares of the sum of |coefficient|: on correct and incorrect completions, on the
    first and second halves of completions; and the share of tokens with coefficient
    0."""
    correct = early = total = 0.0
    untouched = tokens = 0
    for trajectory, coefficient in zip(recorded, coefficients, strict=True):
        size = np.abs(coefficient).astype(np.float64)
        total += size.sum()
        correct += size.sum() * trajectory.correct
        early += size[: len(size) // 2].sum() + len(size) % 2 * size[len(size) // 2] / 2
        untouched, tokens = untouched + int((size == 0).sum()), tokens + len(size)
    whole = total or 1.0
    return {
        "correct": correct / whole,
        "incorrect": (total - correct) / whole,
        "early": early / whole,
        "late": (total - early) / whole,
        "untouched_tokens": untouched / tokens,
    }
