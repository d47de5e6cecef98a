"""Causal grouped-query attention on packed rows; `cache.py` has that on cached pages.

This form is XLA's: it runs everywhere and is the oracle of the kernels (flash.py).
Scores and softmax are float32 for inputs of every dtype. Rows are processed in blocks,
as in FlashAttention (arXiv:2205.14135, 2307.08691): no [S, S] array of scores exists,
and blocks of keys that no query of a block attends to are skipped, so a packed row
costs as much as its sequences.

Letters: B rows, S tokens, Q queries, H heads, G key-value heads, K head size; n blocks
of T queries, m of T keys (u in einsums), R query heads per key-value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

ATTENDED = "attended"  # the checkpoint name of attention's results
BLOCK = 128


def attend_packed(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    segments: Int[Array, "B S"],
    block: int = BLOCK,
) -> Float[Array, "B S H K"]:
    """Attend from each token to itself and earlier tokens of its segment.

    A segment is contiguous in its row.
    """
    return attend_part(query, key, value, segments, segments, block=block)


def attend_part(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    query_segments: Int[Array, "B Q"],
    segments: Int[Array, "B S"],
    first: Int[Array, ""] | int = 0,
    block: int = BLOCK,
) -> Float[Array, "B Q H K"]:
    """Attend from tokens first .. first + Q - 1 of each row, a device's part of it.

    At most `block` queries times `block` keys have scores at once.
    """
    B, Q, H, K = query.shape
    S, G = key.shape[1:3]
    T = min(S, block)
    is_start = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :S]
    start = jax.lax.cummax(jnp.where(is_start, jnp.arange(S)[None], 0), axis=1)
    start = jax.lax.dynamic_slice_in_dim(start, first, Q, axis=1)

    heads_first = lambda x: jnp.moveaxis(_blocks(x, T), 2, -2)
    out = _attend_blocks(
        heads_first(query.reshape(B, Q, G, H // G, K)),
        heads_first(key),
        heads_first(value),
        _Visibility(
            _blocks(query_segments, T),
            _blocks(segments, T),
            first=jnp.asarray(first),
            begin=jnp.min(_blocks(start, T, fill=S), axis=(1, 2)) // T,
        ),
    )
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, H, K)[:, :Q]


def _blocks(x: Array, T: int, fill: int = 0) -> Array:
    """Split [B, S, ...] into [n, B, T, ...]; the last block is padded with `fill`."""
    B, S, *inner = x.shape
    n = -(-S // T)
    pad = ((0, 0), (0, n * T - S)) + ((0, 0),) * len(inner)
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(B, n, T, *inner), 1, 0)


class _Visibility(NamedTuple):
    """What the queries attend to.

    `first` is the position of the first query, `begin` the first block of keys that any
    query of a block attends to.
    """

    query_segments: Int[Array, "n B T"]
    key_segments: Int[Array, "m B T"]
    first: Int[Array, ""]
    begin: Int[Array, "n"]

    def key_blocks(self, i: Int[Array, ""]) -> tuple[Array, Array]:
        """Return the range of blocks of keys for query block i."""
        T = self.key_segments.shape[2]
        end = -(-(self.first + (i + 1) * T) // T)
        return self.begin[i], jnp.minimum(end, len(self.key_segments))

    def mask(self, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "B 1 1 T T"]:
        """Return which queries of block i attend to which keys of block j."""
        T = self.key_segments.shape[2]
        offset = jnp.arange(T)
        same = self.query_segments[i][:, :, None] == self.key_segments[j][:, None, :]
        earlier = j * T + offset[None, :] <= self.first + i * T + offset[:, None]
        return (same & earlier[None])[:, None, None]


def _scores(
    query: Float[Array, "B G R T K"],
    key: Float[Array, "B G T K"],
    mask: Bool[Array, "B 1 1 T T"],
) -> Float[Array, "B G R T T"]:
    scores = jnp.einsum(
        "bgrtk,bguk->bgrtu", query, key, preferred_element_type=jnp.float32
    )
    # The mask is finite: a query that attends to nothing in a block gives no NaN, and
    # its result is scaled to 0 once it attends to itself.
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(mask, scores * query.shape[-1] ** -0.5, lowest)


@jax.custom_vjp
def _attend_blocks(
    query: Float[Array, "n B G R T K"],
    key: Float[Array, "m B G T K"],
    value: Float[Array, "m B G T K"],
    visibility: _Visibility,
) -> Float[Array, "n B G R T K"]:
    return _forward(query, key, value, visibility)[0]


def _forward(query, key, value, visibility: _Visibility):
    """Return the result, and the residuals: with it the log-sum-exp of the scores."""

    def attend(block):
        i, query = block

        def add(j, running):
            highest, total, mixed = running
            scores = _scores(query, key[j], visibility.mask(i, j))
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_highest[..., None])
            decay = jnp.exp(highest - new_highest)
            total = total * decay + jnp.sum(weights, axis=-1)
            added = jnp.einsum(
                "bgrtu,bguk->bgrtk",
                weights.astype(value.dtype),
                value[j],
                preferred_element_type=jnp.float32,
            )
            return new_highest, total, mixed * decay[..., None] + added

        zeros = jnp.zeros(query.shape, jnp.float32)
        lowest = jnp.full(query.shape[:-1], jnp.finfo(jnp.float32).min)
        start = lowest, zeros[..., 0], zeros
        begin, end = visibility.key_blocks(i)
        highest, total, mixed = jax.lax.fori_loop(begin, end, add, start)
        total = jnp.where(total > 0, total, 1)  # padding after the last query
        return (mixed / total[..., None]).astype(query.dtype), highest + jnp.log(total)

    results = jax.lax.map(attend, (jnp.arange(len(query)), query))
    out, log_total = (checkpoint_name(x, ATTENDED) for x in results)
    return out, (query, key, value, visibility, out, log_total)


def _backward(residuals, grad):
    query, key, value, visibility, out, log_total = residuals
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def pull_back(grads, block):
        i, query, out, log_total, grad = block
        mean = product("bgrtk,bgrtk->bgrt", grad, out)

        def add(j, grads):
            grad_query, grad_key, grad_value = grads
            scores = _scores(query, key[j], visibility.mask(i, j))
            weights = jnp.exp(scores - log_total[..., None])
            grad_weights = product("bgrtk,bguk->bgrtu", grad, value[j])
            grad_scores = weights * (grad_weights - mean[..., None])
            grad_scores = (grad_scores * query.shape[-1] ** -0.5).astype(query.dtype)
            weights = weights.astype(grad.dtype)
            grad_query += product("bgrtu,bguk->bgrtk", grad_scores, key[j])
            added = product("bgrtu,bgrtk->bguk", grad_scores, query)
            grad_key = grad_key.at[j].add(added)
            added = product("bgrtu,bgrtk->bguk", weights, grad)
            return grad_query, grad_key, grad_value.at[j].add(added)

        start = jnp.zeros(query.shape, jnp.float32), *grads
        begin, end = visibility.key_blocks(i)
        grad_query, *grads = jax.lax.fori_loop(begin, end, add, start)
        return tuple(grads), grad_query.astype(query.dtype)

    zeros = jnp.zeros(key.shape, jnp.float32)
    blocks = jnp.arange(len(query)), query, out, log_total, grad
    (grad_key, grad_value), grad_query = jax.lax.scan(pull_back, (zeros, zeros), blocks)
    return grad_query, grad_key.astype(key.dtype), grad_value.astype(value.dtype), None


_attend_blocks.defvjp(_forward, _backward)
