"""Estimates from correct and incorrect attempts, their intervals, and a paired test.

Letters: N problems, K samples a problem.
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
    """The chance that one of k samples of a problem is correct: 1 - C(K-c, k) / C(K, k)
    where c of K are, the unbiased estimator of arXiv:2107.03374, eq. 1.

    Raises:
        ValueError: k is not within 1..K.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be within 1..{samples}, the samples a problem")
    incorrect = samples - correct.sum(axis=1, keepdims=True)
    # C(K-c, k) / C(K, k) as a product, factor by factor: no huge numbers.
    drawn = np.arange(k)
    return 1 - np.prod(np.maximum(incorrect - drawn, 0) / (samples - drawn), axis=1)


def majority(votes: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    """The chance that the most frequent answer is correct, ties broken at random.

    Attempts judged correct vote alike however they are written; None is no vote.
    """
    cast = [
        "correct" if r else ("incorrect", v)
        for v, r in zip(votes, correct, strict=True)
        if r or v is not None
    ]
    counts = Counter(cast)
    most = max(counts.values(), default=0)
    if counts["correct"] < most or most == 0:
        return 0.0
    return 1 / sum(count == most for count in counts.values())


def mean(per_problem: Float[np.ndarray, "N"], seed: int = 0) -> Measure:
    """The mean over problems with a percentile bootstrap over problems.

    Resampling problems that are all at 0 (or all at 1) shows no spread; the interval
    then is the exact one for 0 (or N) successes of N (Clopper and Pearson).
    """
    count, value = len(per_problem), float(per_problem.mean())
    if np.all(per_problem == per_problem[0]) and value in (0.0, 1.0):
        reach = 1 - ((1 - LEVEL) / 2) ** (1 / count)
        return Measure(value, max(0.0, value - reach), min(1.0, value + reach))
    return Measure(value, *bootstrap(per_problem, seed))


def bootstrap(per_problem: Float[np.ndarray, "N"], seed: int) -> tuple[float, float]:
    """95% percentile bootstrap of the mean over problems."""
    random, count = np.random.default_rng(seed), len(per_problem)
    draws = random.integers(count, size=(RESAMPLES, count))
    tails = (1 - LEVEL) / 2, (1 + LEVEL) / 2
    low, high = np.quantile(per_problem[draws].mean(axis=1), tails)
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
    """Compares correct attempts of each problem out of `samples` of either model.

    The p-value is that of the two-sided sign-flip test: if neither model were better,
    each problem's difference could as well have had the other sign. All sign patterns
    are counted, none drawn. With one sample a problem this is McNemar's exact test.
    """
    of_first, of_second = samples
    scaled = second * of_first - first * of_second  # whole numbers
    differences = scaled / (of_first * of_second)
    return Paired(
        first=float(first.mean() / of_first),
        second=float(second.mean() / of_second),
        difference=Measure(float(differences.mean()), *bootstrap(differences, seed)),
        p_value=sign_flip_p_value(scaled),
        problems=len(scaled),
        better=int((scaled > 0).sum()),
        worse=int((scaled < 0).sum()),
    )


def sign_flip_p_value(differences: Int[np.ndarray, "N"]) -> float:
    """How often random signs make the sum at least as far from 0 as it is, exactly.

    The distribution of the sum is built up one difference at a time.
    """
    sizes = np.abs(differences[differences != 0])
    if not len(sizes):
        return 1.0
    sizes = sizes // np.gcd.reduce(sizes)
    most = int(sizes.sum())
    chances = np.zeros(2 * most + 1)  # of sums -most .. most
    chances[most] = 1.0
    for size in sizes:
        half = chances / 2
        chances = np.roll(half, size) + np.roll(half, -size)
    observed = abs(int((np.sign(differences[differences != 0]) * sizes).sum()))
    sums = np.abs(np.arange(-most, most + 1))
    return float(min(1.0, chances[sums >= observed].sum()))
