"""Completions of the engine: tokens, log-probabilities, reports and errors."""

import dataclasses
import itertools
from typing import Any

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_engine import (
    CONFIG,
    MIXED,
    PENALTIES,
    PIECES,
    STOP,
    make_engine,
    make_requests,
    make_tiny_mesh,
    sample,
    tokens_of,
)

from oreal_jax import model
from oreal_jax.checkpoints import hf
from oreal_jax.errors import Diverged, Failure, InputError
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.sampling import (
    Engine,
    Request,
    Sampling,
    make_stop_table,
    sampling_distribution,
)

STOP_STRINGS = ["cab", "dd"]


def test_a_completion_ends_with_its_stop_token_or_at_the_limit(completions):
    reasons = set()
    for completion in (c for group in completions for c in group):
        reasons.add(completion.finish_reason)
        assert STOP not in completion.tokens[:-1]
        if completion.finish_reason == "stop":
            assert completion.tokens[-1] == STOP
        else:
            assert len(completion.tokens) == 90 and completion.tokens[-1] != STOP
        assert len(completion.log_probs) == len(completion.tokens)
    assert reasons == {"stop", "length"}


def test_log_probs_are_those_of_the_full_forward_pass(params, prompts, completions):
    for prompt, group in zip(prompts, completions, strict=True):
        for completion in group:
            sequence = [*prompt, *completion.tokens]
            tokens = jnp.asarray(sequence)[None]
            positions = jnp.arange(len(sequence))[None]
            ones = jnp.ones_like(tokens)
            states = model.hidden(CONFIG, params, tokens, positions, ones)
            start, end = len(prompt) - 1, len(sequence) - 1
            expected, _ = model.log_probs(
                CONFIG, params, states[:, start:end], tokens[:, start + 1 :]
            )
            np.testing.assert_allclose(
                completion.log_probs, expected[0], rtol=1e-4, atol=1e-4
            )
        break  # one compilation per length; one group tells


def test_a_completion_that_can_never_fit_the_cache_is_rejected(params, prompts):
    with pytest.raises(InputError, match="max_tokens=90 does not fit cache_tokens=128"):
        sample(params, prompts, cache_tokens=128)


def test_finished_completions_are_reported_one_by_one(params, prompts, completions):
    reported = {}
    engine = make_engine(rows=4)
    engine.sample(
        engine.weights(params),
        make_requests(prompts),
        3,
        on_finished=lambda n, k, completion: reported.setdefault((n, k), completion),
    )
    assert sorted(reported) == [(n, k) for n in range(len(prompts)) for k in range(3)]
    for (n, k), completion in reported.items():
        assert completion.tokens == completions[n][k].tokens


def test_statistics_count_every_prompt_once_and_every_token(params, prompts):
    engine = make_engine(rows=4)
    completions = engine.sample(engine.weights(params), make_requests(prompts), 3)
    statistics = engine.statistics
    assert statistics.prompt_tokens == sum(len(prompt) - 1 for prompt in prompts)
    assert statistics.new_tokens == sum(
        len(c.tokens) for group in completions for c in group
    )
    assert 0.8 < statistics.occupancy <= 1 and statistics.swap_outs == 0
    assert statistics.metrics()["perf/decode_throughput"] > 0


def test_samples_seeds_steps_and_copies_of_a_prompt_differ(
    params, prompts, completions
):
    first = tokens_of(completions)[0]
    assert len({tuple(tokens) for tokens in first}) == 3
    others = [
        sample(params, prompts[:1], seed=2),
        sample(params, prompts[:1], step=1),
        sample(params, prompts[:1], first_sample=3),
    ]
    for other in others:
        assert tokens_of(other)[0] != first


def test_samples_of_a_copy_continue_those_of_the_first(params, prompts):
    six = sample(params, prompts[:1], samples=6)
    copy = sample(params, prompts[:1], first_sample=3)
    assert tokens_of(copy)[0] == tokens_of(six)[0][3:]


def test_zero_samples_give_no_completions(params, prompts):
    assert sample(params, prompts, samples=0) == [[]] * len(prompts)


@pytest.mark.parametrize("prompt", [[], [1] * 200])
def test_a_prompt_that_cannot_be_completed_is_rejected(params, prompt):
    with pytest.raises(InputError, match=f"prompt of {len(prompt)} tokens.*256"):
        sample(params, [prompt])


def test_progress_counts_every_token_and_completion_once(params, prompts, completions):
    counts = []
    engine = make_engine(rows=8)
    engine.sample(
        engine.weights(params),
        make_requests(prompts),
        3,
        on_progress=lambda *progress: counts.append(progress),
    )
    total = sum(len(c.tokens) for group in completions for c in group)
    assert [sum(values) for values in zip(*counts, strict=True)] == [total, 15]


@pytest.mark.parametrize("penalty", [1.0, pytest.param(1.3, marks=pytest.mark.slow)])
def test_greedy_equals_transformers_on_64_prompts(tmp_path, penalty):
    theirs = families.write("qwen2.5-untied", tmp_path)
    config = hf.read_config(tmp_path)
    mesh = make_mesh(MeshShape(), config, jax.devices()[:1])
    sampling = Sampling(max_tokens=20, temperature=0.0, repetition_penalty=penalty)
    engine = Engine(config, mesh, [2], rows=16)
    generator = np.random.default_rng(0)
    prompts = [generator.integers(3, 96, 1 + n % 13).tolist() for n in range(64)]
    requests = [Request(prompt, sampling, i) for i, prompt in enumerate(prompts)]
    ours = engine.sample(engine.weights(hf.load(tmp_path)), requests, 1)
    for length in {len(prompt) for prompt in prompts}:  # nothing is padded
        places = [n for n, prompt in enumerate(prompts) if len(prompt) == length]
        batch = torch.tensor([prompts[n] for n in places])
        with torch.no_grad():
            rows = theirs.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=20,
                do_sample=False,
                repetition_penalty=penalty,
                eos_token_id=2,
                pad_token_id=0,
            )[:, length:].tolist()
        for n, row in zip(places, rows, strict=True):
            end = row.index(2) + 1 if 2 in row else 20
            assert ours[n][0].tokens == row[:end]


@jax.jit
def full_logits(params, tokens):
    positions = jnp.arange(tokens.shape[1])[None]
    states = model.hidden(CONFIG, params, tokens, positions, jnp.ones_like(tokens))
    return model.logits(CONFIG, params, states)


def test_penalties_apply_to_each_slots_own_tokens(params, prompts):
    """Token by token against the full forward pass.

    Slots are reused: the tokens of one sequence must not reach the next.
    """
    how: dict[str, Any] = {"temperature": 0.0, "top_p": 1.0, "max_tokens": 12}
    completions = sample(params, prompts, 1, rows=2, **how, **PENALTIES)
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        sequence = list(prompt)
        for token in completion.tokens:
            padded = sequence + [0] * (48 - len(sequence))
            logits = full_logits(params, jnp.asarray([padded]))[0, len(sequence) - 1]
            in_prompt = np.isin(np.arange(64), prompt)
            counts = np.bincount(sequence[len(prompt) :], minlength=64)
            factor = np.where(logits > 0, 1 / 1.4, 1.4)
            logits = np.where(in_prompt | (counts > 0), logits * factor, logits)
            logits = logits - 0.3 * (counts > 0) - 0.2 * counts
            assert token == logits.argmax()
            sequence.append(token)


def test_a_banned_token_is_never_sampled(params, prompts, completions):
    usual = {t for group in completions for c in group for t in c.tokens}
    banned = max(usual - {STOP})
    again = sample(params, prompts, logit_bias=((banned, -1e9),))
    assert banned not in {t for group in again for c in group for t in c.tokens}
    without = sample(params, prompts, logit_bias=((banned, 0.0),))
    assert tokens_of(without) == tokens_of(completions)


def test_tokens_outside_the_vocabulary_are_rejected(params):
    with pytest.raises(InputError, match="logit_bias: no token 64, the model has 64"):
        sample(params, [[1]], logit_bias=((64, 1.0),))
    with pytest.raises(InputError, match="bans all 64 tokens of the vocabulary"):
        sample(params, [[1]], logit_bias=tuple((t, -np.inf) for t in range(64)))
    for token in (70, -1):
        with pytest.raises(
            InputError, match=f"stop tokens: no token {token}, the model"
        ):
            Engine(CONFIG, make_tiny_mesh(), [STOP, token])
    with pytest.raises(InputError, match="prompt: no token 64, the model has 64"):
        sample(params, [[1, 64]])
    with pytest.raises(InputError, match="no token -1"):
        Sampling(max_tokens=1, logit_bias=((-1, 1.0),))


@pytest.mark.parametrize("option", [{}, {"weights": "int8"}, {"cache": "float8"}])
def test_a_non_finite_weight_is_named(params, option):
    attention = params["layers"]["attention"]
    key = attention["key"].at[1, 2, 0, 3].set(jnp.nan)
    broken = params["layers"] | {"attention": attention | {"key": key}}
    named = "1 weight arrays are not finite; the first is layers/1/attention/key"
    with pytest.raises(Diverged, match=named):
        sample(params | {"layers": broken}, [[1, 2]], 1, max_tokens=5, **option)


def test_a_completion_ends_at_a_token_without_a_probability(params, monkeypatch):
    """It is not decoded to its limit before the error is raised."""
    check = "oreal_jax.sampling.engine._has_probabilities"
    monkeypatch.setattr(check, lambda completion: True)
    broken = params | {"final_norm": params["final_norm"] * jnp.nan}
    ((completion,),) = sample(broken, [[1, 2]], 1, max_tokens=5)
    assert len(completion.tokens) == 1 and not np.isfinite(completion.log_probs[0])


def test_decoding_that_overflows_does_not_blame_the_weights(params):
    large = params | {"final_norm": params["final_norm"] * 1e38}
    large["head"] = large["head"] * 10.0
    with pytest.raises(Failure, match="are finite: decoding in float32, weights='full"):
        sample(large, [[1, 2]], 1, max_tokens=5)


def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(
    params, prompts, completions
):
    """Strings begin in one token and end in another."""
    decode = lambda tokens: b"".join(PIECES[t] for t in tokens).decode()
    table = make_stop_table(STOP_STRINGS, lambda: PIECES, 64)
    again = sample(params, prompts, stop_table=table, rows=4)
    ended = 0
    for before, after in zip(completions, again, strict=True):
        for whole, short in zip(before, after, strict=True):
            assert whole.tokens[: len(short.tokens)] == short.tokens
            assert not any(s in decode(short.tokens[:-1]) for s in STOP_STRINGS)
            if any(s in decode(short.tokens) for s in STOP_STRINGS):
                ended += 1
                assert short.finish_reason == "stop"
            else:
                assert short.tokens == whole.tokens
    assert ended > 3


def log_probs_of(params, prompt, completion, distribution=model.full_softmax):
    """Return the trainer's log-probabilities and entropies of a completion."""
    tokens = jnp.asarray([[*prompt, *completion.tokens]])
    positions = jnp.arange(tokens.shape[1])[None]
    states = model.hidden(CONFIG, params, tokens, positions, jnp.ones_like(tokens))
    states, targets = states[:, len(prompt) - 1 : -1], tokens[:, len(prompt) :]
    return model.log_probs(CONFIG, params, states, targets, distribution)


def test_the_trainer_computes_the_sampled_log_probs_of_a_completion(params, prompts):
    sampling = Sampling(max_tokens=20, temperature=0.8, top_p=0.7)
    how = dataclasses.asdict(sampling)
    ((completion,),) = sample(params, prompts[:1], 1, seed=3, renormalise=True, **how)
    log_probs, entropy = log_probs_of(
        params, prompts[0], completion, sampling_distribution(sampling)
    )
    assert completion.sampled_log_probs is not None
    np.testing.assert_allclose(
        completion.sampled_log_probs, log_probs[0], rtol=1e-3, atol=1e-4
    )
    assert sample(params, prompts[:1], 1, **how)[0][0].sampled_log_probs is None
    assert jnp.all(entropy >= 0) and jnp.all(entropy < jnp.log(CONFIG.vocab))


REAL = 60  # tokens of a tokenizer; the other rows of the head are padding


@pytest.fixture(scope="module")
def padded(params):
    """Return weights whose padded rows are likelier than most tokens."""
    head = params["head"].at[:, REAL:].multiply(2)
    return params | {"head": head}


def sample_mixed(params, prompts, banned=(), **engine_options):
    """Return completions of requests that differ in everything, some tokens banned."""
    requests = []
    for key, options in enumerate(MIXED):
        bias = options.get("logit_bias", ())
        bias += tuple((token, float("-inf")) for token in banned)
        own = options | {"logit_bias": bias}
        requests += make_requests([prompts[key]], keys=[key], **own)
    engine = make_engine(rows=8, **engine_options)
    groups = engine.sample(engine.weights(params), requests, 2, renormalise=True)
    return [completion for group in groups for completion in group]


def both_log_probs(completion) -> np.ndarray:
    """Return a completion's log-probabilities, full and as sampled."""
    return np.array([completion.log_probs, completion.sampled_log_probs])


def test_padded_rows_are_sampled_as_if_banned(padded, prompts):
    ours = sample_mixed(padded, prompts, real_tokens=REAL)
    banned = sample_mixed(padded, prompts, range(REAL, CONFIG.vocab))
    for x, y in zip(ours, banned, strict=True):
        assert x.tokens == y.tokens
        np.testing.assert_allclose(both_log_probs(x), both_log_probs(y), atol=1e-5)
    unbanned = sample_mixed(padded, prompts)
    assert max(token for c in unbanned for token in c.tokens) >= REAL


def test_the_trainer_agrees_with_the_sampler_about_padded_rows(padded, prompts):
    sampling = Sampling(max_tokens=20, temperature=0.8, top_p=0.7)
    how = dataclasses.asdict(sampling) | {"real_tokens": REAL, "renormalise": True}
    ((completion,),) = sample(padded, prompts[:1], 1, seed=3, **how)
    distributions = model.full_softmax, sampling_distribution(sampling, REAL)
    for ours, distribution in zip(
        both_log_probs(completion), distributions, strict=True
    ):
        theirs, entropy = log_probs_of(padded, prompts[0], completion, distribution)
        np.testing.assert_allclose(ours, theirs[0], rtol=1e-3, atol=1e-4)
        assert jnp.isfinite(entropy).all()


def test_rows_that_all_are_tokens_change_no_number(params, prompts, completions):
    same = sample(params, prompts, real_tokens=CONFIG.vocab)
    for ours, expected in zip(
        itertools.chain(*same), itertools.chain(*completions), strict=True
    ):
        assert ours.tokens == expected.tokens
        assert ours.log_probs.tobytes() == expected.log_probs.tobytes()


def test_a_ban_of_all_tokens_but_padded_rows_is_rejected():
    engine = make_engine(real_tokens=REAL)
    bans = tuple((token, float("-inf")) for token in range(REAL))
    with pytest.raises(InputError, match="bans all 60 tokens"):
        engine.check_sampling(Sampling(max_tokens=1, logit_bias=bans))
