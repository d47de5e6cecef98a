"""How well, and where, the token reward model separates correct from incorrect.

A completion is divided into tenths of its tokens; one of fewer than ten tokens repeats
some of them.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from oreal_jax.evaluation import statistics
from oreal_jax.report.runs import SavedCompletion
from oreal_jax.train.metrics import roc_area

PARTS = 10
BINS, BIN_SIZE = 10, 10  # calibration bins: maximum number, minimum size
SIGNIFICANT = 2.0  # standard errors


class ScoredCompletion(NamedTuple):
    """Token scores of a completion, summarised.

    part_scores: mean score within each tenth; credit: sigmoid of the mean score up to
    the end of each tenth, so the last one is the prediction of the outcome.
    early, weight: sum of token weights in the first half, and in all; 0 without any.
    """

    step: int
    group: int
    correct: bool
    part_scores: Float[np.ndarray, "10"]
    credit: Float[np.ndarray, "10"]
    early: float
    weight: float


def summarise(
    completion: SavedCompletion, weight: np.ndarray | None
) -> ScoredCompletion:
    """Summarise the token scores of a completion that has some."""
    scores = completion.per_token["token_scores"].astype(np.float64)
    starts = len(scores) * np.arange(PARTS) // PARTS
    ends = np.maximum(starts + 1, len(scores) * np.arange(1, PARTS + 1) // PARTS)
    sums = np.concatenate([[0.0], np.cumsum(scores)])
    early = total = 0.0
    if weight is not None:
        half, odd = divmod(len(weight), 2)  # a middle token counts half
        early = float(weight[:half].sum() + odd * weight[half] / 2)
        total = float(weight.sum())
    return ScoredCompletion(
        step=completion.step,
        group=completion.group,
        correct=completion.correct,
        part_scores=(sums[ends] - sums[starts]) / (ends - starts),
        credit=1 / (1 + np.exp(-sums[ends] / ends)),
        early=early,
        weight=total,
    )


def diagnose(completions: Sequence[ScoredCompletion]) -> dict[str, Any] | None:
    """Return all diagnostics as JSON values; None unless both outcomes are present.

    auc: of predictions; auc_parts: of the mean score within each tenth.
    pairs: mean over prompts of the share of (correct, incorrect) pairs in which the
        correct completion has the higher prediction.
    credit: mean by outcome at the end of each tenth; diverges_at: the first
        tenth from which on their difference exceeds two standard errors, or None.
    early: share of the token weight on the first half, by outcome.
    calibration: completions by prediction, in bins of equal size.
    """
    correct = np.array([c.correct for c in completions], bool)
    if not 0 < correct.sum() < len(correct):
        return None
    scores = np.array([c.part_scores for c in completions])
    credit = np.array([c.credit for c in completions])
    high, low = credit[correct], credit[~correct]
    difference = high.mean(axis=0) - low.mean(axis=0)
    differs = difference > SIGNIFICANT * np.sqrt(_error(high) + _error(low))
    stays = np.logical_and.accumulate(differs[::-1])[::-1]
    steps = [c.step for c in completions]
    return {
        "steps": [min(steps), max(steps)],
        "completions": len(completions),
        "auc": roc_area(credit[:, -1], correct),
        "auc_parts": [roc_area(column, correct) for column in scores.T],
        "pairs": _pairs(completions),
        "credit": {
            "correct": high.mean(axis=0).tolist(),
            "incorrect": low.mean(axis=0).tolist(),
        },
        "diverges_at": int(np.argmax(stays)) if stays.any() else None,
        "early": {
            "correct": _early([c for c in completions if c.correct]),
            "incorrect": _early([c for c in completions if not c.correct]),
        },
        "calibration": _calibration(credit[:, -1], correct),
    }


def _error(credit: Float[np.ndarray, "N 10"]) -> Float[np.ndarray, "10"]:
    """Return the squared standard error of the mean; infinite for one completion."""
    if len(credit) < 2:
        return np.full(credit.shape[1], np.inf)
    return credit.var(axis=0, ddof=1) / len(credit)


def _early(completions: Sequence[ScoredCompletion]) -> float | None:
    total = sum(c.weight for c in completions)
    return sum(c.early for c in completions) / total if total else None


def _pairs(completions: Sequence[ScoredCompletion]) -> dict[str, Any] | None:
    groups: dict[tuple[int, int], dict[bool, list[float]]] = defaultdict(dict)
    for c in completions:
        groups[c.step, c.group].setdefault(c.correct, []).append(float(c.credit[-1]))
    areas = [
        roc_area(
            np.array(group[True] + group[False]),
            np.arange(len(group[True]) + len(group[False])) < len(group[True]),
        )
        for group in groups.values()
        if len(group) == 2
    ]
    if not areas:
        return None
    return {"prompts": len(areas)} | statistics.mean(np.array(areas))._asdict()


def _calibration(
    predictions: Float[np.ndarray, "N"], correct: np.ndarray
) -> list[dict[str, Any]]:
    count = max(1, min(BINS, len(predictions) // BIN_SIZE))
    return [
        {"predicted": float(predictions[index].mean()), "completions": len(index)}
        | statistics.mean(correct[index].astype(float))._asdict()
        for index in np.array_split(np.argsort(predictions, kind="stable"), count)
    ]
