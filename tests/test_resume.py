"""What a resumed run does after changed settings and edited data."""

import contextlib
import shutil

import pytest
from scripted import read_lines, write_lines
from scripted_runs import COUNT, remove_progress, saved_steps, sft, train
from tiny_runs import ROOT

from oreal_jax.config import TrainConfig
from oreal_jax.config_loading import load
from oreal_jax.data import PromptOrder, load_prompts
from oreal_jax.errors import Diverged
from oreal_jax.train import metrics as step_metrics
from oreal_jax.train import sft as fine_tuning
from oreal_jax.train import trackers
from oreal_jax.train.history import read_history

pytestmark = pytest.mark.usefixtures("judges")


def test_a_changed_setting_is_one_line_and_is_kept(start, files, policy):
    run = files / "run"
    code, output, _ = train(start, files, "steps=2")
    assert code == 0 and "step 0 compiles its programs, or loads" in output
    first, last = [line for line in output.splitlines() if "correct" in line]
    assert "step 0 (1/2)" in first and first.endswith(" left")
    assert "step 1 (2/2)" in last and not last.endswith(" left")
    code, output, _ = train(start, files, "steps=2")  # nothing is left to do
    assert code == 0 and "changed setting" not in output
    message = "already finished at step 2; raise steps (2) or choose another --run"
    assert f"{run}: {message}" in output
    code, output, _ = train(start, files, "steps=3", "policy.learning_rate=5e-05")
    assert code == 0 and "already finished" not in output
    changes = {"steps": [2, 3], "policy.learning_rate": [0.001, 5e-05]}
    lines = [line for line in output.splitlines() if "changed setting" in line]
    assert lines == [
        f"changed setting: {k}: {a} -> {b}" for k, (a, b) in changes.items()
    ]
    starts, ends = [
        [row for row in read_history(run) if row["event"] == event]
        for event in ("start", "end")
    ]
    assert [row["changes"] for row in starts] == [{}, {}, changes]
    assert [row["step"] for row in starts] == [0, 2, 2]
    assert [(row["step"], row["outcome"]) for row in ends] == [
        (2, "finished"),
        (2, "finished"),
        (3, "finished"),
    ]


def test_the_fields_of_prompts_can_be_named(start, files, policy):
    path, run = files / "prompts.jsonl", files / "run"
    names = {"question": "problem", "gold_answer": "final"}
    rows = [{names[k]: v for k, v in row.items()} for row in read_lines(path)]
    write_lines(path, rows)
    code, _, errors = train(start, files, "steps=1")
    assert code == 2 and not run.exists()
    message = f"{path}:1: no field 'question'; its fields are final, problem\n"
    assert errors.endswith(message)
    options = ["--question", "problem", "--answer", "final"]
    assert train(start, files, "steps=1", options=options).code == 0
    code, output, _ = train(start, files, "steps=2", options=options)
    assert code == 0 and "has changed" not in output
    assert len(set(policy.take_prompts())) == 8


def test_the_end_of_a_failed_run_is_recorded_with_its_reason(start, files, policy):
    policy.fails_at = 1
    with pytest.raises(RuntimeError):
        train(start, files, "steps=3")
    policy.error = KeyboardInterrupt()
    assert train(start, files, "steps=3").code == 130
    ends = [row for row in read_history(files / "run") if row["event"] == "end"]
    assert [(row["outcome"], row["reason"], row["step"]) for row in ends] == [
        ("failed", "RuntimeError: a bug", 1),
        ("stopped", "", 1),
    ]


def test_a_start_that_fails_is_recorded_as_failed(start, files, monkeypatch):
    def fail(*_):
        raise ConnectionError("the server is down")

    monkeypatch.setattr(trackers, "TensorBoard", fail)
    with pytest.raises(ConnectionError):
        train(start, files, "steps=1", "trackers=tensorboard")
    last = read_history(files / "run")[-1]
    assert (last["outcome"], last["step"]) == ("failed", 0)


@pytest.mark.parametrize(
    ("name", "error", "step"),
    [("check_finite", Diverged("NaN"), 0), ("with_scores", RuntimeError("a bug"), 1)],
)
def test_a_recorded_end_counts_the_steps_that_are_kept(
    start, files, policy, monkeypatch, name, error, step
):
    """A diverged state is not saved; one that a bug follows is."""
    policy.learns = True

    def fail(*_):
        raise error

    monkeypatch.setattr(step_metrics, name, fail)
    with contextlib.suppress(RuntimeError):
        train(start, files, "steps=1")
    assert read_history(files / "run")[-1]["step"] == step
    assert saved_steps(files / "run") == [step] * step


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "older"])
def test_a_changed_number_of_prompts_per_step_repeats_and_skips_none(
    start, files, policy, recorded
):
    assert train(start, files, "steps=3").code == 0
    if not recorded:  # as checkpoints were before they recorded it
        remove_progress(files / "run" / "checkpoints" / "3")
    assert train(start, files, "steps=5", "prompts_per_step=6").code == 0
    prompts = policy.take_prompts()
    assert sorted(prompts) == list(range(10, 10 + COUNT))
    whole = PromptOrder(list(range(10, 10 + COUNT)), batch=COUNT, seed=0)
    assert prompts == [a for a, _ in whole.batch(0)]


def test_a_kill_before_the_first_save_does_not_change_the_prompts_used(
    start, files, policy
):
    """Steps 1 to 3 took 4 prompts each, whatever the config says afterwards."""
    assert train(start, files, "steps=3", "saving.every=1").code == 0
    checkpoint = files / "run" / "checkpoints"
    for step in (2, 3):
        remove_progress(checkpoint / str(step))
    policy.fails_at = 3
    with pytest.raises(RuntimeError, match="a bug"):
        train(start, files, "steps=5", "prompts_per_step=6")
    assert saved_steps(files / "run") == [1, 2, 3]
    policy.fails_at = -1
    policy.take_prompts()
    shutil.rmtree(checkpoint / "3")
    assert train(start, files, "steps=3", "prompts_per_step=16").code == 0
    whole = PromptOrder(list(range(10, 10 + COUNT)), batch=COUNT, seed=0)
    assert policy.take_prompts() == [a for a, _ in whole.batch(0)][8:]


def test_a_learning_rate_that_jumps_is_logged_with_both_values(start, files, policy):
    policy.fails_at, policy.error = 2, KeyboardInterrupt()
    for steps, jumps in [(4, False), (4, False), (9, True)]:
        code, output, _ = train(start, files, f"steps={steps}")
        assert code == 130 and ("jumps" in output) == jumps
        if jumps:
            own = load(ROOT / "configs/tiny.py", TrainConfig)
            for name, optimizer in [
                ("actor/lr", own.policy),
                ("token_reward/lr", own.token_reward),
            ]:
                rates = [float(optimizer.rate(steps)(2)) for steps in (4, 9)]
                values = f"from {rates[0]:.4g} to {rates[1]:.4g}"
                assert f"step 2: {name} jumps {values}" in output


def test_sft_counts_examples_and_rejects_an_edited_file(start, files, monkeypatch):
    pack, batches = fine_tuning.pack, []

    def record(examples, **options):
        if len(batches) == 3:
            batches.append([])
            raise KeyboardInterrupt
        batches.append([str(example.prompt) for example in examples])
        return pack(examples, **options)

    monkeypatch.setattr(fine_tuning, "pack", record)
    assert sft(start, files).code == 130
    path = files / "solutions.jsonl"
    text = path.read_text()
    path.write_text(text.replace("boxed{20}", "boxed{21}"))
    code, _, errors = sft(start, files)
    assert code == 2 and errors.count("\n") == 1
    assert f"{path}: has changed since {files / 'run'} began; restore it" in errors
    path.write_text(text.replace("}\n", " }\n"))  # the same rows
    code, output, _ = sft(start, files, "examples_per_step=6")
    assert code == 0 and "step 4 (5/5)" in output
    assert [len(batch) for batch in batches] == [4, 4, 4, 0, 6, 6]
    assert len({prompt for batch in batches for prompt in batch}) == COUNT


def test_an_edited_file_of_prompts_is_logged_and_the_copy_used(start, files, policy):
    path, run = files / "prompts.jsonl", files / "run"
    assert train(start, files, "steps=2").code == 0
    copy = load_prompts(str(run / "data"))
    assert copy == load_prompts(str(path))
    write_lines(path, read_lines(path)[:12])
    code, output, _ = train(start, files, "steps=4")
    assert code == 0
    assert (
        f"{path}: has changed since {run} began, which continues with its copy"
        in output
    )
    assert load_prompts(str(run / "data")) == copy
    path.unlink()  # a run does not depend on it
    code, output, _ = train(start, files, "steps=6")
    assert code == 0 and "has changed" not in output
    assert sorted(policy.take_prompts()) == list(range(10, 10 + COUNT))


def test_a_changed_copy_of_the_prompts_is_rejected(start, files, policy):
    path, run = files / "prompts.jsonl", files / "run"
    assert train(start, files, "steps=2").code == 0
    shutil.rmtree(run / "data")
    write_lines(path, read_lines(path)[:12])
    code, _, errors = train(start, files, "steps=4")
    assert code == 2 and f"{path}: has changed since {run} began" in errors


def test_a_setting_that_changes_the_usable_prompts_is_logged(start, files, policy):
    rows = read_lines(files / "prompts.jsonl")
    rates = [row | {"pass_rate": 0.1 if n % 2 else 0.9} for n, row in enumerate(rows)]
    write_lines(files / "prompts.jsonl", rates)
    bands = "difficulty=((0.0,0.5,1),(0.5,1.0,{}))"
    assert train(start, files, "steps=2", bands.format(1)).code == 0
    code, output, _ = train(start, files, "steps=3", bands.format(1))
    assert code == 0 and "usable prompts" not in output
    code, output, _ = train(start, files, "steps=4", bands.format(2))
    assert code == 0 and "step 3: the usable prompts" in output
