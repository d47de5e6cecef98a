"""Verifiers of a config file in every verb that verifies, and their metrics."""

import argparse
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
from scripted import write_lines
from scripted_runs import run_verb
from tiny_runs import ROOT

from oreal_jax import metrics, verify
from oreal_jax.checkpoints.source import open_model
from oreal_jax.cli import main
from oreal_jax.cli.options import log_verifiers

VERIFIER = """
from oreal_jax.verify import Verdict


def knows_color(completion, prompt):
    if completion == prompt.get("color"):
        return Verdict("correct", f"the color of {prompt.get('question')}")
    return Verdict("undecided", "another color")
"""
CONFIG = """
import dataclasses

import tiny
from color_verifier import knows_color
from oreal_jax.verify import by_rule

verification = dataclasses.replace(
    tiny.config.verification, verifiers=(knows_color, by_rule), deadline=9.0
)
config = dataclasses.replace(tiny.config, verification=verification)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """Return a config file with a verifier in a module next to it."""
    folder = tmp_path_factory.mktemp("config")
    shutil.copy(ROOT / "configs" / "tiny.py", folder)
    (folder / "color_verifier.py").write_text(VERIFIER)
    (folder / "color_config.py").write_text(CONFIG)
    return folder / "color_config.py"


def test_verify_uses_the_verifiers_of_a_config(config, tmp_path, capsys):
    rows = [
        {"prediction": "blue", "gold": "7", "question": "hue?", "color": "blue"},
        {"prediction": "\\boxed{7}", "gold": "7", "color": ["blue"]},
    ]
    file = str(write_lines(tmp_path / "answers.jsonl", rows))
    words = ["verify", "--config", str(config), "--workers", "1"]
    assert main([*words, "--file", file, "--json"]) == 0
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert verdicts == [
        {"verdict": "correct", "reason": "the color of hue?", "by": "knows_color"},
        {"verdict": "correct", "reason": "equal: 7", "by": "rule"},
    ]
    answer = ["--gold", "7", "--answer", "blue", "--question", "hue?"]
    assert main([*words, *answer]) == 0
    assert "(by rule)" in capsys.readouterr().out  # its prompt has no color


@pytest.fixture
def pools(shared_pool, monkeypatch) -> list[tuple]:
    """Return the arguments of all pools, which are replaced by one."""
    importlib.import_module("oreal_jax.evaluation")  # with the class in its hints
    arguments = []
    record = lambda *given: arguments.append(given) or shared_pool
    monkeypatch.setattr(verify, "Pool", record)
    return arguments


EVAL = ["eval", "--data", "six.jsonl"]
RATE = ["data", "pass-rate", "--data", "six.jsonl", "--k", 1, "--out", "m.jsonl"]
RFT = ["data", "rft", "--data", "six.jsonl", "--k", 8, "--out", "s.jsonl"]


@pytest.mark.parametrize("words", [EVAL, RATE, RFT])
def test_verbs_that_generate_use_the_verifiers_of_a_config(
    home, script, oreal, pools, config, words
):
    assert oreal(*words) == 0
    assert oreal(*words, "--config", config) == 0
    default, (workers, deadline, verifiers) = pools
    assert default == (workers,) and workers == os.cpu_count() and deadline == 9.0
    assert [verifier.__name__ for verifier in verifiers] == ["knows_color", "by_rule"]


def test_evaluations_by_other_verifiers_are_not_compared(
    home, script, oreal, pools, config, capsys
):
    assert oreal(*EVAL, "--items", "a.jsonl") == 0
    assert oreal(*EVAL, "--items", "b.jsonl", "--config", config) == 0
    capsys.readouterr()
    assert main(["compare", "a.jsonl", "b.jsonl"]) == 2
    rule = "verifiers=['oreal_jax.verify.rule.by_rule'] and ['"
    assert rule in capsys.readouterr().err


def test_an_explicit_deadline_replaces_that_of_the_config(pools, config):
    answer = ["verify", "--gold", "7", "--answer", "7", "--workers", "1"]
    for options, deadline in [
        (["--config", str(config)], 9.0),
        (["--config", str(config), "--deadline", "3"], 3.0),
        (["--deadline", "3"], 3.0),
    ]:
        pools.clear()
        assert main([*answer, *options]) == 0
        assert pools[0][1] == deadline


def test_completions_that_are_verified_are_not_verified_again(home, config, capsys):
    words = ["data", "rft", "--completions", "c.jsonl", "--out", "s.jsonl"]
    assert main([*words, "--config", str(config)]) == 2
    assert "--config with --completions: they are already" in capsys.readouterr().err
    assert main(["verify", "--gold", "7", "--answer", "7", "--config", "gone.py"]) == 2
    assert "gone.py: no such config file" in capsys.readouterr().err


@pytest.mark.usefixtures("judges")
def test_a_run_has_a_metric_of_its_own_verifier_and_names_it_later(
    start, files, policy, config
):
    run = files / "run"
    settings = [f"model={start / 'hf'}", f"prompts={files / 'prompts.jsonl'}"]
    settings += ["prompts_per_step=4", "steps=2", "max_disagreement=2.0"]
    assert run_verb("train", config, run, settings).code == 0
    rows = metrics.read(run / "metrics.jsonl")
    assert [row["verdict/by_knows_color"] for row in rows] == [0.0, 0.0]
    names = {name for metric in metrics.METRICS for name in metric.names}
    written = {name for row in rows for name in row}
    assert written - names == {"verdict/by_knows_color"}
    assert "verdict/by_VERIFIER" in names
    run_settings = open_model(run).settings
    for options, count in [({"config": None}, 1), ({"config": config}, 0)]:
        lines = []
        args = argparse.Namespace(model=str(run), **options)
        log_verifiers(args, run_settings, lines.append)
        assert len(lines) == count
        assert all("color_verifier.knows_color" in line for line in lines)
