"""How a run ends after an error: what it saves, and which error is reported."""

import shutil
import signal

import jax
import pytest
from scripted_runs import saved_steps, sft, train
from tiny_runs import ROOT, arrays

from oreal_jax.checkpoints import run as checkpoints
from oreal_jax.config import SftConfig
from oreal_jax.config_loading import load
from oreal_jax.console import Screen
from oreal_jax.errors import Diverged
from oreal_jax.train import loop, run_directory
from oreal_jax.train import sft as fine_tuning

pytestmark = pytest.mark.usefixtures("judges")


def test_an_error_saves_the_last_finished_step(start, files, policy):
    policy.fails_at = 3
    with pytest.raises(RuntimeError, match="a bug"):
        train(start, files, "steps=5")
    assert saved_steps(files / "run") == [3]
    policy.fails_at = -1
    code, output, _ = train(start, files, "steps=5")
    assert code == 0 and f"resuming {files / 'run'} after 3 step(s)" in output
    assert len(set(policy.take_prompts())) == 20


def test_an_error_after_the_update_saves_the_updated_state(
    start, files, policy, monkeypatch
):
    """Its record is lost, not its learning: the update has replaced the old state.

    A file that cannot be written is an error of the step after it.
    """
    policy.learns = True
    assert train(start, files, "steps=3", "saving.every=2", run="whole").code == 0
    write = run_directory.write_trajectories

    def fail(run, step, *given):
        if step == 1:
            raise OSError("no route to the file system")
        write(run, step, *given)

    monkeypatch.setattr(run_directory, "write_trajectories", fail)
    with pytest.raises(OSError, match="no route"):
        train(start, files, "steps=3")
    assert saved_steps(files / "run") == [3]
    whole = arrays(files / "whole", 3)
    for ours, theirs in zip(arrays(files / "run", 3), whole, strict=True):
        assert ours.tobytes() == theirs.tobytes()


def test_an_update_that_consumed_its_state_does_not_mask_its_error(
    start, files, policy, monkeypatch
):
    """The state is donated: after an error on the device there is none to save."""
    policy.learns = True

    def make_failing_step(*_):
        def step(state, batch):
            jax.tree.map(lambda leaf: leaf.delete(), state)
            raise RuntimeError("out of memory")

        return step

    monkeypatch.setattr(loop, "make_run_step", make_failing_step)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(start, files, "steps=3")
    assert saved_steps(files / "run") == []


def test_unwritable_trajectories_end_the_run(start, files, policy):
    run = files / "run"
    run.mkdir()
    (run / "trajectories").touch()  # a file where a folder should be
    code, _, errors = train(start, files, "steps=2", "saving.every=1")
    assert code == 2
    assert "step_000000.jsonl: cannot be written: " in errors
    assert errors.count("\n") == 1
    # The steps themselves are finished, and not lost.
    assert saved_steps(run) == [1, 2]


@pytest.mark.parametrize(
    ("error", "code", "saved"),
    [(KeyboardInterrupt(), 130, [1]), (Diverged("x"), 1, [])],
)
def test_an_unwritable_file_does_not_mask_another_error(
    start, files, policy, error, code, saved
):
    run = files / "run"
    run.mkdir()
    (run / "trajectories").touch()  # a file where a folder should be
    policy.fails_at, policy.error = 1, error
    result = train(start, files, "steps=3")
    assert result.code == code
    assert "step_000000.jsonl: cannot be written: " in result.output
    assert saved_steps(run) == saved


def test_an_error_before_the_first_step_saves_nothing(start, files, policy):
    policy.fails_at = 0
    with pytest.raises(RuntimeError, match="a bug"):
        train(start, files, "steps=5")
    assert saved_steps(files / "run") == []


@pytest.fixture
def log_of_error(start, files, policy, monkeypatch):
    """Return `log_of_error(save)`, which returns the log of a failed run.

    The run ends with a bug in its third step and saves by `save`.
    """

    def run(save) -> list[str]:
        policy.fails_at = 2
        monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
        lines = []
        monkeypatch.setattr(Screen, "log", lambda self, text: lines.append(text))
        with pytest.raises(RuntimeError, match="a bug"):
            train(start, files, "steps=5")
        return lines

    return run


def test_a_failed_save_does_not_mask_the_error(log_of_error):
    def fail(*_):
        raise OSError("disk full")

    assert "not saved: OSError: disk full" in log_of_error(fail)[-1]


def test_ctrl_c_while_saving_after_an_error_does_not_mask_it(files, log_of_error):
    save = checkpoints.Checkpoints.save

    def interrupted(*given):
        signal.raise_signal(signal.SIGINT)
        save(*given)

    assert log_of_error(interrupted)[-1] == "RuntimeError: a bug; saved after 2 step(s)"
    assert saved_steps(files / "run") == [2]


def test_sft_rejects_a_loss_that_reads_absent_inputs(start, files):
    config = files / "own.py"
    shutil.copy(ROOT / "configs/tiny_sft.py", files)
    text = """
import dataclasses, tiny_sft
from oreal_jax.losses import Reinforce
config = dataclasses.replace(tiny_sft.config, loss=Reinforce())
"""
    config.write_text(text)
    code, _, errors = sft(start, files, config=config)
    assert code == 2 and errors.count("\n") == 1
    assert "reads reference_log_probs, which SFT does not compute" in errors
    assert not (files / "run").exists()
    fine_tuning.check_loss(load(config, SftConfig, ["loss.kl_weight=0.0"]))
