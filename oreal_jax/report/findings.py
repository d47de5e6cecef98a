"""Warnings about a run, derived from its metrics.

Trends compare the mean of the last fifth of the steps with that of the first fifth.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MIN_STEPS = 6  # before trends are computed
SPIKE = 10.0  # times the median of the previous steps
SPIKE_HISTORY = 5  # minimum steps for this median


class Finding(NamedTuple):
    """A warning: the metric that shows it, and a text."""

    metric: str
    text: str


class Series(NamedTuple):
    """The finite values of a metric, by step."""

    steps: np.ndarray
    values: np.ndarray

    @property
    def start(self) -> float:
        """The mean of the first fifth, at least three values."""
        return float(self.values[: max(3, len(self.values) // 5)].mean())

    @property
    def recent(self) -> float:
        """The mean of the last fifth, at least three values."""
        return float(self.values[-max(3, len(self.values) // 5) :].mean())


Rows = Sequence[Mapping[str, Any]]


def series(rows: Rows, metric: str) -> Series:
    """Return the values of a metric, without steps that have none."""
    pairs = [(row["step"], row.get(metric)) for row in rows]
    pairs = [
        (step, x)
        for step, x in pairs
        if isinstance(x, int | float) and math.isfinite(x)
    ]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return Series(np.array(steps, int), np.array(values, float))


def find(rows: Rows) -> list[Finding]:
    """Return all warnings about the metrics of a run."""
    return [finding for check in CHECKS for finding in check(rows)]


def _trend(metric: str, text: Callable[[Series], str | None]) -> Callable:
    """Return a check of a metric that has enough steps; `text` returns a warning."""

    def check(rows: Rows) -> list[Finding]:
        values = series(rows, metric)
        warning = text(values) if len(values.steps) >= MIN_STEPS else None
        return [Finding(metric, warning)] if warning else []

    return check


def _entropy(values: Series) -> str | None:
    if values.recent < 0.1 and values.recent < values.start / 3:
        return (
            f"entropy collapse: from {values.start:.3g} to {values.recent:.3g} nats; "
            "the policy barely explores"
        )


def _truncation(values: Series) -> str | None:
    if values.recent > 0.05 and values.recent > values.start + 0.05:
        return (
            f"rising truncation: {values.start:.1%} of completions were cut at "
            f"max_tokens at first, now {values.recent:.1%}; they count as incorrect"
        )


def _reward(values: Series) -> str | None:
    if values.recent < values.start - 0.1:
        return (
            f"falling reward: {values.start:.1%} correct at first, now "
            f"{values.recent:.1%}"
        )


def _uniform(values: Series) -> str | None:
    if values.recent > 0.8:
        return (
            f"little to learn from: {values.recent:.0%} of prompts have only correct "
            "or only incorrect completions; choose prompts by pass rate"
        )


def _chance(values: Series) -> str | None:
    if values.recent < 0.55:
        return (
            f"the token reward model is no better than chance: AUC {values.recent:.2f}"
        )


def _difference(values: Series) -> str | None:
    if values.recent > 0.02:
        return (
            "sampler and trainer disagree: probabilities differ by "
            f"{values.recent:.3f} on average"
        )


def _spikes(metric: str) -> Callable[[Rows], list[Finding]]:
    """Return a check for values far above those of the steps before."""

    def check(rows: Rows) -> list[Finding]:
        steps, values = series(rows, metric)
        steps, values = steps[values > 0], values[values > 0]  # 0 while frozen
        spikes = [
            int(steps[i])
            for i in range(SPIKE_HISTORY, len(values))
            if values[i] > SPIKE * np.median(values[:i])
        ]
        if not spikes:
            return []
        names = ", ".join(map(str, spikes[:5])) + (", ..." if len(spikes) > 5 else "")
        text = f"gradient norm spikes: more than {SPIKE:.0f} times the median so far"
        return [Finding(metric, f"{text}, step {names}")]

    return check


def _shares(
    metric: str,
    parts: Sequence[str],
    everything: Sequence[str],
    limit: float,
    text: str,
) -> Callable[[Rows], list[Finding]]:
    """Return a check of the sum of `parts` over that of `everything`, all steps."""
    total = lambda rows, names: sum(series(rows, n).values.sum() for n in names)

    def check(rows: Rows) -> list[Finding]:
        recent = rows[-max(3, len(rows) // 5) :]
        count = total(recent, everything)
        share = total(recent, parts) / count if count else 0.0
        return [Finding(metric, text.format(share))] if share > limit else []

    return check


def _not_finite(rows: Rows) -> list[Finding]:
    names = ("actor/loss", "actor/grad_norm", "token_reward/loss")
    return [
        Finding(name, f"not finite in step {row['step']}")
        for name in names
        for row in rows
        if name in row and row[name] is None
    ]


_ALL = ("verdict/correct", "verdict/incorrect", "verdict/undecided")
CHECKS: tuple[Callable[[Rows], list[Finding]], ...] = (
    _not_finite,
    _trend("critic/score/mean", _reward),
    _trend("frac_reward_zero_std", _uniform),
    _trend("response_length/clip_ratio", _truncation),
    _trend("actor/entropy", _entropy),
    _trend("training/rollout_probs_diff_mean", _difference),
    _trend("token_reward/auc", _chance),
    _spikes("actor/grad_norm"),
    _spikes("token_reward/grad_norm"),
    _shares(
        "judge/disagrees_with_rule",
        ("judge/disagrees_with_rule",),
        _ALL,
        0.05,
        "verifiers disagree: {:.1%} of completions are incorrect by rule and correct "
        "by the judge; read some of them",
    ),
    _shares(
        "verdict/undecided",
        ("verdict/undecided",),
        _ALL,
        0.05,
        "{:.1%} of completions are undecided; use a judge",
    ),
    _shares(
        "verdict/by_timeout",
        ("verdict/by_timeout", "verdict/by_crash"),
        _ALL,
        0.01,
        "verification failed for {:.1%} of completions (timeout or crash)",
    ),
)
