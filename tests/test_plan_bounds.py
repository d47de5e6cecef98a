"""Bounds of a plan, restated step by step and against measured times."""

import dataclasses

import numpy as np
import pytest
from plans import PAIRS, SHAPE, config

from oreal_jax import efficiency, trajectory
from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.losses import Grpo
from oreal_jax.plan import make_plan
from oreal_jax.plan.bounds import Phase, decoding_bound, estimate_decoding, phases
from oreal_jax.plan.planner import investigate
from oreal_jax.sampling.simulation import Round, simulate


def test_decoding_reads_all_weights_in_every_step_of_the_longest_completion():
    """Restated step by step: an engine of 8 slots, which are never fewer."""
    small = dataclasses.replace(config(), decode_rows=8)
    findings = investigate(small, SHAPE, "h100:1", PAIRS)
    lengths = np.array([[3, 100], [128, 65], [1, 7], [64, 90]])
    cache = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim
    weights = efficiency.layer_weights(SHAPE) + efficiency.head_weights(SHAPE)
    seconds = 0.0
    for step in range(lengths.max()):
        live = np.sum(lengths > step)
        seconds += 2 * (weights + cache * live * (128 + step)) / 3350e9
    estimate = estimate_decoding(small, SHAPE, findings, lengths, 100_000)
    assert estimate.steps == 128 and estimate.swapped == 0
    assert estimate.rows == pytest.approx(lengths.sum() / 128)
    assert estimate.phase.seconds == pytest.approx(seconds)
    assert estimate.phase.seconds == estimate.phase.memory


def test_rounds_add_up_to_the_work_of_decoding():
    lengths = np.random.default_rng(0).integers(1, 900, (24, 6))
    simulated = simulate(lengths, engines=2, slots=64, prompt=50, longest=900)
    rounds = simulated.rounds
    work = efficiency.decode((50, int(size)) for size in lengths.flat)
    total = lambda each: sum(r.steps * each(r).sum() for r in rounds)
    assert total(lambda r: r.running) == pytest.approx(work.tokens)
    assert total(lambda r: r.cached) == pytest.approx(work.pairs)
    assert sum(r.steps for r in rounds) == simulated.steps
    slots = [r.slots for r in rounds]
    assert slots == sorted(slots, reverse=True) and {*slots} == {64, 16}
    assert all((r.running <= r.slots).all() for r in rounds)


def test_the_bound_of_a_plan_exceeds_a_measured_throughput():
    """NeMo-RL 0.4 measured 1,562 tokens/s per GPU, with prompts.

    docs/about/performance-summary.md there: GRPO of Llama 3.1 8B on 16 H100, 64 prompts
    x 32 samples of 1,060 tokens on average and 4,096 at most, no tensor parallelism in
    generation, activation checkpointing (97.7 s per step: prompts have 132 tokens).
    """
    import oreal_7b

    measured, sampling = 1562, oreal_7b.config.sampling
    config = dataclasses.replace(
        oreal_7b.config,
        model="meta-llama/Llama-3.1-8B-Instruct",
        samples_per_prompt=32,
        max_prompt_tokens=132,
        sampling=dataclasses.replace(sampling, max_tokens=3964, top_p=1.0),
        packing=dataclasses.replace(oreal_7b.config.packing, row_length=4096),
        decode_rows=2048,
        decode_tensor=1,
        cache_tokens=200_000,
        keep=trajectory.select_all,
        loss=Grpo(),
        token_reward=None,
        freeze_steps=0,
    )
    plan = make_plan(config, "h100:16", 1060)
    assert plan.fits is not False
    assert plan.tokens == pytest.approx(measured * 97.7 * 16, rel=0.01)
    assert measured < plan.tokens_per_second < 4 * measured


QWEN_7B = PUBLISHED["Qwen/Qwen2.5-7B"]


@pytest.mark.parametrize(
    ("rows", "context", "milliseconds"),
    [(64, 1984 + 64, 7.94), (1, 1984 + 64, 4.62), (256, 500 + 64, 11.69)],
)
def test_a_decoding_step_on_an_h200_takes_up_to_three_bounds(
    rows, context, milliseconds
):
    """Measured with commit ba428a3 and jax 0.11.2.

    Qwen2.5-7B's shape in bfloat16, 128 tokens for prompts of 1,984 (256 rows: 500).
    """
    findings = investigate(config(), SHAPE, "h200:1", PAIRS)._replace(slots=rows)
    cached = np.array([rows * context])
    step = Round(steps=1, slots=rows, running=np.array([rows]), cached=cached)
    bound = decoding_bound(config(), QWEN_7B, findings, [step])
    assert bound.limit == "memory"
    assert 1.5 < milliseconds / 1000 / bound.seconds < 3


def test_a_train_step_on_an_h200_takes_up_to_three_bounds():
    """Measured with commit ba428a3 and jax 0.11.2: 0.935 s.

    Eight layers of Qwen2.5-7B, without a token reward model, on one sequence of 1,024 +
    15,360 tokens; the backward pass computes everything again.
    """
    shape = dataclasses.replace(QWEN_7B, layers=8)
    recipe = config(token_reward=None, freeze_steps=0)
    packing = dataclasses.replace(recipe.packing, row_length=16_384)
    recipe = dataclasses.replace(recipe, packing=packing, loss=Grpo())
    selected = [(1024, 15_360)]
    findings = investigate(recipe, shape, "h200:1", selected)
    none = Phase(0.0, 0.0, 0.0, 0.0, 0.0)
    bound = phases(recipe, shape, findings, selected, none)["update_actor"]
    assert findings.micros == 1 and bound.limit == "products"
    assert 2 < 0.935 / bound.seconds < 3


def test_keeping_activations_saves_flops_of_the_backward_pass():
    def flops(remat):
        changed = config(remat=remat)
        findings = investigate(changed, SHAPE, "h100:4", PAIRS)
        none = Phase(0.0, 0.0, 0.0, 0.0, 0.0)
        return phases(changed, SHAPE, findings, PAIRS, none)["update_actor"].flops

    everything, but_attention, elementwise = map(
        flops, ("everything", "but_attention", "elementwise")
    )
    assert everything > but_attention > elementwise
