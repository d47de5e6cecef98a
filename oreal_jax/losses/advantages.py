"""Advantages over the K samples of each prompt, before any are filtered out.

Rewards are +1 (correct) and -1. With p the prompt's pass rate and c = sqrt((K-1)/K):

| advantage            | correct            | incorrect         |
|----------------------|--------------------|-------------------|
| `outcome`            | 1                  | -1                |
| `reshaped`           | 1                  | -(1-p)            |
| `rloo`               | 2 K/(K-1) (1-p)    | -2 K/(K-1) p      |
| `group_centred`      | 2 (1-p)            | -2 p              |
| `group_normalised`   | sqrt((1-p)/p) c    | -sqrt(p/(1-p)) c  |

With rewards of 1 and 0 (`ZeroOne`), `rloo` and `group_centred` are half as large,
`group_normalised` is the same, `outcome` and `reshaped` are 0 for incorrect samples.
NumPy on the host: these are a few thousand numbers per step.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from oreal_jax.losses.scored import Advantage


def outcome(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Return the rewards themselves: REINFORCE without a baseline."""
    return rewards


def reshaped(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Return R of correct samples, R* = (1 - p) R of incorrect ones (section 2.3).

    Best-of-N selects correct samples in proportion to (1-p)^(n-1), incorrect ones to
    (1-p)^n: the factor makes the gradients of the two consistent.
    """
    correct = rewards > 0
    incorrect_share = 1 - correct.mean(axis=1, keepdims=True)
    return np.where(correct, rewards, incorrect_share * rewards)


def rloo(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Return R_RLOO: each reward minus the mean of the other K - 1 (section 2.3)."""
    K = rewards.shape[1]
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / max(1, K - 1)
    return rewards - others


def group_centred(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Return each reward minus the mean of all K (Dr. GRPO, arXiv:2503.20783).

    RLOO times (K-1)/K; GRPO without the division by the standard deviation, which
    favours easy and hard prompts.
    """
    return rewards - rewards.mean(axis=1, keepdims=True)


def group_normalised(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Return (reward - mean) / (unbiased deviation + 1e-8) (arXiv:2402.03300)."""
    deviation = rewards.std(axis=1, ddof=1, keepdims=True)
    return group_centred(rewards) / (deviation + 1e-8)


@dataclasses.dataclass(frozen=True)
class ZeroOne:
    """Another advantage, of rewards 1 (correct) and 0 instead of +1 and -1."""

    advantage: Advantage

    def __call__(self, rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
        """Compute the advantages of the same samples."""
        return self.advantage((rewards + 1) / 2)
