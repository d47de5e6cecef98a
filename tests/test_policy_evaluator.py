"""Evaluation inside training. The model is scripted and correct: nothing is learned."""

import json
import shutil
from pathlib import Path

import jax
import make_tiny
import numpy as np
import pytest
from judge_stub import replies, serving
from scripted import Script
from tiny_runs import ONE_STEP

from oreal_jax import metrics
from oreal_jax.checkpoints.source import open_model
from oreal_jax.cli import main
from oreal_jax.evaluation import compare
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.sampling import Engine
from oreal_jax.train import rollouts
from oreal_jax.train.evaluator import PolicyEvaluator

pytestmark = pytest.mark.usefixtures("judges")

ROOT = Path(__file__).parents[1]
TRAINED_ON = range(10, 18)


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("start")
    make_tiny.write(home)
    write_problems(home / "train.jsonl", TRAINED_ON)
    write_problems(home / "exam.jsonl", range(4))
    write_problems(home / "other.jsonl", range(4, 6))
    return home


def write_problems(path: Path, numbers) -> None:
    row = lambda a: {"question": f"max {a} 99?", "gold_answer": "99"}
    path.write_text("".join(json.dumps(row(a)) + "\n" for a in numbers))


class Skill:
    """What the scripted policy solves of an exam: `solved[i]` at evaluation i."""

    def __init__(self, monkeypatch, start: Path, *solved: int):
        self.solved, self.evaluations = list(solved), 0
        self.script = Script(start / "hf", self.answer)
        evaluate = PolicyEvaluator.__call__
        sample = self.script.sample

        def counted(evaluator, state, pool, judge):
            before = len(self.script.requests)
            seconds = evaluate(evaluator, state, pool, judge)
            self.evaluations += len(self.script.requests) > before
            return seconds

        monkeypatch.setattr(PolicyEvaluator, "__call__", counted)
        monkeypatch.setattr(Engine, "sample", lambda *a, **named: sample(*a, **named))

    def answer(self, a: int, sample: int) -> str:
        """Correct about all that is trained on."""
        return "99" if a in TRAINED_ON or a < self.solved[self.evaluations] else "0"

    def examined(self) -> list:
        """(problem, sample, sampling) of every attempt at an exam."""
        return [asked for asked in self.script.requests if asked[0] not in TRAINED_ON]


def train(start: Path, run: Path, *settings: str) -> int:
    given = [
        f"model={start / 'hf'}",
        f"prompts={start / 'train.jsonl'}",
        f"evaluation.data=({str(start / 'exam.jsonl')!r},)",
        "saving.every=1",
        "steps=5",
        "evaluation.every=2",
        *settings,
    ]
    flags = [word for setting in given for word in ("--set", setting)]
    return main(["train", str(ROOT / "configs/tiny.py"), *flags, "--run", str(run)])


def rows(run: Path) -> list[dict]:
    return metrics.read(run / "evaluations.jsonl")


def test_the_policy_is_measured_before_every_n_steps_and_at_the_end(
    start, tmp_path, monkeypatch, capsys
):
    skill = Skill(monkeypatch, start, 1, 3, 3, 2)
    assert train(start, tmp_path / "run", "system_prompt=Be brief.") == 0
    evaluations = rows(tmp_path / "run")
    assert [row["step"] for row in evaluations] == [0, 2, 4, 5]
    assert [row["score"] for row in evaluations] == [0.25, 0.75, 0.75, 0.5]
    assert [row["best"] for row in evaluations] == [True, True, False, False]
    assert evaluations[0]["val-core/exam/pass@1"] == 0.25
    assert {sampling.temperature for *_, sampling in skill.examined()} == {0.0}
    files = sorted((tmp_path / "run" / "evaluations").iterdir())
    assert [file.name for file in files] == [
        f"step_{n:06d}.jsonl" for n in (0, 2, 4, 5)
    ]
    verdicts = [[row["verdict"] for row in metrics.read(file)] for file in files]
    assert [each.count("correct") for each in verdicts] == [1, 3, 3, 2]
    assert compare(*files[:2])[0].paired.better == 2
    assert "after 2 step(s): exam pass@1 75.0%" in capsys.readouterr().out
    # The best is a model directory with all that the run's own has.
    best = open_model(tmp_path / "run" / "best")
    assert best.settings["system_prompt"] == "Be brief."
    assert [p.name for p in (best.path / "checkpoints").iterdir()] == ["2"]
    mesh = make_mesh(MeshShape(), best.config)
    own = jax.tree.leaves(open_model(tmp_path / "run").load(mesh))
    for ours, kept in zip(own, jax.tree.leaves(best.load(mesh)), strict=True):
        assert np.array_equal(ours, kept)  # nothing was learned
    assert {p.name for p in best.path.iterdir()} == {
        "model",
        "checkpoints",
        "config.json",
    }
    assert not list((tmp_path / "run").glob(".best*"))


def test_without_data_nothing_is_evaluated(start, tmp_path, monkeypatch):
    skill = Skill(monkeypatch, start, 0)
    assert train(start, tmp_path / "run", "evaluation.data=()", *ONE_STEP) == 0
    assert not skill.examined() and not (tmp_path / "run" / "best").exists()


def test_several_samples_are_sampled_as_in_training(start, tmp_path, monkeypatch):
    skill = Skill(monkeypatch, start, 1, 1)
    settings = ["evaluation.samples=3", *ONE_STEP, "sampling.temperature=0.7"]
    assert train(start, tmp_path / "run", *settings) == 0
    assert rows(tmp_path / "run")[0]["val-core/exam/avg@3"] == 0.25
    assert {sampling.temperature for *_, sampling in skill.examined()} == {0.7}
    assert {sample for _, sample, _ in skill.examined()} == {0, 1, 2}


def test_completions_are_verified_as_in_training(start, tmp_path, monkeypatch):
    skill = Skill(monkeypatch, start, 1, 1)
    with serving(replies("VERDICT: RIGHT")) as stub:
        judge = [
            f"verification.judge_hosts=('{stub.url}',)",
            "verification.judge_model=m",
        ]
        assert train(start, tmp_path / "run", *ONE_STEP, *judge) == 0
    assert [row["score"] for row in rows(tmp_path / "run")] == [1.0, 1.0]
    assert skill.examined()
    # What was asked in an evaluation is not counted for a step.
    (step,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert step["judge/asked"] == 0 < stub.requests


def test_completions_are_saved_when_verification_is_interrupted(
    start, tmp_path, monkeypatch
):
    Skill(monkeypatch, start, 1, 1)
    verify_completions = rollouts.verify_completions

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rollouts, "verify_completions", interrupted)
    settings = ["evaluation.data=()", *ONE_STEP]
    assert train(start, tmp_path / "run", *settings) == 130
    left = tmp_path / "run" / "interrupted" / "step_000000.jsonl"
    assert len(left.read_text().splitlines()) == 64
    monkeypatch.setattr(rollouts, "verify_completions", verify_completions)
    assert train(start, tmp_path / "run", *settings) == 0
    assert not left.exists()


def test_presets_are_found_in_the_folder_and_scores_averaged_over_sets(
    start, tmp_path, monkeypatch
):
    Skill(monkeypatch, start, 3, 6)
    shutil.copy(start / "other.jsonl", tmp_path / "amc23.jsonl")
    data = f"evaluation.data=({str(start / 'exam.jsonl')!r}, 'amc23')"
    settings = [data, f"evaluation.folder={tmp_path}", *ONE_STEP]
    assert train(start, tmp_path / "run", *settings) == 0
    evaluations = rows(tmp_path / "run")
    assert evaluations[0]["val-core/exam/pass@1"] == 0.75
    assert evaluations[0]["val-core/amc23/pass@1"] == 0.0
    assert [row["score"] for row in evaluations] == [0.375, 1.0]


def test_a_resumed_run_does_not_repeat_evaluations(start, tmp_path, monkeypatch):
    skill = Skill(monkeypatch, start, 2, 1, 3)
    run = tmp_path / "run"
    assert train(start, run, "steps=2") == 0
    before = rows(run)
    assert [row["step"] for row in before] == [0, 2] and len(skill.examined()) == 8
    assert train(start, run, "steps=3") == 0
    assert rows(run)[:2] == before and [r["step"] for r in rows(run)] == [0, 2, 3]
    assert rows(run)[2]["best"] and len(skill.examined()) == 12


def test_an_interrupted_evaluation_does_not_damage_the_run(
    start, tmp_path, monkeypatch
):
    skill = Skill(monkeypatch, start, 2, 1)
    run = tmp_path / "run"
    skill.script.patience = 4 + 2 * 64 + 2  # within the evaluation after step 2
    assert train(start, run, "steps=2") == 130
    assert [row["step"] for row in rows(run)] == [0]
    assert len(metrics.read(run / "metrics.jsonl")) == 2
    skill.script.patience = 10**9
    assert train(start, run, "steps=2") == 0
    assert [row["step"] for row in rows(run)] == [0, 2]


def test_evaluation_time_is_not_counted_in_the_step_time(start, tmp_path, monkeypatch):
    Skill(monkeypatch, start, 2, 1)
    assert train(start, tmp_path / "run", *ONE_STEP) == 0
    (row,) = metrics.read(tmp_path / "run" / "metrics.jsonl")
    phases = sum(row[f"timing_s/{name}"] for name in ("gen", "verify"))
    assert row["timing_s/testing"] > 0
    assert phases < row["perf/time_per_step"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.every=0", "config: evaluation.every=0 must be at least 1"),
        ("evaluation.samples=0", "config: evaluation.samples=0 must be at least 1"),
        ("evaluation.data=('gone.jsonl',)", "gone.jsonl: no such file"),
        ("evaluation.data=('exams',)", "evaluation.data exams: no such file, and no"),
        ("evaluation.data=('TRAIN',)", "problem '0' of train is trained on"),
        (
            "evaluation.data=('LONG',)",
            "problem '0' of long: prompt of 308 tokens + max_tokens=8 must lie within",
        ),
        (
            "evaluation.data=('MEDIUM',) cache_tokens=192",
            "problem '0' of medium: prompt of 88 tokens + max_tokens=8 does not fit",
        ),
    ],
)
def test_invalid_evaluation_settings_are_one_line_and_leave_nothing(
    start, tmp_path, capsys, setting, message
):
    for name, length in [("long", 300), ("medium", 80)]:
        row = {"question": "7" * length, "gold_answer": "7"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        setting = setting.replace(name.upper(), str(tmp_path / f"{name}.jsonl"))
    setting = setting.replace("TRAIN", str(start / "train.jsonl"))
    assert train(start, tmp_path / "run", *setting.split()) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()
