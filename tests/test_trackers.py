"""Trackers: what they record, and that a resumed run continues its record."""

import importlib.util
import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import ROOT

from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.config_loading import load
from oreal_jax.data import Prompt
from oreal_jax.errors import InputError
from oreal_jax.sampling import Completion
from oreal_jax.train.trackers import COLUMNS, Trackers, check_trackers, record_id
from oreal_jax.trajectory import Trajectory
from oreal_jax.verify import Verdict


def make_config(*trackers: str) -> TrainConfig:
    settings = [f"trackers={trackers!r}", "sample_table_every=2"]
    return load(ROOT / "configs/tiny.py", TrainConfig, settings)


def make_group(text: str) -> list[Trajectory]:
    one = Trajectory(
        prompt=Prompt("a", "max 1 2?", "2"),
        group=0,
        sample=0,
        prompt_tokens=[1],
        completion=Completion([2], np.zeros(1), None, "stop", text),
        verdict=Verdict("correct", "equal"),
        advantage=0.25,
    )
    return [one, one]


ROW = ["max 1 2?", "2", "<b>2|3?", "correct", "0.2500"]


class Run:
    """A stand-in for the runs of both libraries, which records its calls."""

    def __init__(self, options: dict):
        self.options, self.logged, self.finished = options, [], False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict, step: int | None = None) -> None:
        self.logged.append(values if step is None else {"step": step, **values})

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(params=["wandb", "trackio"])
def stand_in(request, monkeypatch):
    """Return the name of a library and the runs that were begun in it."""
    runs = []

    def init(**options):
        runs.append(Run(options))
        return runs[-1]

    module = types.SimpleNamespace(init=init, Table=dict)
    monkeypatch.setitem(sys.modules, request.param, module)
    return request.param, runs


def test_metrics_samples_and_settings_are_recorded(stand_in, tmp_path):
    name, runs = stand_in
    trackers = Trackers(make_config(name), tmp_path, 0)
    for step in range(3):
        trackers.log_samples(step, [make_group("<b>2|3\udcff")])
        trackers.write(step, {"actor/loss": 0.5 + step, "x": math.nan})
    trackers.close()
    (run,) = runs
    row = [*ROW]
    if name == "trackio":  # whose tables are Markdown
        row[2] = "&lt;b&gt;2&#124;3?"
    samples = {"columns": list(COLUMNS), "data": [row]}
    assert run.logged == [
        {"step": 0, "samples": samples},
        {"step": 0, "actor/loss": 0.5},
        {"step": 1, "actor/loss": 1.5},
        {"step": 2, "samples": samples},
        {"step": 2, "actor/loss": 2.5},
    ]
    assert run.finished and run.options["project"] == "oreal-jax"
    config = run.options["config"]
    assert config["policy.learning_rate"] == 1e-3 and "commit" in config


def test_a_resumed_run_continues_its_record(stand_in, tmp_path, monkeypatch):
    name, runs = stand_in
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "own")
    for first in (0, 5):
        Trackers(make_config(name), tmp_path, first).close()
    Trackers(make_config(name), tmp_path / "other", 0).close()
    keys = [(run.options.get("id"), run.options["name"]) for run in runs]
    assert keys[0] == keys[1] != keys[2]
    assert {run.options["resume"] for run in runs} == {"allow"}
    assert {run.options["project"] for run in runs} == {"own"}
    ids = json.loads((tmp_path / "trackers.json").read_text())
    assert ids == {name: record_id(tmp_path, name)}


def test_text_of_a_model_is_no_markup_in_tensorboard(tmp_path, monkeypatch):
    import tensorboardX

    texts, options = {}, []

    class Writer:
        def __init__(self, folder, purge_step):
            options.append((folder, purge_step))

        def add_text(self, name, text, step):
            texts[name, step] = text

        def add_scalar(self, name, value, step):
            texts[name, step] = value

        def close(self):
            texts["closed", 0] = True

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Writer)
    trackers = Trackers(make_config("tensorboard"), tmp_path, 4)
    trackers.log_samples(4, [make_group("<b>2|3\n# 'x'")])
    trackers.write(4, {"actor/loss": 0.5})
    trackers.close()
    assert options == [(str(tmp_path / "tensorboard"), 4)]
    assert texts["actor/loss", 4] == 0.5 and texts["closed", 0]
    row = texts["samples", 4].splitlines()[2]
    assert row == "| max 1 2? | 2 | &lt;b&gt;2&#124;3<br>&#35; 'x' | correct | 0.2500 |"
    assert "| policy.learning&#95;rate | 0.001 |" in texts["config", 4].splitlines()


def test_a_library_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = r"wandb is not installed: pip install 'oreal-jax\[wandb\]'"
    with pytest.raises(InputError, match=message):
        check_trackers(make_config("wandb"))
    check_trackers(make_config())


@pytest.mark.parametrize("kind", [TrainConfig, SftConfig])
def test_the_old_name_of_tensorboard_is_read_and_reported(tmp_path, capsys, kind):
    data = {TrainConfig: "prompts", SftConfig: "examples"}[kind]
    path = tmp_path / "own.py"
    path.write_text(
        f"from oreal_jax.config import {kind.__name__}\n"
        f"config = {kind.__name__}(model='m', {data}='d', tensorboard=True)\n"
    )
    config = load(path, kind, ["seed=3"])
    assert config.trackers == ("tensorboard",) and config.seed == 3
    errors = capsys.readouterr().err
    message = "tensorboard=True is deprecated; use trackers=('tensorboard',)"
    assert errors == f"oreal: {message}\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_the_libraries_record_offline(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip(name)
    run = tmp_path / "run"
    for first in (0, 2):
        trackers = Trackers(make_config(name), run, first)
        for step in range(first, first + 2):
            trackers.log_samples(step, [make_group("2")])
            trackers.write(step, {"actor/loss": float(step)})
        trackers.close()
    folder = {"wandb": run / "wandb", "trackio": tmp_path / "trackio"}[name]
    assert any(Path(folder).rglob("*"))
