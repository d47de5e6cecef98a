"""A tracker that fails does not end the run."""

import json

import pytest
from scripted_runs import train

from oreal_jax.train import trackers

pytestmark = pytest.mark.usefixtures("judges", "policy")


class Failing:
    """Fails in step 1 or on closing."""

    def __init__(self, *_):
        self.steps = []

    def log(self, step, metrics):
        if step == 1:
            raise ConnectionError("the server is down")

    def log_samples(self, step, rows):
        pass

    def close(self):
        raise ConnectionError("the server is down")


@pytest.mark.parametrize("steps", [1, 3])
def test_a_failing_tracker_does_not_end_the_run(start, files, monkeypatch, steps):
    monkeypatch.setattr(trackers, "TensorBoard", Failing)
    code, _, errors = train(start, files, f"steps={steps}", "trackers=tensorboard")
    assert code == 0 and errors.count("the server is down") == 1
    history = (files / "run" / "history.jsonl").read_text().splitlines()
    assert json.loads(history[-1])["outcome"] == "finished"
