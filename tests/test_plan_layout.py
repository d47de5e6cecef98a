"""The arrays, the programs and the selected completions of a planned run."""

import dataclasses
import re

import jax
import pytest
from plans import PAIRS, SHAPE, config

from oreal_jax import efficiency, trajectory
from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.data.packing import fill_rows
from oreal_jax.plan.bounds import completion_lengths
from oreal_jax.plan.planner import investigate
from oreal_jax.plan.programs import device_bytes, layout, programs, selected_lengths


def test_a_layout_holds_both_models_and_their_optimizers():
    run = layout(config(), SHAPE, jax.devices()[:4], jax.devices()[:4], PAIRS)
    weights = efficiency.layer_weights(SHAPE) + 2 * efficiency.head_weights(SHAPE)
    token_reward = weights - efficiency.head_weights(SHAPE)
    held = run.held
    expected = (weights + token_reward) * 4 / 4
    assert held["parameters"] == pytest.approx(expected, rel=0.02)
    assert held["optimizer"] == pytest.approx(2 * held["parameters"], rel=0.001)
    assert device_bytes(run.reference) == held["reference"]


@pytest.mark.parametrize("cache_tokens", [0, 512])
def test_every_program_is_planned_and_its_float32_products_are_exact(cache_tokens):
    small = dataclasses.replace(config(), cache_tokens=cache_tokens)
    run = layout(small, SHAPE, jax.devices()[:4], jax.devices()[:4], PAIRS)
    names = []
    for program in programs(small, SHAPE, run):
        text = program.function.lower(*program.arguments).as_text()
        products = re.findall(r"stablehlo.dot_general .*", text)
        # By default, TPUs round the factors of a product to bfloat16.
        assert all("HIGHEST" in product for product in products), program.name
        names.append(program.name)
    assert names[0] == "start" and names[-2:] == [
        "train step",
        "train step, policy frozen",
    ]
    swaps = {"swap-out", "swap-in"} if cache_tokens else set()
    assert names[1:3] == ["reshard embedding, head", "reshard a layer"]
    assert {name.split()[0] for name in names[3:-2]} == swaps | {
        "prefill",
        "admission",
        "decode",
        "collection",
        "reference",
    }


def seven_billion(**changes):
    """Return the published recipe on eight H100s and its selected sequences."""
    import oreal_7b

    config = dataclasses.replace(oreal_7b.config, **changes)
    selected = selected_lengths(config, completion_lengths(config, 7000))
    return (
        selected,
        investigate(config, PUBLISHED[config.model], "h100:8", selected),
    )


def test_all_completions_that_a_step_may_select_are_counted():
    """1,024 completions fill 57 micro-batches; a pair of each prompt, an eighth.

    Sequences of 7,000 tokens and their prompts, in micro-batches of eight rows.
    """
    selected, everything = seven_billion(keep=trajectory.select_all)
    assert len(selected) == 1024
    rows = fill_rows([sum(lengths) for lengths in selected], 16_384)
    assert everything.micros == -(-len(rows) // 8) >= 57
    pairs, one_pair = seven_billion()
    assert len(pairs) == 128 and 8 <= one_pair.micros <= 9
    step = lambda findings: findings.programs[-1].arguments
    assert step(everything) > step(one_pair)  # the batch itself
    small = config(keep=trajectory.select_all)
    selected = selected_lengths(small, completion_lengths(small, 64))
    devices = jax.devices()[:4]
    run = layout(small, SHAPE, devices, devices, selected)
    rows = fill_rows([sum(lengths) for lengths in selected], 256)
    assert len(selected) == 16 and run.micros == -(-len(rows) // 4)
