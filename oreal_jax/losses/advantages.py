"""Advantages over the K samples of each prompt, before anything is filtered.

Host-side NumPy: rewards arrive from the verifier, a few thousand numbers a step.
"""

import numpy as np
from jaxtyping import Float


def rloo(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """Each reward minus the mean of the other K - 1 (arXiv:2402.14740).

    With rewards +1 / -1 and pass rate p this is OREAL's reshaped reward:
    2 K/(K-1) (1-p) for right samples, -2 K/(K-1) p for wrong ones.
    """
    K = rewards.shape[1]
    others = (rewards.sum(axis=1, keepdims=True) - rewards) / max(1, K - 1)
    return rewards - others


def group_normalised(rewards: Float[np.ndarray, "N K"]) -> Float[np.ndarray, "N K"]:
    """(reward - mean) / (standard deviation + 1e-8), unbiased (arXiv:2402.03300)."""
    spread = rewards.std(axis=1, ddof=1, keepdims=True)
    return (rewards - rewards.mean(axis=1, keepdims=True)) / (spread + 1e-8)
