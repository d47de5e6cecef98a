"""Causal grouped-query attention on packed rows (on cached pages: cache.py).

This XLA form runs everywhere and is the oracle of the kernels (flash.py). Scores and
softmax are float32 whatever the inputs are. Rows are worked off in blocks as in
FlashAttention (arXiv:2205.14135, 2307.08691): no [S, S] array of scores exists, and a
packed row costs what its sequences cost, for keys that no query of a block sees are
never visited.

Letters: n blocks of T queries, m of T keys (one of them: u), R query heads that share a
key-value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

ATTENDED = "attended"  # what rematerialisation may keep of attention
BLOCK = 128


def attend_packed(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    segments: Int[Array, "B S"],
    block: int = BLOCK,
) -> Float[Array, "B S H K"]:
    """Each token attends to itself and to earlier tokens of its own segment, which is
    one stretch of its row."""
    return attend_part(query, key, value, segments, segments, block=block)


def attend_part(
    query: Float[Array, "B Q H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    of_queries: Int[Array, "B Q"],
    segments: Int[Array, "B S"],
    first: Int[Array, ""] | int = 0,
    block: int = BLOCK,
) -> Float[Array, "B Q H K"]:
    """`attend_packed` of the tokens first .. first + Q - 1 of each row, the part that a
    device has; `of_queries` are their segments. Scores of `block` queries and as many
    keys exist at a time."""
    B, Q, H, K = query.shape
    S, G = key.shape[1:3]
    T = min(S, block)
    begins = segments != jnp.pad(segments, ((0, 0), (1, 0)))[:, :S]
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(S)[None], 0), axis=1)
    start = jax.lax.dynamic_slice_in_dim(start, first, Q, axis=1)

    heads_first = lambda x: jnp.moveaxis(_blocks(x, T), 2, -2)
    out = _blockwise(
        heads_first(query.reshape(B, Q, G, H // G, K)),
        heads_first(key),
        heads_first(value),
        _Visible(
            _blocks(of_queries, T),
            _blocks(segments, T),
            first=jnp.asarray(first),
            begin=jnp.min(_blocks(start, T, fill=S), axis=(1, 2)) // T,
        ),
    )
    return jnp.moveaxis(out, (0, 4), (1, 2)).reshape(B, -1, H, K)[:, :Q]


def _blocks(x: Array, T: int, fill: int = 0) -> Array:
    """[B, S, ...] as [n, B, T, ...]."""
    B, S, *rest = x.shape
    n = -(-S // T)
    pad = ((0, 0), (0, n * T - S)) + ((0, 0),) * len(rest)
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(B, n, T, *rest), 1, 0)


class _Visible(NamedTuple):
    """What queries see: segments of queries and keys, the place of the first query, and
    the first block of keys that any query of a block sees."""

    of_queries: Int[Array, "n B T"]
    of_keys: Int[Array, "m B T"]
    first: Int[Array, ""]
    begin: Int[Array, "n"]

    def keys(self, i: Int[Array, ""]) -> tuple[Array, Array]:
        """The blocks of keys to visit for query block i, from and up to."""
        T = self.of_keys.shape[2]
        end = -(-(self.first + (i + 1) * T) // T)
        return self.begin[i], jnp.minimum(end, len(self.of_keys))

    def mask(self, i: Int[Array, ""], j: Int[Array, ""]) -> Bool[Array, "B 1 1 T T"]:
        """Which of query block i sees which of key block j."""
        here = jnp.arange(self.of_keys.shape[2])
        same = self.of_queries[i][:, :, None] == self.of_keys[j][:, None, :]
        earlier = (
            j * len(here) + here[None, :] <= self.first + i * len(here) + here[:, None]
        )
        return (same & earlier[None])[:, None, None]


def _scores(
    query: Float[Array, "B G R T K"],
    key: Float[Array, "B G T K"],
    mask: Bool[Array, "B 1 1 T T"],
) -> Float[Array, "B G R T T"]:
    scores = jnp.einsum(
        "bgrtk,bguk->bgrtu", query, key, preferred_element_type=jnp.float32
    )
    # A finite mask: a query that sees nothing of a block gives no NaN, and what it
    # gives instead is scaled to 0 when it comes to itself.
    lowest = jnp.finfo(jnp.float32).min
    return jnp.where(mask, scores * query.shape[-1] ** -0.5, lowest)


@jax.custom_vjp
def _blockwise(
    query: Float[Array, "n B G R T K"],
    key: Float[Array, "m B G T K"],
    value: Float[Array, "m B G T K"],
    visible: _Visible,
) -> Float[Array, "n B G R T K"]:
    return _forward(query, key, value, visible)[0]


def _forward(query, key, value, visible: _Visible):
    """The outcome, and what the gradient needs: the inputs, it, and the log of the sum
    of exponentials."""

    def of_queries(block):
        i, query = block

        def add(j, carry):
            top, total, sums = carry
            scores = _scores(query, key[j], visible.mask(i, j))
            higher = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - higher[..., None])
            shrink = jnp.exp(top - higher)
            total = total * shrink + jnp.sum(weights, axis=-1)
            added = jnp.einsum(
                "bgrtu,bguk->bgrtk",
                weights.astype(value.dtype),
                value[j],
                preferred_element_type=jnp.float32,
            )
            return higher, total, sums * shrink[..., None] + added

        nothing = jnp.zeros(query.shape, jnp.float32)
        lowest = jnp.full(query.shape[:-1], jnp.finfo(jnp.float32).min)
        start = lowest, nothing[..., 0], nothing
        begin, end = visible.keys(i)
        top, total, sums = jax.lax.fori_loop(begin, end, add, start)
        total = jnp.where(total > 0, total, 1)  # behind the last query
        return (sums / total[..., None]).astype(query.dtype), top + jnp.log(total)

    kept = jax.lax.map(of_queries, (jnp.arange(len(query)), query))
    out, log_total = (checkpoint_name(x, ATTENDED) for x in kept)
    return out, (query, key, value, visible, out, log_total)


def _backward(kept, slope):
    query, key, value, visible, out, log_total = kept
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_queries(slopes, block):
        i, query, out, log_total, slope = block
        mean = product("bgrtk,bgrtk->bgrt", slope, out)

        def add(j, slopes):
            of_query, of_key, of_value = slopes
            scores = _scores(query, key[j], visible.mask(i, j))
            weights = jnp.exp(scores - log_total[..., None])
            of_weights = product("bgrtk,bguk->bgrtu", slope, value[j])
            of_scores = weights * (of_weights - mean[..., None])
            of_scores = (of_scores * query.shape[-1] ** -0.5).astype(query.dtype)
            weights = weights.astype(slope.dtype)
            of_query += product("bgrtu,bguk->bgrtk", of_scores, key[j])
            added = product("bgrtu,bgrtk->bguk", of_scores, query)
            of_key = of_key.at[j].add(added)
            added = product("bgrtu,bgrtk->bguk", weights, slope)
            return of_query, of_key, of_value.at[j].add(added)

        start = jnp.zeros(query.shape, jnp.float32), *slopes
        begin, end = visible.keys(i)
        of_query, *slopes = jax.lax.fori_loop(begin, end, add, start)
        return tuple(slopes), of_query.astype(query.dtype)

    empty = jnp.zeros(key.shape, jnp.float32)
    blocks = jnp.arange(len(query)), query, out, log_total, slope
    (of_key, of_value), of_query = jax.lax.scan(of_queries, (empty, empty), blocks)
    return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype), None


_blockwise.defvjp(_forward, _backward)
