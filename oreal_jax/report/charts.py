"""Metrics that a report shows, described as in the table of metrics."""

from collections.abc import Sequence
from typing import Any

from oreal_jax.metrics import METRICS, Metric

# The most important ones first; a report shows those that a run has.
CHARTS = (
    "critic/score/mean",
    "frac_reward_zero_std",
    "response_length/mean",
    "response_length/clip_ratio",
    "actor/loss",
    "actor/grad_norm",
    "actor/entropy",
    "actor/kl_loss",
    "token_reward/auc",
    "token_reward/loss",
    "token_reward/grad_norm",
    "oreal/omega_correct/mean",
    "oreal/omega_incorrect/mean",
    "training/rollout_probs_diff_mean",
    "verdict/undecided",
    "judge/disagrees_with_rule",
    "perf/time_per_step",
    "perf/throughput",
)
TEXTS: dict[str, Metric] = {name: metric for metric in METRICS for name in metric.names}


def present(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return those of `names` that have a number in at least one row."""
    return [
        n for n in names if any(isinstance(row.get(n), int | float) for row in rows)
    ]


def describe(name: str) -> dict[str, str]:
    """Return unit, meaning and healthy values of a metric; empty if it is unknown."""
    metric = TEXTS.get(name, Metric(name, "", "", ""))
    return {
        "name": name,
        "unit": metric.unit,
        "meaning": metric.meaning,
        "healthy": metric.healthy,
    }
