"""Reports: warnings, and diagnostics of the token reward model."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import (
    changed,
    completion,
    healthy,
    make_run,
)
from scripted import write_lines

from oreal_jax.report import findings
from oreal_jax.report.diagnostics import diagnose, summarise
from oreal_jax.report.runs import open_run, read_completions

# -- warnings


UNHEALTHY = {
    "actor/entropy": (lambda step: 1.0 if step < 9 else 0.02, "entropy collapse"),
    "response_length/clip_ratio": (lambda step: 0.02 * step, "rising truncation"),
    "critic/score/mean": (lambda step: 0.6 - 0.02 * step, "falling reward"),
    "frac_reward_zero_std": (lambda step: 0.95, "little to learn"),
    "token_reward/auc": (lambda step: 0.5, "no better than chance"),
    "token_reward/grad_norm": (lambda step: 90.0 if step == 9 else 2.0, "step 9"),
    "actor/grad_norm": (
        lambda step: 0.0 if step < 2 else 50.0 ** (step == 15),
        "step 15",
    ),
    "training/rollout_probs_diff_mean": (lambda step: 0.05, "disagree"),
    "judge/disagrees_with_rule": (lambda step: 20.0, "verifiers disagree"),
    "verdict/undecided": (lambda step: 30.0, "undecided"),
    "verdict/by_timeout": (lambda step: 9.0, "verification failed"),
    "actor/loss": (lambda step: None if step == 7 else 0.1, "step 7"),
}


def test_a_healthy_run_has_no_warning():
    assert findings.find(healthy()) == []
    assert findings.find([]) == []
    assert findings.find(healthy(1)) == []


@pytest.mark.parametrize("metric", UNHEALTHY)
def test_each_warning_appears_on_an_unhealthy_run_and_only_there(metric):
    function, text = UNHEALTHY[metric]
    (finding,) = findings.find(changed(**{metric: function}))
    assert finding.metric == metric and text in finding.text


# -- diagnostics


def scored(run: Path) -> list:
    opened = open_run(str(run))
    completions = [c for step in opened.files for c in read_completions(opened, step)]
    half = lambda c: np.linspace(0, 1, len(c.per_token["token_scores"]))
    return [
        (c, summarise(c, half(c))) for c in completions if "token_scores" in c.per_token
    ]


def area(high, low) -> float:
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    return sum(wins) / len(wins)


def test_diagnostics_are_those_of_an_independent_computation(tmp_path):
    pairs = scored(make_run(tmp_path / "run", steps=4, groups=8, tokens=23))
    result = diagnose([summary for _, summary in pairs])
    assert result and result["completions"] == len(pairs) == 64
    mean = {True: [], False: []}
    tenths = {True: [[] for _ in range(10)], False: [[] for _ in range(10)]}
    prefixes = {True: [[] for _ in range(10)], False: [[] for _ in range(10)]}
    early = {True: [0.0, 0.0], False: [0.0, 0.0]}
    for c, _ in pairs:
        scores = c.per_token["token_scores"].tolist()
        mean[c.correct].append(sum(scores) / len(scores))
        for part in range(10):
            a, b = len(scores) * part // 10, len(scores) * (part + 1) // 10
            tenths[c.correct][part].append(sum(scores[a:b]) / (b - a))
            prefix = sum(scores[:b]) / b
            prefixes[c.correct][part].append(1 / (1 + math.exp(-prefix)))
        for i in range(len(scores)):
            weight, position = i / (len(scores) - 1), (i + 0.5) / len(scores)
            share = 1.0 if position < 0.5 else 0.5 if position == 0.5 else 0.0
            early[c.correct][0] += share * weight
            early[c.correct][1] += weight
    assert result["auc"] == pytest.approx(area(mean[True], mean[False]))
    for part in range(10):
        expected = area(tenths[True][part], tenths[False][part])
        assert result["auc_parts"][part] == pytest.approx(expected, abs=1e-3)
    for outcome, name in [(True, "correct"), (False, "incorrect")]:
        expected = [np.mean(values) for values in prefixes[outcome]]
        assert result["credit"][name] == pytest.approx(expected, rel=1e-5)
        first, total = early[outcome]
        assert result["early"][name] == pytest.approx(first / total)
    wins = [
        a.credit[-1] > b.credit[-1]
        for (x, a), (y, b) in itertools.product(pairs, pairs)
        if (x.step, x.group) == (y.step, y.group) and x.correct and not y.correct
    ]
    assert result["pairs"]["prompts"] == len(wins) == 32
    assert result["pairs"]["value"] == pytest.approx(np.mean(wins))
    bins = result["calibration"]
    assert sum(b["completions"] for b in bins) == 64
    total = sum(b["value"] * b["completions"] for b in bins)
    assert total == pytest.approx(32)
    assert [b["predicted"] for b in bins] == sorted(b["predicted"] for b in bins)


def test_completions_part_where_their_scores_begin_to_differ(tmp_path):
    """Scores are alike in the first half, apart in the second."""
    rows = []
    for group in range(40):
        for k, outcome in enumerate(["incorrect", "correct"]):
            line = completion(0, group, k, outcome, 39)
            noise = np.random.default_rng(group).normal(0, 0.1, 40)
            apart = np.where(np.arange(40) < 20, 0, 1) * (1 if k else -1)
            rows.append(line | {"token_scores": (noise + apart).tolist()})
    run = make_run(tmp_path / "run", steps=1)
    write_lines(run / "trajectories/step_000000.jsonl", rows)
    result = diagnose([summary for _, summary in scored(run)])
    assert result and result["diverges_at"] == 5
    assert result["auc_parts"][:5] == [0.5] * 5  # the same noise: ties
    assert result["auc_parts"][5:] == [1.0] * 5


def test_one_outcome_alone_cannot_be_diagnosed(tmp_path):
    pairs = scored(make_run(tmp_path / "run"))
    assert diagnose([s for _, s in pairs if s.correct]) is None
    assert diagnose([]) is None
