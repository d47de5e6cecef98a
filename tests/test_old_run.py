"""A run of a version before November 2026 (commit 42772ba) resumes with equal results.

tests/old_run.tar.gz: `oreal train configs/tiny.py` on a model of 6,608 parameters, two
of four steps, and `expected.json`, the metrics of the others.
"""

import json
import tarfile
from pathlib import Path

import pytest
from tiny_runs import ROOT, oreal_in_process

from oreal_jax import metrics
from oreal_jax.data import Chat

SETTINGS = ["model=sft", "prompts=start/prompts.jsonl", "steps=4", "saving.every=2"]
SETTINGS += ["saving.keep=9", "policy.learning_rate=0.001"]
NEW_NAMES = {
    "verdict/right": "verdict/correct",
    "verdict/wrong": "verdict/incorrect",
    "oreal/kept_right": "oreal/kept_correct",
    "oreal/omega_right/mean": "oreal/omega_correct/mean",
    "oreal/omega_wrong/mean": "oreal/omega_incorrect/mean",
}


@pytest.mark.usefixtures("judges")
def test_a_run_of_an_older_version_resumes_with_equal_results(tmp_path, monkeypatch):
    with tarfile.open(Path(__file__).parent / "old_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chat, "size", 264)  # padded rows were sampled then
    flags = [word for setting in SETTINGS for word in ("--set", setting)]
    config = ROOT / "configs" / "tiny.py"
    code, output, errors = oreal_in_process("train", config, *flags, "--run", "run")
    assert code == 0, errors
    assert "resuming run after 2 step(s) (6,608 parameters)" in output
    # Fields and functions have other names now, and the same meaning.
    assert "changed setting" not in output
    rows = metrics.read(Path("run/metrics.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    expected = json.loads(Path("expected.json").read_text())
    for row, then in zip(rows[2:], expected, strict=True):
        del then["rollout/occupancy"]  # slots are filled better now
        # Texts without a clear answer were incorrect then; they are trained on alike.
        for outcomes, incorrect in (
            (then, "verdict/wrong"),
            (row, "verdict/incorrect"),
        ):
            outcomes[incorrect] += outcomes.pop("verdict/undecided")
        for name, value in then.items():
            resumed = row[NEW_NAMES.get(name, name)]
            assert resumed == pytest.approx(value, rel=1e-3, abs=1e-5), name
