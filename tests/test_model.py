"""The decoder against transformers, and against itself by other routes."""

import dataclasses

import families
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import close, padded, sequences, their_logits
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oreal_jax import model
from oreal_jax.errors import BadInput
from oreal_jax.model import ModelConfig, attention
from oreal_jax.model.decoder import angles
from oreal_jax.model.families import from_hugging_face, to_hugging_face

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


def test_log_probs_in_chunks_equal_those_of_whole_logits(monkeypatch):
    monkeypatch.setattr(model, "HEAD_CHUNK", 12)
    params = model.init(TINY, jax.random.key(0))
    states = jax.random.normal(jax.random.key(1), (3, 10, 16))
    targets = jax.random.randint(jax.random.key(2), (3, 10), 0, 50)

    def chunked(states):
        log_probs, entropy = model.log_probs(TINY, params, states, targets)
        return log_probs, entropy

    def whole(states):
        full = jax.nn.log_softmax(model.logits(TINY, params, states))
        chosen = jnp.take_along_axis(full, targets[..., None], -1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(full) * full, axis=-1)

    for ours, expected in zip(chunked(states), whole(states), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    total = lambda function: lambda states: jnp.sum(function(states)[0])
    np.testing.assert_allclose(
        jax.grad(total(chunked))(states), jax.grad(total(whole))(states), atol=1e-6
    )


@pytest.mark.parametrize("block", [5, 8, 12])
def test_attention_in_blocks_of_queries_changes_nothing(monkeypatch, block):
    params = model.init(TINY, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 50)
    segments = jnp.asarray([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24])
    positions = jnp.asarray([[*range(9), *range(12), *range(3)], [*range(24)]])

    def total(params):
        states = model.hidden(TINY, params, tokens, positions, segments)
        return jnp.sum(jnp.sin(states) * (segments > 0)[..., None])

    whole = jax.value_and_grad(total)(params)
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    for ours, expected in zip(
        jax.tree.leaves(jax.value_and_grad(total)(params)),
        jax.tree.leaves(whole),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_scan_over_layers_equals_a_loop():
    params = model.init(TINY, jax.random.key(0))
    tokens = jnp.arange(7)[None]
    ones = jnp.ones_like(tokens)
    whole = model.hidden(TINY, params, tokens, tokens, ones)
    one = dataclasses.replace(TINY, layers=1)
    x = params["embedding"][tokens]
    for layer in range(TINY.layers):
        weights = jax.tree.map(lambda w, i=layer: w[i : i + 1], params["layers"])
        # The stream before the final norm: a huge epsilon would hide it, so take the
        # layer's own function through a one-layer model without embedding.
        decoder = model._bound(one, params | {"layers": weights})
        cosine, sine = angles(one, tokens)
        only = jax.tree.map(lambda w: w[0], decoder.layers)
        x, _, _ = only.packed(x, cosine, sine, ones, model.ALONE)
    gain = params["final_norm"]
    expected = (
        x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * gain[None, None]
    )
    np.testing.assert_allclose(whole, expected, rtol=1e-4, atol=1e-5)


def test_the_7b_shape_has_the_parameters_of_qwen2_5_7b():
    config = ModelConfig(
        vocab=152_064,
        embed=3584,
        layers=28,
        heads=28,
        kv_heads=4,
        head_dim=128,
        mlp=18_944,
        qkv_bias=True,
    )
    assert model.parameter_count(config) == 7_615_616_512
    states = jax.eval_shape(
        lambda params, x: model.hidden(config, params, x, x, x),
        model.abstract(config, jnp.bfloat16),
        jax.ShapeDtypeStruct((2, 16_384), jnp.int32),
    )
    assert (states.shape, states.dtype) == ((2, 16_384, 3584), jnp.bfloat16)


def test_a_token_reward_model_starts_with_the_policys_body_and_scores_zero():
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
        ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_parameters", {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}),
        ("rope_parameters", {"rope_type": "llama3", "factor": 2.0}),
    ],
)
def test_a_field_value_that_is_not_supported_is_named(field, value):
    fields = families.make("llama").config.to_dict() | {field: value}
    with pytest.raises(BadInput) as caught:
        from_hugging_face(fields, "config.json")
    named = field if field != "rope_parameters" else "rope_type"
    assert named in str(caught.value) and "config.json" in str(caught.value)


def test_heads_that_do_not_divide_are_refused_with_both_numbers():
    with pytest.raises(BadInput, match="heads=4.*kv_heads=3"):
        dataclasses.replace(TINY, kv_heads=3)
