"""Decoding with a paged cache against transformers, all kernels against a loop."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import LENGTHS, close, padded, sequences, their_logits
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ref_ragged_paged_attention,
)
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from oreal_jax import model
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig, decoding
from oreal_jax.model.cache import Pages
from oreal_jax.model.kernels import GpuPages, TpuPages, choose_pages

TINY = ModelConfig(
    vocab=50, embed=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp=24, qkv_bias=True
)
SIZE = 4  # tokens per page


def prefilled(config, weights, tokens, lengths, pages: int = 8, dtype=jnp.float32):
    """Return a cache with these prompts, and the table of pages of each sequence."""
    rows = len(lengths)
    numbers = np.random.default_rng(0).permutation(rows * pages) + 1
    table = jnp.asarray(numbers.reshape(rows, pages))
    page = Pages.empty(rows * pages + 1, SIZE, config.kv_heads, config.head_dim, dtype)
    S = -(-tokens.shape[1] // SIZE) * SIZE
    tokens = jnp.pad(tokens, ((0, 0), (0, S - tokens.shape[1])))
    cache = decoding.prefill(
        config,
        weights,
        tokens,
        jnp.asarray(lengths),
        (page,) * config.layers,
        table[:, : S // SIZE],
    )
    return cache, table


def logits_after(config, weights, prompt: int = 6, dtype=jnp.float32):
    """Logits of every token of `sequences` after its prompt, token by token."""
    tokens, positions, _ = map(jnp.asarray, padded(sequences(config.vocab)))
    lengths = [prompt] * len(LENGTHS)
    cache, table = prefilled(config, weights, tokens[:, :prompt], lengths, dtype=dtype)
    decode = jax.jit(
        lambda tokens, positions, cache: decoding.decode(
            config, weights, tokens, positions, cache, table
        )
    )
    parts = []
    for t in range(prompt, tokens.shape[1]):
        logits, cache = decode(tokens[:, t], positions[:, t], cache)
        parts.append(logits)
    return jnp.stack(parts, axis=1)


def test_logits_with_a_cache_equal_transformers(pair):
    theirs, config, params = pair
    ours = logits_after(config, decoding.lay_out(config, params, jnp.float32))
    for row, sequence in enumerate(sequences(config.vocab)):
        size = len(sequence) - 6
        close(ours[row, :size], their_logits(theirs, sequence)[6:])


def test_repeated_key_value_heads_change_no_logit(pair):
    """With more devices on the tensor axis than heads, each has a copy of one."""
    _, config, params = pair
    repeated = decoding.repeat_kv_heads(config, 4)
    assert (config.kv_heads, repeated.kv_heads) == (2, 4)
    assert decoding.repeat_kv_heads(config, 2) == config
    ours = logits_after(repeated, decoding.lay_out(repeated, params, jnp.float32))
    close(ours, logits_after(config, decoding.lay_out(config, params, jnp.float32)))


def test_sequences_of_a_decoding_batch_may_be_at_different_positions():
    params = model.init(TINY, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 50)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    states = model.hidden(TINY, params, tokens, positions, jnp.ones_like(tokens))
    expected = model.logits(TINY, params, states)
    weights = decoding.lay_out(TINY, params, jnp.float32)
    cache, table = prefilled(TINY, weights, tokens[:, :8], [8, 8])
    at = jnp.asarray([8, 5])  # the second sequence is back at position 5
    chosen = jnp.take_along_axis(tokens, at[:, None], axis=1)[:, 0]
    logits, _ = decoding.decode(TINY, weights, chosen, at, cache, table)
    np.testing.assert_allclose(logits[0], expected[0, 8], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[1], expected[1, 5], rtol=1e-4, atol=1e-5)


def log_prob_error(ours, theirs) -> float:
    """Mean difference of log-probabilities over the vocabulary."""
    return float(jnp.abs(jax.nn.log_softmax(ours) - jax.nn.log_softmax(theirs)).mean())


def test_int8_quantizes_every_matrix_with_a_small_error():
    params = model.init(TINY, jax.random.key(0))
    quantized = decoding.lay_out(TINY, params, jnp.float32, int8=True)
    dense = jax.tree.map(
        lambda w: w.dense(jnp.float32) if isinstance(w, decoding.Quantized) else w,
        quantized,
        is_leaf=lambda w: isinstance(w, decoding.Quantized),
    )
    exact = decoding.lay_out(TINY, params, jnp.float32)
    for ours, weight in zip(
        jax.tree.leaves(dense), jax.tree.leaves(exact), strict=True
    ):
        np.testing.assert_allclose(ours, weight, atol=np.abs(weight).max() / 127 / 1.9)
    matrices = [w for w in jax.tree.leaves(quantized) if w.dtype == jnp.int8]
    assert len(matrices) == 7 * TINY.layers + 2
    error = log_prob_error(logits_after(TINY, quantized), logits_after(TINY, exact))
    assert 0 < error < 0.01


def test_scales_of_int8_weights_have_the_axes_of_their_outputs():
    names = decoding.axes(TINY, int8=True)
    attention = names["layers"][0]["attention"]
    assert attention["query"].values == ("embed", "heads", "head_dim")
    assert attention["query"].scale == (None, "heads", "head_dim")
    assert attention["output"].scale == (None, None, "embed")
    assert names["layers"][0]["mlp"]["down"].scale == (None, "embed")
    assert names["embedding"].scale == ("vocab", None)


def dense_attention(query, keys, values, lengths) -> np.ndarray:
    """Attention sequence by sequence and head by head, in float64."""
    B, H, K = query.shape
    out = np.zeros((B, H, K))
    for b in range(B):
        for h in range(H):
            g = h * keys.shape[2] // H
            scores = keys[b, : lengths[b], g] @ query[b, h] * K**-0.5
            weights = np.exp(scores - scores.max())
            out[b, h] = weights @ values[b, : lengths[b], g] / weights.sum()
    return out


def in_interpreter(pages):
    """Return `pages.attend` as it runs on a CPU."""
    if isinstance(pages, GpuPages):
        return functools.partial(pages.attend, interpret=True)
    return pages.attend


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("form", [Pages, TpuPages, GpuPages])
def test_all_kernels_attend_alike(monkeypatch, form, dtype):
    """Prompts, then single tokens, then a copied page, against a loop.

    No interpreter runs the TPU kernel: its authors' reference implementation replaces
    it.
    """
    package, _, _ = ref_ragged_paged_attention.__module__.rpartition(".")
    package = importlib.import_module(package)
    monkeypatch.setattr(package, "ragged_paged_attention", reference_kernel)
    B, H, G, K, M, size = 3, 8, 4, 128, 4, 16
    draw = np.random.default_rng(0)
    rounded = lambda *shape: np.asarray(
        jnp.asarray(draw.normal(size=shape), dtype).astype(jnp.float32)
    )
    lengths = np.array([37, 1, 64])
    keys, values = rounded(B, M * size, G, K), rounded(B, M * size, G, K)
    query = draw.normal(size=(B, H, K)).astype(np.float32)
    table = jnp.asarray(1 + draw.permutation(B * M).reshape(B, M), jnp.int32)
    pages = form.empty(B * M + 2, size, G, K, dtype)
    start = 2 * size
    pages = pages.write_prompts(
        table[:, :2], jnp.asarray(keys[:, :start]), jnp.asarray(values[:, :start])
    )
    for t in range(start, M * size):
        new = jnp.asarray(keys[:, t]), jnp.asarray(values[:, t])
        pages = pages.write(table, jnp.full(B, t), *new)
    spare = jnp.asarray([B * M + 1])  # the second page of sequence 0 moves there
    pages = jax.tree.map(lambda x: x.at[spare].set(x[table[0, 1]][None]), pages)
    table = table.at[0, 1].set(spare[0])
    attend = in_interpreter(pages)
    ours = attend(jnp.asarray(query), table, jnp.asarray(lengths, jnp.int32))
    expected = dense_attention(query, keys, values, lengths)
    rounding = 1e-2 if ours.dtype == jnp.bfloat16 or dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(ours, expected, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("size", [4, 32])  # 8 pages and one page per sequence
@pytest.mark.parametrize("order", ["longest first", "shortest first", "mixed"])
def test_the_order_of_sequences_does_not_change_their_attention(order, size):
    """The halves of a batch skip pages that none of their sequences has."""
    B, H, G, K, M = 40, 4, 2, 16, 32 // size
    draw = np.random.default_rng(0)
    lengths = np.sort(draw.integers(1, M * size, B))
    lengths = {"longest first": lengths[::-1], "shortest first": lengths}.get(
        order, draw.permutation(lengths)
    )
    table = jnp.asarray(1 + draw.permutation(B * M).reshape(B, M), jnp.int32)
    keys, values = draw.normal(size=(2, B, M * size, G, K)).astype(np.float32)
    query = draw.normal(size=(B, H, K)).astype(np.float32)
    pages = Pages.empty(B * M + 1, size, G, K, jnp.float32)
    pages = pages.write_prompts(table, jnp.asarray(keys), jnp.asarray(values))
    ours = pages.attend(jnp.asarray(query), table, jnp.asarray(lengths, jnp.int32))
    expected = dense_attention(query, keys, values, lengths)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_single_page_is_read_once():
    """The halves of the batch do not read it again."""
    B, H, G, K, size = 64, 4, 2, 16, 8
    pages = Pages.empty(B + 1, size, G, K, jnp.float32)
    query, ones = jnp.zeros((B, H, K)), jnp.ones(B, jnp.int32)
    program = jax.jit(Pages.attend).lower(pages, query, ones[:, None], ones).compile()
    text = program.as_text()
    assert text and text.count(" gather(") == 2  # keys and values


def reference_kernel(query, pages, lengths, table, starts, rows, **options):
    sizes = ("num_kv_pages_per_block", "num_queries_per_block")
    options = {name: x for name, x in options.items() if name not in sizes}
    return ref_ragged_paged_attention(
        query, pages, lengths, table, starts, rows, **options
    )


def test_the_gpu_kernel_lowers_to_triton():
    page = GpuPages.empty(9, 64, 4, 128, jnp.bfloat16)
    arguments = (
        jnp.zeros((2, 28, 128), jnp.bfloat16),
        jnp.ones((2, 4), jnp.int32),
        jnp.ones(2, jnp.int32),
    )
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(GpuPages.attend).trace(page, *arguments)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("backend", "heads", "size", "dtype", "form"),
    [
        ("tpu", 1, 128, jnp.bfloat16, TpuPages),
        ("tpu", 2, 128, jnp.float8_e4m3fn, TpuPages),
        ("tpu", 3, 128, jnp.bfloat16, Pages),
        ("tpu", 3, 128, jnp.float8_e4m3fn, Pages),
        ("tpu", 4, 64, jnp.bfloat16, Pages),
        ("gpu", 3, 128, jnp.bfloat16, GpuPages),
        ("gpu", 4, 96, jnp.bfloat16, Pages),
        ("cpu", 4, 128, jnp.bfloat16, Pages),
    ],
)
def test_a_backend_decodes_with_its_kernel_for_shapes_that_this_supports(
    backend, heads, size, dtype, form
):
    assert choose_pages(backend, heads, size, dtype) is form
    if form is TpuPages:  # the kernel checks shapes when it is traced
        page = form.empty(9, 64, heads, size, dtype)
        query = jnp.zeros((2, 4 * heads, size), jnp.bfloat16)
        jax.eval_shape(
            form.attend, page, query, jnp.ones((2, 4), int), jnp.ones(2, int)
        )


def test_a_float8_cache_that_the_tpu_kernel_cannot_read_is_bad_input():
    with pytest.raises(InputError, match=r"1 key-value head\(s\) on a device"):
        choose_pages("tpu", 1, 128, jnp.float8_e4m3fn)
