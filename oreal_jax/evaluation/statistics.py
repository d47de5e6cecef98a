"""Estimates from correct and incorrect completions, intervals, and a paired test.

Shapes: N problems, K samples per problem.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

RESAMPLES = 2000
LEVEL = 0.95


class Measure(NamedTuple):
    """A mean over problems with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.1%} ({self.low:.1%} to {self.high:.1%})"


def pass_at(k: int, correct: Bool[np.ndarray, "N K"]) -> Float[np.ndarray, "N"]:
    """Estimate the chance that one of k samples of a problem is correct.

    1 - C(K-c, k) / C(K, k) where c of K are correct, the unbiased estimator of
    arXiv:2107.03374, eq. 1.

    Raises:
        ValueError: k is not within 1..K.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be within 1..{samples}, the samples per problem")
    incorrect = samples - correct.sum(axis=1, keepdims=True)
    # C(K-c, k) / C(K, k) factor by factor, without huge numbers.
    i = np.arange(k)
    return 1 - np.prod(np.maximum(incorrect - i, 0) / (samples - i), axis=1)


def majority(votes: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """Return the chance that the most frequent answer is correct; ties are random.

    All correct completions vote for one answer, however it is written; None is no vote.
    """
    counts = Counter(
        "correct" if is_correct else ("incorrect", vote)
        for vote, is_correct in zip(votes, correct, strict=True)
        if is_correct or vote is not None
    )
    top = max(counts.values(), default=0)
    if counts["correct"] < top or top == 0:
        return 0.0
    return 1 / list(counts.values()).count(top)


def mean(per_problem: Float[np.ndarray, "N"], seed: int = 0) -> Measure:
    """Return the mean over problems with a percentile bootstrap interval.

    Resampling problems that are all at 0 (or all at 1) shows no spread; the interval
    then is the exact one for 0 (or N) successes of N (Clopper and Pearson).
    """
    count, value = len(per_problem), float(per_problem.mean())
    if np.all(per_problem == per_problem[0]) and value in (0.0, 1.0):
        width = 1 - ((1 - LEVEL) / 2) ** (1 / count)
        return Measure(value, max(0.0, value - width), min(1.0, value + width))
    return Measure(value, *bootstrap(per_problem, seed))


def bootstrap(per_problem: Float[np.ndarray, "N"], seed: int) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of the mean over problems."""
    random, count = np.random.default_rng(seed), len(per_problem)
    resamples = random.integers(count, size=(RESAMPLES, count))
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(per_problem[resamples].mean(axis=1), tails)
    return float(low), float(high)


class Paired(NamedTuple):
    """Two models on the same problems; `difference` is second minus first.

    `better` and `worse` count problems on which the second model is.
    """

    first: float
    second: float
    difference: Measure
    p_value: float
    problems: int
    better: int
    worse: int


def paired(
    first: Int[np.ndarray, "N"],
    second: Int[np.ndarray, "N"],
    samples: tuple[int, int],
    seed: int = 0,
) -> Paired:
    """Compare each problem's correct completions out of the models' `samples`.

    The p-value is that of the two-sided sign-flip test: if neither model were better,
    each problem's difference could as well have had the other sign. All sign patterns
    are counted exactly. With one sample per problem this is McNemar's exact test.
    """
    first_samples, second_samples = samples
    scaled = second * first_samples - first * second_samples  # integers
    differences = scaled / (first_samples * second_samples)
    return Paired(
        first=float(first.mean() / first_samples),
        second=float(second.mean() / second_samples),
        difference=Measure(float(differences.mean()), *bootstrap(differences, seed)),
        p_value=sign_flip_p_value(scaled),
        problems=len(scaled),
        better=int((scaled > 0).sum()),
        worse=int((scaled < 0).sum()),
    )


def sign_flip_p_value(differences: Int[np.ndarray, "N"]) -> float:
    """Compute the exact chance that random signs give a sum at least as far from 0.

    The distribution of the sum is built up one difference at a time.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    differences = differences // np.gcd.reduce(differences)
    limit = int(np.abs(differences).sum())
    chances = np.zeros(2 * limit + 1)  # of sums -limit .. limit
    chances[limit] = 1.0
    for size in np.abs(differences):
        half = chances / 2
        chances = np.roll(half, size) + np.roll(half, -size)
    extreme = np.abs(np.arange(-limit, limit + 1)) >= abs(int(differences.sum()))
    return float(min(1.0, chances[extreme].sum()))
