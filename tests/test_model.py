"""The decoder against transformers and against independent formulas."""

import dataclasses
import functools

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import close, padded, sequences, their_logits
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oreal_jax import model
from oreal_jax.checkpoints.families import from_hugging_face, to_hugging_face
from oreal_jax.checkpoints.published import PUBLISHED
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig, attention, functional, head
from oreal_jax.model.operations import rms_norm, rotary_angles

TINY = ModelConfig(
    vocab=50, embed=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=24, qkv_bias=True
)


def test_logits_equal_transformers_with_padding(pair):
    theirs, config, params = pair
    rows = sequences(config.vocab)
    tokens, positions, segments = map(jnp.asarray, padded(rows))
    states = model.hidden(config, params, tokens, positions, segments)
    ours = model.logits(config, params, states)
    for row, tokens in enumerate(rows):
        close(ours[row, : len(tokens)], their_logits(theirs, tokens))


def test_logits_equal_transformers_with_packing(pair):
    theirs, config, params = pair
    rows = sequences(config.vocab)
    join = lambda parts: jnp.asarray(np.concatenate(parts))[None]
    states = model.hidden(
        config,
        params,
        join(rows),
        join([np.arange(len(r)) for r in rows]),
        join([np.full(len(r), i + 1) for i, r in enumerate(rows)]),
    )
    ours = model.logits(config, params, states)[0]
    close(ours, np.concatenate([their_logits(theirs, tokens) for tokens in rows]))


def test_rope_frequencies_equal_transformers(pair):
    theirs, config, _ = pair
    kind = config.rope.kind
    ours, factor = config.rope.frequencies(config.head_dim)
    if kind == "default":
        expected, their_factor = theirs.model.rotary_emb.inv_freq, 1.0
    else:
        expected, their_factor = ROPE_INIT_FUNCTIONS[kind](theirs.config, "cpu")
    np.testing.assert_allclose(ours, expected.numpy(), rtol=1e-5)
    assert factor == pytest.approx(their_factor)


def halved(logits, targets):
    """Allow even tokens and the target, at temperature 0.7."""
    token = jnp.arange(logits.shape[-1])[None, None]
    allowed = (token % 2 == 0) | (token == targets[..., None])
    return jnp.where(allowed, logits / 0.7, -1e9)


@pytest.mark.parametrize("distribution", [model.full_softmax, halved])
@pytest.mark.parametrize("tied", [False, True])
def test_log_probs_in_chunks_equal_those_of_all_logits(monkeypatch, tied, distribution):
    """Log-probability and entropy, and their gradients by states and head."""
    monkeypatch.setattr(head, "HEAD_CHUNK", 12)
    config = dataclasses.replace(TINY, tied=tied)
    params = model.init(config, jax.random.key(0))
    states = jax.random.normal(jax.random.key(1), (3, 10, 16))
    targets = jax.random.randint(jax.random.key(2), (3, 10), 0, 50)
    grads = jax.random.normal(jax.random.key(3), (2, 3, 10))

    def chunked(params, states):
        return model.log_probs(config, params, states, targets, distribution)

    def at_once(params, states):
        scores = distribution(model.logits(config, params, states), targets)
        full = jax.nn.log_softmax(scores)
        chosen = jnp.take_along_axis(full, targets[..., None], -1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(full) * full, axis=-1)

    def with_gradient(function):
        values, pull_back = jax.vjp(function, params, states)
        return values, pull_back(tuple(grads))

    ours, expected = with_gradient(chunked), with_gradient(at_once)
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


def test_the_gradient_of_the_head_is_summed_in_float32(monkeypatch):
    """256 chunks of one token in bfloat16 against all tokens at once in float32."""
    params = model.init(TINY, jax.random.key(0))
    states = jax.random.normal(jax.random.key(1), (1, 256, 16))
    targets = jax.random.randint(jax.random.key(2), (1, 256), 0, 50)

    def gradient(dtype):
        def total(params):
            arguments = TINY, params, states.astype(dtype), targets
            return model.log_probs(*arguments)[0].sum()

        return jax.grad(total)(model.cast(params, dtype))["head"].astype(jnp.float32)

    expected = gradient(jnp.float32)
    monkeypatch.setattr(head, "HEAD_CHUNK", 1)
    error = jnp.linalg.norm(gradient(jnp.bfloat16) - expected)
    assert error < 0.005 * jnp.linalg.norm(expected)


def attend_densely(query, key, value, segments):
    """Attention with all scores at once."""
    B, S, H, K = query.shape
    key, value = (jnp.repeat(x, H // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / np.sqrt(K)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    visible = same & np.tri(S, dtype=bool)[None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


SEGMENTS = jnp.asarray([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24])


def random_heads():
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 24, 6, 8), (2, 24, 2, 8), (2, 24, 2, 8), (2, 24, 6, 8)]
    return [
        3 * jax.random.normal(key, shape)
        for key, shape in zip(keys, shapes, strict=True)
    ]


@pytest.mark.parametrize("block", [1, 5, 8, 12, 24])
def test_attention_in_blocks_and_its_gradient_equal_dense_attention(block):
    *heads, grad = random_heads()
    grad = grad * (SEGMENTS > 0)[..., None, None]

    def with_gradient(attend):
        total = lambda *heads: jnp.sum(attend(*heads, SEGMENTS) * grad)
        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*heads)

    in_blocks = functools.partial(attention.attend_packed, block=block)
    ours, expected = map(with_gradient, (in_blocks, attend_densely))
    for one, other in zip(
        jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("first", [0, 5, 16])
def test_attention_of_a_part_of_the_queries_equals_that_part_of_attention(first):
    query, key, value, _ = random_heads()
    part = slice(first, first + 8)
    ours = jax.jit(functools.partial(attention.attend_part, block=4))(
        query[:, part], key, value, SEGMENTS[:, part], SEGMENTS, first
    )
    expected = attend_densely(query, key, value, SEGMENTS)[:, part]
    where = SEGMENTS[:, part] > 0
    np.testing.assert_allclose(ours[where], expected[where], rtol=1e-4, atol=1e-4)


def test_attention_skips_blocks_of_keys_that_no_query_attends_to():
    query, key, value, _ = random_heads()
    segments = jnp.repeat(jnp.asarray([1, 2]), 12)[None].repeat(2, axis=0)
    hidden = lambda x: x.at[:, :12].set(jnp.nan)  # NaN spreads if it is read
    ours = attention.attend_packed(query, hidden(key), hidden(value), segments, block=4)
    expected = attend_densely(query, key, value, segments)
    np.testing.assert_allclose(ours[:, 12:], expected[:, 12:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 4, 16)])
def test_the_gradient_of_rms_norm_equals_that_of_its_formula(double, shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, grad = (jax.random.normal(key, shape, jnp.float32) for key in keys[:2])
    gain = jax.random.normal(keys[2], shape[-1:], jnp.float32)

    def formula(x, gain):
        x, gain = x.astype(jnp.float64), gain.astype(jnp.float64)
        root = jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
        return x / root * gain.reshape((1,) * (x.ndim - 1) + (-1,))

    ours, pull_back = jax.vjp(lambda x, gain: rms_norm(x, gain, 1e-3), x, gain)
    expected, pull_back_expected = jax.vjp(formula, x, gain)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    near(ours, expected)
    jax.tree.map(near, pull_back(grad), pull_back_expected(grad.astype(jnp.float64)))


def test_the_scan_over_layers_equals_a_loop():
    params = model.init(TINY, jax.random.key(0))
    tokens = jnp.arange(7)[None]
    ones = jnp.ones_like(tokens)
    scanned = model.hidden(TINY, params, tokens, tokens, ones)
    one = dataclasses.replace(TINY, layers=1)
    x = params["embedding"][tokens]
    for layer in range(TINY.layers):
        weights = jax.tree.map(lambda w, i=layer: w[i : i + 1], params["layers"])
        decoder = functional.bind(one, params | {"layers": weights})
        cosine, sine = rotary_angles(one, tokens)
        module = jax.tree.map(lambda w: w[0], decoder.layers)
        x, _, _ = module.forward(x, cosine, sine, ones, model.ONE_DEVICE)
    gain = params["final_norm"]
    expected = (
        x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain[None, None]
    )
    np.testing.assert_allclose(scanned, expected, rtol=1e-4, atol=1e-5)


def test_the_7b_config_has_as_many_parameters_as_qwen2_5_7b():
    config = PUBLISHED["Qwen/Qwen2.5-7B"]
    assert model.parameter_count(config) == 7_615_616_512
    states = jax.eval_shape(
        lambda params, x: model.hidden(config, params, x, x, x),
        model.abstract(config, jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 16_384), jnp.int32),
    )
    assert (states.shape, states.dtype) == ((2, 16_384, 3584), jnp.bfloat16)


def test_a_new_token_reward_model_has_the_body_of_the_policy_and_scores_zero():
    params = model.init(TINY, jax.random.key(0))
    config = dataclasses.replace(TINY, head="score")
    scoring = model.token_reward_params(params)
    assert jax.tree.structure(scoring) == jax.tree.structure(model.abstract(config))
    states = jax.random.normal(jax.random.key(1), (2, 5, 16))
    assert not jnp.any(model.token_scores(scoring, states))


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_config_written_by_us_reads_back_as_the_same_shape(name):
    fields = families.make(name).config.to_dict()
    config = from_hugging_face(fields, "theirs")
    again = from_hugging_face(to_hugging_face(config, "float32"), "ours")
    assert again == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "gemma"),
        ("hidden_act", "gelu"),
        ("mlp_bias", True),
        ("attention_bias", True),
        ("use_sliding_window", True),
        ("quantization_config", {"bits": 4}),
        ("layer_types", ["sliding_attention"]),
        ("num_hidden_layers", 0),
        ("hidden_size", 64.5),
        ("layer_types", 5),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1}),
        ("rope_parameters", {"rope_type": "linear", "factor": "x"}),
        ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
        ("rope_parameters", "yarn"),
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 2.0}),
    ],
)
def test_a_field_value_that_is_not_supported_is_named(field, value):
    fields = families.make("llama").config.to_dict() | {field: value}
    with pytest.raises(InputError) as caught:
        from_hugging_face(fields, "config.json")
    named = field if field != "rope_parameters" else ""
    assert named in str(caught.value) and "config.json" in str(caught.value)


def test_heads_that_do_not_divide_are_bad_input_with_both_numbers():
    with pytest.raises(InputError, match="heads=4.*kv_heads=3"):
        dataclasses.replace(TINY, kv_heads=3)
