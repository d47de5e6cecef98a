"""Plans through the command line; one is compiled by the TPU's own compiler."""

import dataclasses
import json

import pytest
from plans import PAIRS, SHAPE, config

from oreal_jax.cli import main
from oreal_jax.errors import InputError
from oreal_jax.plan import Plan, compiler, load_shape
from oreal_jax.plan.findings import Compiled
from oreal_jax.plan.planner import investigate
from oreal_jax.plan.show import conclusion


@pytest.fixture
def tpu_compiler():
    """Skips the test without the TPU's compiler, which `.ci/run` installs."""
    pytest.importorskip("libtpu", reason="pip install 'oreal-jax[plan]'")


@pytest.mark.usefixtures("tpu_compiler")
def test_a_small_plan_fits_and_a_large_one_names_its_largest_array(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "v5e:2x2", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] and plan["kind"] == "TPU v5 lite" and plan["devices"] == 4
    assert plan["memory"] == pytest.approx(15.75 * 2**30)
    step = next(p for p in plan["programs"] if p["name"] == "train step")
    state = plan["held"]["parameters"] + plan["held"]["optimizer"]
    assert step["arguments"] == pytest.approx(state, rel=0.2)
    assert sum(step["moved"].values()) > 0
    for setting in (
        "prompts_per_step=1024",
        "samples_per_prompt=256",
        "decode_rows=262144",
    ):
        arguments += ["--set", setting]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    assert not plan["fits"] and plan["seconds"] is None and not plan["phases"]
    assert "cache" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v5x:2x2"], "--topology v5x:2x2"),
        (["--topology", "v5e:2x2", "--set", "mesh.tensor=3"], "tensor=3"),
        (["--topology", "v5e:2x2", "--set", "decode_tensor=8"], "engine of 8 devices"),
    ],
)
@pytest.mark.usefixtures("tpu_compiler")
def test_an_invalid_topology_is_rejected(config_file, arguments, message, capsys):
    assert main(["plan", str(config_file), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["v5e", "v5e:16", "b300:4", "v5p:2x2x"])
def test_a_malformed_topology_is_answered_with_examples(config_file, topology, capsys):
    assert main(["plan", str(config_file), "--topology", topology]) == 2
    errors = capsys.readouterr().err
    assert f"--topology {topology}: unknown; expected for example v4:2x2x4" in errors


def test_a_mean_of_zero_tokens_is_rejected(config_file, capsys):
    arguments = ["--topology", "v5e:2x2", "--mean-tokens", "0"]
    assert main(["plan", str(config_file), *arguments]) == 2
    assert "--mean-tokens 0" in capsys.readouterr().err


def test_a_model_that_is_not_on_disk_is_planned_as_published():
    assert load_shape(config()).embed == 3584
    unknown = dataclasses.replace(config(), model="nobody/knows")
    with pytest.raises(InputError, match="nobody/knows"):
        load_shape(unknown)


@pytest.mark.parametrize(
    ("phase", "temporary", "largest"),
    [
        ("update_actor", 90, "activations and other temporaries"),
        ("update_actor", 20, "optimizer"),
        ("decode", 20, "cache"),
    ],
)
def test_the_largest_array_of_a_run_that_does_not_fit_is_named(
    phase, temporary, largest
):
    program = Compiled(
        "one", phase, 0, 0, temporary, 40, 200, {}, seconds=0.0, error="too big"
    )
    findings = investigate(config(), SHAPE, "h100:4", PAIRS)._replace(
        memory=100,
        held={"parameters": 10, "optimizer": 30},
        sampling={"weights": 5, "cache": 50},
        programs=[program],
    )
    plan = Plan(topology="h100:4", mean_tokens=1, tokens=1, findings=findings)
    assert plan.fits is False and plan.largest.name == "one"
    assert f"largest: {largest}," in conclusion(plan)


def test_a_missing_compiler_is_named_with_its_package(config_file, monkeypatch, capsys):
    monkeypatch.setattr(compiler.util, "find_spec", lambda name: None)
    assert main(["plan", str(config_file), "--topology", "v5e:2x2"]) == 2
    assert "pip install 'oreal-jax[plan]'" in capsys.readouterr().err
