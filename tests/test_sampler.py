"""The sampler: penalties, truncation, frequencies of tokens, and stop strings."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor

from oreal_jax.errors import InputError
from oreal_jax.sampling import Sampling, make_stop_table, sampling_distribution
from oreal_jax.sampling.parameters import MAX_FACTOR, MAX_SHIFT, SlotSampling
from oreal_jax.sampling.sampler import (
    History,
    Stages,
    adjust,
    sample_tokens,
    truncate,
)
from oreal_jax.sampling.stops import MATCHED, START
from oreal_jax.sampling.truncation import block_sums, invert

GENERATED = [[5, 5, 9], [1, 2, 3], [9, 9, 9]]  # after prompts of token 7


def make_history(vocabulary: int) -> History:
    prompt = np.zeros((3, vocabulary), bool)
    prompt[:, 7] = True
    counts = np.stack([np.bincount(row, minlength=vocabulary) for row in GENERATED])
    return History(jnp.asarray(prompt), jnp.asarray(counts, jnp.int32))


def make_slots(sampling: Sampling, count: int) -> SlotSampling:
    """`count` slots that request renormalised log-probabilities."""
    slot = SlotSampling.one(sampling, 4, renormalise=True)
    return jax.tree.map(lambda x: jnp.stack([x] * count), slot)


def sample_all(logits, keys, sampling, history=None):
    """Sample a token for every row with the same parameters."""
    B, V = logits.shape
    slots = make_slots(sampling, B)
    if history is None:
        history = History(jnp.zeros((B, V), bool), jnp.zeros((B, V), jnp.int32))
    stages = Stages.needed(slots, jnp.ones(B, bool))
    return sample_tokens(logits, stages, keys, slots, history)


@pytest.mark.parametrize("penalty", [0.7, 1.5])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    logits = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    sampling = Sampling(max_tokens=1, repetition_penalty=penalty)
    ours = adjust(jnp.asarray(logits), make_slots(sampling, 3), make_history(20))
    processor: Any = RepetitionPenaltyLogitsProcessor(penalty)
    history = torch.tensor([[7, *row] for row in GENERATED])
    theirs = processor(history, torch.tensor(logits))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_the_logit_bias_is_that_of_transformers():
    logits = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    bias = ((4, 2.5), (11, -100.0))
    sampling = Sampling(max_tokens=1, logit_bias=bias)
    ours = adjust(jnp.asarray(logits), make_slots(sampling, 3), make_history(20))
    entries: Any = [[[token], value] for token, value in bias]
    processor: Any = SequenceBiasLogitsProcessor(entries)
    history = torch.tensor([[7, *row] for row in GENERATED])
    expected = processor(history, torch.tensor(logits))
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_presence_counts_once_and_frequency_each_time():
    """OpenAI's formula: logit - presence * (count > 0) - frequency * count.

    Counts are over the completion alone.
    """
    logits = np.random.default_rng(0).normal(size=(3, 20)).astype(np.float32)
    sampling = Sampling(max_tokens=1, presence_penalty=0.5, frequency_penalty=0.25)
    slots = make_slots(sampling, 3)
    ours = np.asarray(adjust(jnp.asarray(logits), slots, make_history(20)))
    for row, history in enumerate(GENERATED):
        for token in range(20):
            count = history.count(token)
            less = 0.5 * (count > 0) + 0.25 * count
            assert ours[row, token] == pytest.approx(logits[row, token] - less)


def sorted_nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Sort and keep tokens until their mass reaches top_p."""
    kept = np.zeros_like(probabilities)
    for row, values in enumerate(probabilities):
        order = np.argsort(-values, kind="stable")
        mass = np.cumsum(values[order])
        size = int(np.argmax(mass >= top_p * mass[-1])) + 1
        kept[row, order[:size]] = values[order[:size]]
    return kept


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_the_nucleus_equals_that_found_by_sorting(scale, top_p):
    logits = scale * jax.random.normal(jax.random.key(0), (5, 700))
    kept = truncate(logits, Sampling(max_tokens=1, top_p=top_p))
    expected = sorted_nucleus(np.asarray(jax.nn.softmax(logits)), top_p)
    assert ((np.asarray(kept) > 0) == (expected > 0)).mean() > 0.999  # rounding of sums


OPTIONS = [
    {},
    {"logit_bias": ((3, 2.0), (200, -1.5))},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3},
    pytest.param({"temperature": 0.5}, marks=pytest.mark.slow),
    pytest.param({"top_p": 0.8}, marks=pytest.mark.slow),
    {"top_p": 0.3},
    {"top_k": 5},
    {"min_p": 0.2},
    pytest.param(
        {"temperature": 1.5, "top_k": 20, "top_p": 0.7, "min_p": 0.1},
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_frequencies_of_tokens_follow_the_distribution(options):
    count, V = 100_000, 300
    sampling = Sampling(**({"max_tokens": 1} | options))
    logits = 2 * jax.random.normal(jax.random.key(0), (V,))
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), count))
    history = History(jnp.arange(V)[None] % 3 == 0, jnp.arange(V)[None] % 5)
    sample_one = lambda key: sample_all(
        logits[None], key[None], sampling, history
    ).token[0]
    tokens = np.asarray(
        jax.jit(lambda keys: jax.lax.map(sample_one, keys, batch_size=1000))(keys)
    )
    scores = adjust(logits[None], make_slots(sampling, 1), history)
    kept = np.asarray(truncate(scores, sampling)[0], np.float64)
    expected = count * kept / kept.sum()
    counts = np.bincount(tokens, minlength=V)
    assert not counts[expected == 0].any()
    common = expected >= 5
    rest = [counts[~common].sum(), expected[~common].sum()]
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    chi_square += (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
    freedom = common.sum()
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("lowest", [0.0, 1e-3])
def test_no_uniform_number_gives_a_token_of_weight_zero(lowest):
    """Try uniform numbers next to all boundaries of blocks.

    Rounding decides there. Uniform numbers are multiples of 2^-23; `lowest` masks all
    other tokens.
    """
    rows, blocks, kept, one = 64, 16, 20, 2**23
    random = np.random.default_rng(0)
    weights = np.zeros((rows, blocks * 256), np.float32)
    for row in weights:
        row[:] = random.uniform(0, lowest, row.size) * 0.999
        places = random.choice(row.size, kept, replace=False)
        row[places] = np.exp(random.normal(0, 2, kept))
    weights /= weights.max(axis=1, keepdims=True)
    allowed = weights >= lowest if lowest else weights > 0
    sums = np.asarray(block_sums(jnp.where(allowed, weights, 0)))
    shares = np.cumsum(sums, axis=1, dtype=np.float64)
    shares = np.floor(shares / shares[:, -1:] * one)
    near = (shares[:, :, None] + np.arange(-3, 4)).reshape(rows, -1).clip(0, one - 1)
    near = np.concatenate([near, np.tile([0, 1, one - 1], (rows, 1))], axis=1)
    for uniform in near.T.astype(np.float32) / np.float32(one):
        token = invert_jitted(weights, jnp.full(rows, lowest), sums, uniform)
        assert allowed[np.arange(rows), token].all()


invert_jitted = jax.jit(invert)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_largest_adjustments_leave_probabilities(greedy):
    """At the ends of their ranges together: the biased token or none but it."""
    rows, V = 8, 20
    logits = jax.random.normal(jax.random.key(0), (rows, V))
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), rows))
    history = History(jnp.ones((rows, V), bool), jnp.full((rows, V), 10**5))
    temperature = 0.0 if greedy else 1.0
    for sign in (-1, 1):
        for factor in (1 / MAX_FACTOR, MAX_FACTOR):
            sampling = Sampling(
                max_tokens=1,
                temperature=temperature,
                repetition_penalty=factor,
                presence_penalty=sign * MAX_SHIFT,
                frequency_penalty=sign * MAX_SHIFT,
                logit_bias=((3, sign * MAX_SHIFT), (4, -np.inf)),
            )
            token, log_prob, sampled = sample_all(logits, keys, sampling, history)
            assert np.all((token >= 0) & (token < V) & (token != 4))
            assert np.isfinite(log_prob).all() and np.isfinite(sampled).all()


def kept_by_sorting(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Probabilities of one row: tempered, cut to top-k, then to the nucleus."""
    probabilities = np.exp(logits / sampling.temperature)
    order = np.argsort(-probabilities)[: sampling.top_k or None]
    mass = np.cumsum(probabilities[order]) / probabilities[order].sum()
    order = order[: int((mass < sampling.top_p).sum()) + 1]
    likely = probabilities[order] >= sampling.min_p * probabilities.max()
    order = order[likely]
    kept = np.zeros_like(probabilities)
    kept[order] = probabilities[order] / probabilities[order].sum()
    return kept


def test_log_probs_are_of_the_full_model_and_of_the_sampled_distribution():
    logits = jax.random.normal(jax.random.key(0), (40, 50))
    keys = jax.random.key_data(jax.random.split(jax.random.key(1), 40))
    sampling = Sampling(max_tokens=1, temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)
    token, log_prob, sampled = sample_all(logits, keys, sampling)
    full = jax.nn.log_softmax(logits)
    expected = jnp.take_along_axis(full, token[:, None], -1)[:, 0]
    np.testing.assert_allclose(log_prob, expected, rtol=1e-5)
    for row, chosen in enumerate(np.asarray(token)):
        kept = kept_by_sorting(np.asarray(logits[row], np.float64), sampling)
        np.testing.assert_allclose(sampled[row], np.log(kept[chosen]), rtol=1e-4)


def test_the_trainers_scores_are_those_of_the_sampled_distribution():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 50))
    targets = jnp.argmax(logits, axis=-1)
    sampling = Sampling(max_tokens=1, temperature=0.7, top_k=20, top_p=0.8, min_p=0.1)
    scores = sampling_distribution(sampling)(logits, targets)
    ours = jax.nn.softmax(scores).reshape(12, 50)
    for row, values in zip(ours, logits.reshape(12, 50), strict=True):
        kept = kept_by_sorting(np.asarray(values, np.float64), sampling)
        np.testing.assert_allclose(row, kept, rtol=1e-4, atol=1e-7)


def test_a_target_outside_the_trainers_truncation_has_a_finite_log_prob():
    logits = jnp.asarray([[[4.0, 3.0, -2.0]]])
    scores = sampling_distribution(Sampling(max_tokens=1, top_k=1))(
        logits, jnp.asarray([[2]])
    )
    expected = np.exp(-2) / (np.exp(4) + np.exp(-2))
    np.testing.assert_allclose(jax.nn.softmax(scores)[0, 0, 2], expected, rtol=1e-5)
    assert jax.nn.softmax(scores)[0, 0, 1] == 0


@settings(max_examples=200, deadline=None)
@given(
    strings=st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    pieces=st.lists(st.text("abc", max_size=3), min_size=6, max_size=6),
    tokens=st.lists(st.integers(0, 6), max_size=10),
)
def test_the_stop_table_matches_where_the_text_contains_a_string(
    strings, pieces, tokens
):
    table = make_stop_table(strings, lambda: [p.encode() for p in pieces], 7)
    assert table is not None
    state, text = START, ""
    for token in tokens:
        state = table[token, state]
        text += pieces[token] if token < 6 else ""  # token 6 is beyond the tokenizer
        assert (state == MATCHED) == any(string in text for string in strings)


def test_empty_stop_strings_are_rejected():
    assert make_stop_table([], lambda: [], 5) is None
    with pytest.raises(InputError, match="empty"):
        make_stop_table(["x", ""], lambda: [b"x"], 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("temperature", float("inf")),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-7),
        ("repetition_penalty", 1e39),
        ("presence_penalty", float("nan")),
        ("presence_penalty", -1e31),
        ("frequency_penalty", float("inf")),
        ("frequency_penalty", 1e39),
    ],
)
def test_an_option_outside_its_range_is_named(field, value):
    with pytest.raises(InputError, match=re.escape(f"{field}={value} must be")):
        dataclasses.replace(Sampling(max_tokens=1), **{field: value})


@pytest.mark.parametrize("bias", [float("nan"), float("inf"), 1e39])
def test_a_bias_bans_a_token_or_moves_it(bias):
    with pytest.raises(InputError, match=re.escape(f"of token 3 is {bias};")):
        Sampling(max_tokens=1, logit_bias=((3, bias),))
    Sampling(max_tokens=1, logit_bias=((3, float("-inf")),))
