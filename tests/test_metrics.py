"""The table of metrics lists exactly what runs write, each with its meaning."""

import shutil

import pytest
from judge_stub import replies, serving
from scripted import write_lines
from tiny_runs import train_ok

from oreal_jax import efficiency, metrics

pytestmark = pytest.mark.usefixtures("judges")


def written(run) -> set[str]:
    """Return the names of all metrics of a run."""
    return {name for row in metrics.read(run / "metrics.jsonl") for name in row}


def test_the_table_lists_exactly_the_metrics_that_runs_write(tiny, whole, monkeypatch):
    peak = efficiency.Peak(1e12, 1e11, 1e11)
    monkeypatch.setitem(efficiency.PEAKS, "cpu", peak)  # MFU is relative to a peak
    exam, run = tiny / "exam.jsonl", shutil.copytree(whole, tiny / "metrics")
    write_lines(exam, [{"question": "max 91 92?", "gold_answer": 92}])
    with serving(replies("VERDICT: WRONG")) as stub:
        settings = [
            f"verification.judge_hosts=('{stub.url}',)",
            "verification.judge_model=m",
            f"evaluation.data=('{exam}',)",
            "evaluation.every=5",
        ]
        train_ok(tiny, run, *settings, "steps=6")  # resumes after the fifth
    table = [name for metric in metrics.METRICS for name in metric.names]
    assert len(set(table)) == len(table)
    # Runs with verifiers of their own: tests/test_own_verifiers.py.
    assert written(run) == set(table) - {"verdict/by_VERIFIER"}


def test_every_metric_has_a_meaning_and_every_number_a_unit():
    assert all(metric.meaning for metric in metrics.METRICS)
    without = {
        metric.name.split("/")[0] for metric in metrics.METRICS if not metric.unit
    }
    assert without <= {"step", "actor", "token_reward"}  # losses, norms, rates
