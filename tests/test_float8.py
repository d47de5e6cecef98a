"""A cache in e4m3: keys and values of any size, scales that change no logit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_decoding import TINY, log_prob_error, prefilled

from oreal_jax import model
from oreal_jax.model import Rope, decoding, float8
from oreal_jax.model.cache import Pages
from oreal_jax.model.kernels import GpuPages, TpuPages

E4M3 = jnp.float8_e4m3fn
CONFIG = dataclasses.replace(TINY, head_dim=16, layers=2)
YARN = Rope(kind="yarn", theta=1e4, factor=4.0, original_max_length=64)


@functools.partial(jax.jit, static_argnums=(0, 2))
def logits(config, params, dtype=jnp.float32):
    """Logits of four tokens of three sequences after prompts of six tokens."""
    weights = decoding.lay_out(config, params, jnp.float32)
    tokens = jax.random.randint(jax.random.key(2), (3, 10), 0, config.vocab)
    cache, table = prefilled(config, weights, tokens[:, :6], [6] * 3, 4, dtype)

    def one(cache, t):
        logits, cache = decoding.decode(
            config, weights, tokens[:, t], jnp.full(3, t), cache, table
        )
        return cache, logits

    return jax.lax.scan(one, cache, jnp.arange(6, 10))[1]


def random_params(config) -> model.Params:
    """Weights with norms and biases other than their initial ones and zeros."""
    keys = iter(jax.random.split(jax.random.key(1), 100))
    move = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape)
    return jax.tree.map(move, model.init(config, jax.random.key(0)))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        decoding.repeat_kv_heads(CONFIG, 4),
        dataclasses.replace(CONFIG, qkv_bias=False, qk_norm=True),
        dataclasses.replace(CONFIG, rope=YARN),
    ],
    ids=["biases", "more-devices-than-heads", "normalised-heads", "yarn"],
)
def test_scales_change_no_bit_of_a_logit(config):
    """They are powers of two and cancel in every score and every output."""
    params = random_params(dataclasses.replace(config, kv_heads=2))
    fitted = float8.fold_scales(config, params)
    np.testing.assert_array_equal(logits(config, params), logits(config, fitted))
    assert np.any(logits(config, params, E4M3) != logits(config, fitted, E4M3))


@pytest.mark.parametrize(("plane", "limit"), [(1, 0.1), (7, 0.005)])
@pytest.mark.parametrize("size", [500.0, 5000.0])
def test_large_keys_change_probabilities_little(size, plane, limit):
    """One channel of one head is large, as in Qwen2.5's keys.

    The error is smaller in the slowest plane, where the keys of all tokens round alike.
    """
    params = random_params(CONFIG)
    attention = params["layers"]["attention"]
    attention["key_bias"] = attention["key_bias"].at[1, 0, plane].set(size)
    narrow = logits(CONFIG, float8.fold_scales(CONFIG, params), E4M3)
    assert 0 < log_prob_error(narrow, logits(CONFIG, params)) < limit


def test_the_worst_text_reaches_the_bound_but_not_the_maximum_of_e4m3():
    """An embedding along a column (times the gain) maximises its channel.

    Its value in the cache is between half of the limit and the limit.
    """
    G, K = CONFIG.kv_heads, CONFIG.head_dim
    config = dataclasses.replace(CONFIG, vocab=2 * G * K, layers=1, norm_epsilon=1e-12)
    params = model.init(config, jax.random.key(0))
    layers = params["layers"]
    random = np.random.default_rng(0)
    gain = random.lognormal(0, 2, config.embed).astype(np.float32)
    layers["attention_norm"] = jnp.asarray(gain)[None]
    columns = []
    for name in ("key", "value"):
        bias = random.normal(0, 300, (1, G, K)).astype(np.float32)
        layers["attention"][f"{name}_bias"] = jnp.asarray(bias)
        along = gain[:, None, None] * layers["attention"][name][0] * np.sign(bias)
        columns.append(np.asarray(along).reshape(config.embed, -1).T)
    params["embedding"] = jnp.asarray(np.concatenate(columns))
    weights = decoding.lay_out(config, float8.fold_scales(config, params), jnp.float32)
    tokens = jnp.arange(config.vocab)[:, None]  # one per sequence, at position 0
    lengths = [1] * config.vocab
    (pages,), table = prefilled(config, weights, tokens, lengths, pages=1)
    assert isinstance(pages, Pages)
    keys = np.abs(pages.keys[table[:, 0], :, :, 0]).reshape(config.vocab, -1)
    values = np.abs(pages.values[table[:, 0], :, 0]).reshape(config.vocab, -1)
    limit = float8.LIMIT * (1 + 1e-5)
    assert keys.max() <= limit and values.max() <= limit
    reached = np.diag(values[G * K :])
    assert np.all((reached > 0.499 * limit) & (reached == values.max(axis=0)))
    # A key's bound is that of its plane: of both channels together.
    planes = np.diag(keys).reshape(G, 2, K // 2)
    assert np.all(np.hypot(planes[:, 0], planes[:, 1]) > 0.499 * limit)


@pytest.mark.parametrize("form", [Pages, TpuPages, GpuPages])
def test_values_beyond_the_range_saturate_and_nan_stays_nan(form):
    pages = form.empty(3, 4, 2, 16, E4M3)
    table = jnp.asarray([[1, 2]])
    shape = (1, 4, 2, 16)
    plain = jnp.ones(shape)
    pages = pages.write_prompts(table[:, :1], 1e4 * plain, -500 * plain)
    token = jnp.ones((1, 2, 16))
    pages = pages.write(table, jnp.asarray([4]), jnp.inf * token, jnp.nan * token)
    stored = np.concatenate([np.ravel(x.astype(jnp.float32)) for x in pages])
    sizes, counts = np.unique(stored, return_counts=True)
    found = dict(zip(sizes.tolist(), counts.tolist(), strict=True))
    one = 2 * 16  # elements per token, of keys or of values
    assert found.pop(448.0) == 5 * one and found.pop(-448.0) == 4 * one
    assert np.isnan(stored).sum() == one
    assert found.pop(0.0) == stored.size - 10 * one


def test_dead_weights_have_finite_scales():
    params = jax.tree.map(jnp.zeros_like, model.init(CONFIG, jax.random.key(0)))
    fitted = jax.tree.leaves(float8.fold_scales(CONFIG, params))
    assert not any(np.any(x) for x in fitted)
    small = jax.tree.map(lambda x: x + 1e-38, params)
    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(float8.fold_scales(CONFIG, small))
    )
