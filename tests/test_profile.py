"""What a run says of its own efficiency: traces, scopes, rates; compiling by depth."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from tiny_runs import train_ok

from oreal_jax import metrics
from oreal_jax.cli import main
from oreal_jax.console import Screen
from oreal_jax.data.packing import Example, pack
from oreal_jax.losses import Oreal
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig
from oreal_jax.optimizer import Optimizer
from oreal_jax.train.profile import Profile
from oreal_jax.train.step import make_train_step
from oreal_jax.train_state import TrainedModels

pytestmark = pytest.mark.usefixtures("judges")

CONFIG = ModelConfig(
    vocab=64, embed=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=32
)
POLICY = Optimizer(learning_rate=1e-2, final_learning_rate=1e-3, warmup_steps=0)


def lowered(layers: int):
    config = dataclasses.replace(CONFIG, layers=layers)
    mesh = make_mesh(MeshShape(), config, jax.devices()[:1])
    both = TrainedModels.create(config, POLICY, POLICY, 10, mesh)
    batch, _ = pack([Example([1, 2], [3, 4])] * 3, rows=1, row_length=32)
    update = make_train_step(both, Oreal(), mesh)
    return update.program.lower(both.abstract(mesh), batch, False)


def test_a_deeper_model_is_the_same_program_with_other_shapes():
    shape = re.compile(r"\d+(x|(?=>))")  # the sizes of a type, and what counts layers
    text = lambda layers: lowered(layers).as_text().replace(f"<{layers}>", "<n>")
    few, many = text(28), text(64)
    operations = lambda text: re.findall(r"= \"?([a-z]+\.[a-z_.]+)", text)
    assert len(few.splitlines()) == len(many.splitlines())
    assert operations(few) == operations(many)
    assert shape.sub("", few) != few


def test_the_scopes_of_the_model_are_in_the_program():
    text = lowered(2).as_text(debug_info=True)
    for scope in ("attention", "mlp", "head", "loss", "optimizer"):
        assert re.search(rf'"[^"]*\b{scope}\b[^"]*"', text), scope


@pytest.fixture(scope="module")
def traced(tiny):
    run = tiny / "traced"
    output = train_ok(tiny, run, "steps=3", options=("--profile", "1"))
    return output, run


@pytest.mark.slow
def test_steps_after_the_first_are_traced_with_their_phases(traced):
    output, run = traced
    assert f"profile: xprof --logdir {run / 'profile'}" in output
    (trace,) = run.glob("profile/plugins/profile/*/*.xplane.pb")
    content = trace.read_bytes()
    for name in (b"gen", b"verify", b"ref", b"update_actor", b"step_num"):
        assert name in content


@pytest.mark.slow
def test_a_run_reports_throughput_and_flops_of_every_phase(traced):
    first, second, _ = metrics.read(traced[1] / "metrics.jsonl")
    for row in (first, second):
        for phase, timed in [("gen", "gen"), ("ref", "ref"), ("actor", "update_actor")]:
            seconds = row[f"timing_s/{timed}"]
            tokens = row[f"perf/{phase}_throughput"] * seconds
            assert tokens == pytest.approx(round(tokens), rel=1e-9) and tokens > 0
            assert row[f"perf/tflops/{phase}"] > 0
            assert f"perf/mfu/{phase}" not in row  # a CPU has no peak
    flops = lambda row, phase, timed: (
        row[f"perf/tflops/{phase}"] * row[f"timing_s/{timed}"]
    )
    # The policy's passes on what was kept: one by the reference; one and three of the
    # token reward model while the policy is frozen; three and three when it learns.
    ratio = [
        flops(row, "actor", "update_actor") / flops(row, "ref", "ref")
        for row in (first, second)
    ]
    np.testing.assert_allclose(ratio[1] - ratio[0], 2, rtol=1e-9)


def test_a_run_of_one_step_has_no_trace(tmp_path, capsys):
    profile = Profile(tmp_path / "profile", 2, Screen())
    profile.step_done(1, last=True)
    assert "profile: no step came after the first" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_negative_number_of_steps_to_trace_is_rejected(capsys):
    assert main(["train", "configs/tiny.py", "--profile", "-1"]) == 2
    assert "--profile -1" in capsys.readouterr().err
