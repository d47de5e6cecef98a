"""The FLOPs of a run against XLA's own count, and its rates."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from oreal_jax import efficiency, model
from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.efficiency import PhaseTotals, Work
from oreal_jax.model import ModelConfig

# Wide for its length, so that matrix products dominate.
WIDE = ModelConfig(
    vocab=512, embed=256, layers=1, heads=8, kv_heads=2, head_dim=32, mlp=768
)
QWEN_7B = PUBLISHED["Qwen/Qwen2.5-7B"]
B, S = 2, 128


def log_probs(params):
    tokens = jnp.ones((B, S), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))
    states = model.hidden(WIDE, params, tokens, positions, tokens)
    return model.log_probs(WIDE, params, states, tokens)[0].sum()


def counted_by_xla(function) -> float:
    params = model.abstract(WIDE)
    costs = jax.jit(function).lower(params).compile().cost_analysis()
    assert costs
    return costs["flops"]


def test_forward_flops_equal_xlas_count():
    # XLA's attention computes the scores that are masked too.
    square = Work(tokens=B * S, pairs=B * S * S, predicted=B * S)
    ours = efficiency.forward_flops(WIDE, square)
    assert counted_by_xla(log_probs) == pytest.approx(ours, rel=0.03)


def test_training_flops_plus_rematerialisation_equal_xlas_count():
    square = Work(tokens=B * S, pairs=B * S * S, predicted=B * S)
    ours = efficiency.training_flops(WIDE, square)
    # The backward pass repeats the forward pass except a layer's last product.
    last = 2 * B * S * WIDE.mlp * WIDE.embed
    again = efficiency.forward_flops(WIDE, square) - last
    counted = counted_by_xla(jax.value_and_grad(log_probs))
    assert counted == pytest.approx(ours + again, rel=0.03)


@pytest.mark.parametrize("tied", [True, False])
def test_training_takes_six_flops_per_token_and_parameter(tied):
    config = dataclasses.replace(QWEN_7B, tied=tied)
    table = config.vocab * config.embed
    used = model.parameter_count(config) - (0 if tied else table)  # looked up only
    work = efficiency.full_pass([(0, 1)] * 1000)
    ours = efficiency.training_flops(config, work)
    assert ours == pytest.approx(6 * used * 1000, rel=1e-3)


def test_the_score_head_is_one_column():
    scoring = dataclasses.replace(WIDE, head="score")
    work = Work(tokens=0, pairs=0, predicted=7)
    assert efficiency.forward_flops(scoring, work) == 2 * 7 * WIDE.embed


def test_pairs_are_those_of_a_causal_mask():
    lengths = [(3, 4), (5, 0), (1, 6)]
    see = lambda size, first: sum(range(first + 1, size + 1))
    assert efficiency.full_pass(lengths) == Work(
        tokens=19, pairs=sum(see(p + c, 0) for p, c in lengths), predicted=10
    )


def test_prefill_and_decoding_equal_one_full_pass():
    lengths = [(3, 4), (5, 1), (1, 6)]
    before = efficiency.prefill(prompt for prompt, _ in lengths)
    decoded = efficiency.decode(lengths)
    # The last token of a completion is sampled, but never goes through the layers.
    at_once = efficiency.full_pass(
        (prompt, completion - 1) for prompt, completion in lengths
    )
    assert before.tokens + decoded.tokens == at_once.tokens
    assert before.pairs + decoded.pairs == at_once.pairs
    assert decoded.predicted == 11


def test_a_decoding_step_reads_all_weights_and_caches_once():
    config = dataclasses.replace(QWEN_7B, qkv_bias=False)
    gains = (2 * config.layers + 1) * config.embed
    weights = model.parameter_count(config) - config.vocab * config.embed - gains
    per_token = 2 * 28 * 4 * 128
    ours = efficiency.decode_bytes(config, [100, 250], weight_bytes=1)
    assert ours == weights + 350 * per_token * 2


def test_throughput_is_of_all_devices_and_tflops_per_device():
    peak = efficiency.PEAKS["TPU v5 lite"]
    totals = {"actor": PhaseTotals(tokens=1000, flops=197e12 * 4)}
    rates = efficiency.metrics(totals, {"actor": 2.0}, devices=8, peak=peak)
    assert rates == {
        "perf/actor_throughput": 500.0,
        "perf/tflops/actor": 49.25,
        "perf/mfu/actor": 0.25,
    }
    rates = efficiency.metrics(totals, {"actor": 2.0}, devices=8, peak=None)
    assert "perf/mfu/actor" not in rates
