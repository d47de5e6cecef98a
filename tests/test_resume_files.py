"""What a resumed run does with damaged checkpoints and files of abandoned steps."""

import shutil
from pathlib import Path

import pytest
from scripted import read_lines, write_lines
from scripted_runs import saved_steps, train
from tiny_runs import arrays

from oreal_jax.checkpoints import run as checkpoints

pytestmark = pytest.mark.usefixtures("judges")


# Damaged checkpoints.


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param("policy", marks=pytest.mark.slow),
        pytest.param("trainer", marks=pytest.mark.slow),
        "progress",
        "policy/manifest.ocdbt",
        "trainer/manifest.ocdbt",
        "progress/metadata",
    ],
)
def test_a_run_with_an_incomplete_checkpoint_resumes_from_the_previous_one(
    start, files, policy, lost
):
    run = files / "run"
    assert train(start, files, "steps=4", "saving.every=2").code == 0
    expected, last = arrays(run, 4), policy.take_prompts()[8:]
    path = run / "checkpoints" / "4" / lost
    (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    item = lost.split("/")[0]
    code, output, errors = train(start, files, "steps=4", "saving.every=2")
    assert code == 0, errors
    assert f"{run / 'checkpoints' / '4'}: incomplete, without {item}; removed" in output
    assert f"resuming {run} after 2 step(s)" in output
    assert saved_steps(run) == [2, 4] and policy.take_prompts() == last
    for ours, theirs in zip(arrays(run, 4), expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_a_checkpoint_without_its_data_is_reported_with_advice(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=2", "saving.every=1").code == 0
    for data in (run / "checkpoints" / "2" / "trainer").glob("**/d"):
        shutil.rmtree(data)
    code, _, errors = train(start, files, "steps=2")
    assert code == 2 and f"{run / 'checkpoints' / '2'}: cannot be read" in errors
    assert "; if a part of it is missing, remove it\n" in errors
    shutil.rmtree(run / "checkpoints" / "2")
    code, output, _ = train(start, files, "steps=2")
    assert code == 0 and f"resuming {files / 'run'} after 1 step(s)" in output


def test_policies_of_pruned_checkpoints_are_kept(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=4", "saving.every=1").code == 0
    kept = [p for p in (run / "checkpoints/2/policy").rglob("*") if p.is_file()]
    expected = [path.read_bytes() for path in kept]
    for step in (1, 2, 4):  # steps after 3, where it resumes, are run again
        shutil.rmtree(run / "checkpoints" / str(step) / "trainer")
    shutil.rmtree(run / "checkpoints" / "1" / "policy")  # nothing of use is left
    code, output, _ = train(start, files, "steps=5", "saving.every=1")
    assert code == 0 and f"resuming {files / 'run'} after 3 step(s)" in output
    for step, items in ((1, "policy and trainer"), (4, "trainer")):
        directory = run / "checkpoints" / str(step)
        assert f"{directory}: incomplete, without {items}; removed" in output
    assert checkpoints.steps(run) == [2, 3, 4, 5] and saved_steps(run) == [3, 4, 5]
    assert [path.read_bytes() for path in kept] == expected


def test_a_directory_of_weights_is_not_a_run_and_is_kept(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=2").code == 0
    shutil.rmtree(run / "checkpoints" / "2" / "trainer")
    code, _, errors = train(start, files, "steps=3")
    assert code == 2 and errors.count("\n") == 1
    assert f"{run}: its checkpoints hold a policy but no state to resume" in errors
    assert checkpoints.steps(run) == [2]


def test_remains_of_killed_saves_are_removed(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=2").code == 0
    left = [run / "checkpoints" / "17.orbax-checkpoint-tmp" / "policy"]
    left += [run / "reference.orbax-checkpoint-tmp", run / ".best.incomplete"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x")
    assert train(start, files, "steps=3").code == 0
    assert not any(folder.exists() for folder in left)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"2", "3"}


# Steps that are run again.


def examined(files: Path) -> list[str]:
    data = f"evaluation.data=({str(files / 'exam.jsonl')!r},)"
    return [data, "evaluation.every=1", "saving.every=2"]


def test_files_of_abandoned_steps_are_removed(start, files, policy):
    run = files / "run"
    policy.score = 3
    policy.fails_at, policy.error = 4, KeyboardInterrupt()
    assert train(start, files, "steps=6", *examined(files)).code == 130
    rows = read_lines(run / "evaluations.jsonl")
    assert [(row["step"], row["best"]) for row in rows] == [
        (0, True),
        *((step, False) for step in range(1, 5)),
    ]
    # As if step 3 had been the best, and the process killed before its checkpoint.
    shutil.rmtree(run / "checkpoints" / "4")
    (run / "best" / "checkpoints" / "0").rename(run / "best" / "checkpoints" / "3")
    (run / "interrupted").mkdir()
    (run / "interrupted" / "step_000004.jsonl").write_text("")
    policy.fails_at = 2
    code, output, _ = train(start, files, "steps=6", *examined(files))
    assert code == 130
    assert (
        f"{run}: removed 2 step(s) of trajectories, 1 interrupted step(s), "
        "2 file(s) of evaluations, 2 evaluation(s) after 2 step(s)" in output
    )
    assert sorted(path.name for path in (run / "trajectories").iterdir()) == [
        "step_000000.jsonl",
        "step_000001.jsonl",
    ]
    assert [row["step"] for row in read_lines(run / "evaluations.jsonl")] == [0, 1, 2]
    assert not (run / "best").exists() and not list((run / "interrupted").iterdir())
    assert checkpoints.steps(run / "best.abandoned") == [3]
    # The next evaluation is the best of those whose policy there still is.
    policy.fails_at, policy.score = -1, 2
    assert train(start, files, "steps=6", *examined(files)).code == 0
    rows = read_lines(run / "evaluations.jsonl")
    assert [row["step"] for row in rows if row["best"]] == [0, 3]
    assert checkpoints.steps(run / "best") == [3]


def test_every_abandoned_best_policy_is_kept(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=2", *examined(files)).code == 0
    shutil.copytree(run / "best", run / "best.abandoned")
    (run / "best.abandoned.2").mkdir()
    (run / "best" / "checkpoints" / "0").rename(run / "best" / "checkpoints" / "3")
    code, output, _ = train(start, files, "steps=2", *examined(files))
    assert code == 0 and f"renamed to {run / 'best.abandoned.3'}" in output
    assert checkpoints.steps(run / "best.abandoned") == [0]
    assert checkpoints.steps(run / "best.abandoned.3") == [3]


def test_only_files_of_steps_are_removed(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=2").code == 0
    notes = run / "trajectories" / "step_000007"
    notes.mkdir()
    (run / "trajectories" / "step_000008.jsonl").write_text("")
    code, output, _ = train(start, files, "steps=2")
    assert code == 0 and "removed 1 step(s) of trajectories" in output
    assert notes.is_dir() and len(list((run / "trajectories").iterdir())) == 3


def test_a_best_policy_below_a_recorded_score_is_logged(start, files, policy):
    """Step 0 solves 3 of 4 problems; its policy was replaced by a dead step's."""
    run = files / "run"
    policy.score = 3
    assert train(start, files, "steps=2", *examined(files)).code == 0
    (run / "best" / "checkpoints" / "0").rename(run / "best" / "checkpoints" / "3")
    rows = read_lines(run / "evaluations.jsonl")
    write_lines(run / "evaluations.jsonl", rows[:2])
    policy.score = 2
    code, output, _ = train(start, files, "steps=3", *examined(files))
    assert code == 0
    assert "its score 0.5 is below 0.75 after 0 step(s), whose policy" in output
    assert checkpoints.steps(run / "best") == [2]
    policy.score = 4
    code, output, _ = train(start, files, "steps=4", *examined(files))
    assert code == 0 and "the best so far" in output and "is below" not in output


def test_a_best_policy_replaced_by_an_abandoned_step_is_saved_again(
    start, files, policy
):
    run = files / "run"
    policy.score = 3
    assert train(start, files, "steps=2", *examined(files)).code == 0
    rows = read_lines(run / "evaluations.jsonl")
    for row in rows:
        row["best"] = row["step"] == 2
    write_lines(run / "evaluations.jsonl", rows)
    (run / "best" / "checkpoints" / "0").rename(run / "best" / "checkpoints" / "3")
    assert train(start, files, "steps=3", *examined(files)).code == 0
    assert checkpoints.steps(run / "best") == [2]


def test_an_ordinary_resume_removes_nothing(start, files, policy):
    run = files / "run"
    assert train(start, files, "steps=2", *examined(files)).code == 0
    paths = [path for path in run.rglob("*") if path.is_file()]
    kept = [path for path in paths if path.name.startswith("step_")]
    texts = [path.read_text() for path in kept]
    code, output, _ = train(start, files, "steps=3", *examined(files))
    assert code == 0 and "removed" not in output and "best.abandoned" not in output
    assert [path.read_text() for path in kept] == texts
    assert checkpoints.steps(run / "best") == [0]
