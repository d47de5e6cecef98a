"""Plans for GPUs: the arrays of a run against the memory of the devices."""

import dataclasses
import json

import jax
import pytest
from plans import PAIRS, SHAPE, config

from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.cli import main
from oreal_jax.plan import make_plan
from oreal_jax.plan.gpus import SHARE_VARIABLES, gpu_memory
from oreal_jax.plan.planner import investigate
from oreal_jax.plan.programs import layout


def test_a_plan_for_gpus_counts_the_arrays_of_the_run(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "h100:4", "--json"]
    assert main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    bfloat16 = config(compute="bfloat16")
    run = layout(bfloat16, SHAPE, jax.devices()[:4], jax.devices()[:4], PAIRS)
    assert plan["held"] == run.held and plan["sampling"] == run.sampling
    assert plan["fits"] is None  # temporary memory is not known
    assert {program["temporary"] for program in plan["programs"]} == {None}
    step = next(p for p in plan["programs"] if p["name"] == "train step")
    assert step["peak"] > run.held["parameters"] + run.held["optimizer"]
    offloaded = ["--set", "policy.offload=True", "--set", "token_reward.offload=True"]
    assert main([*arguments, *offloaded]) == 0
    optimizer = json.loads(capsys.readouterr().out)["held"]["optimizer"]
    assert optimizer < 100  # step counts; moments are in host memory
    assert main(arguments[:-1]) == 0
    assert "whether the run fits is open" in capsys.readouterr().out


def test_a_run_whose_arrays_exceed_gpus_does_not_fit(config_file, capsys):
    arguments = ["plan", str(config_file), "--topology", "h100:4"]
    for setting in ("prompts_per_step=1024", "decode_rows=1048576"):
        arguments += ["--set", setting]
    arguments += ["--set", "samples_per_prompt=1024"]
    assert main(arguments) == 1
    assert "does not fit with 10% to spare" in capsys.readouterr().err


def test_the_larger_cache_that_a_plan_proposes_lets_all_slots_run(config_file, capsys):
    def planned(cache_tokens: int) -> dict:
        arguments = ["plan", str(config_file), "--topology", "h100:1", "--json"]
        assert main([*arguments, "--set", f"cache_tokens={cache_tokens}"]) == 0
        return json.loads(capsys.readouterr().out)

    small = planned(512)
    larger = small["larger_cache"]
    assert small["decoding"]["rows"] < larger["rows"] <= small["slots"]
    assert small["decoding"]["swapped"] > 0 == larger["swapped"]
    assert larger["seconds"] < small["phases"]["decode"]["seconds"]
    assert larger["cache_tokens"] > 512
    again = planned(larger["cache_tokens"])
    assert again["larger_cache"] is None and again["fits"] is None
    assert again["decoding"]["rows"] == larger["rows"]
    assert again["phases"]["decode"]["seconds"] == larger["seconds"]


@pytest.mark.parametrize(
    ("variables", "share"),
    [
        ({}, 0.75),
        ({"XLA_CLIENT_MEM_FRACTION": ".9"}, 0.9),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, 0.5),
    ],
)
def test_a_gpu_has_the_memory_that_jax_allocates(variables, share, monkeypatch):
    for name in SHARE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpu_memory("h100:4") == pytest.approx(share * 80e9)


@pytest.mark.parametrize("value", ["most", "0", "-1", "1.5", "nan"])
def test_an_invalid_share_of_memory_is_rejected(
    value, config_file, monkeypatch, capsys
):
    monkeypatch.setenv(SHARE_VARIABLES[0], value)
    assert main(["plan", str(config_file), "--topology", "h100:4"]) == 2
    assert f"{SHARE_VARIABLES[0]}={value}" in capsys.readouterr().err


def test_a_proposed_cache_fits_with_the_7b_state():
    import oreal_7b

    small = dict(prompts_per_step=16, cache_tokens=65_536)
    recipe = dataclasses.replace(oreal_7b.config, **small)
    proposed = make_plan(recipe, "h100:8", 7000).larger_cache
    assert proposed
    larger = dataclasses.replace(recipe, cache_tokens=proposed.cache_tokens)
    findings = investigate(larger, PUBLISHED[recipe.model], "h100:8", PAIRS)
    peak = max(p.peak for p in findings.programs if p.phase != "update_actor")
    assert 0.9 * 0.75 * 80e9 * (1 - 1e-3) <= peak <= 0.9 * 0.75 * 80e9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mean-tokens", "129"], "--mean-tokens 129 exceeds sampling.max_tokens=128"),
        (["--set", "cache_tokens=300"], "does not fit cache_tokens=300"),
        (["--set", "decode_tensor=3"], "an engine of 3 devices"),
    ],
)
def test_an_invalid_plan_for_gpus_is_rejected(config_file, arguments, message, capsys):
    assert main(["plan", str(config_file), "--topology", "h100:4", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("topology", ["h100", "h100:0", "h100:x", "h100:12"])
def test_an_invalid_number_of_gpus_is_rejected(config_file, topology, capsys):
    assert main(["plan", str(config_file), "--topology", topology]) == 2
    assert "h100:8" in capsys.readouterr().err
