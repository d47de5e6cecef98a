"""Causal grouped-query attention on packed rows (on cached pages: cache.py).

This XLA form runs everywhere and is the oracle of the kernels (flash.py). Scores and
softmax are float32 whatever the inputs are. Long rows are worked off in blocks of
queries, which are computed again in the backward pass: no [S, S] array of scores exists
for them.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCK = 512  # queries whose scores exist at a time


def attend_packed(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    segments: Int[Array, "B S"],
) -> Float[Array, "B S H K"]:
    """Each token attends to itself and to earlier tokens of its own segment."""
    return attend_part(query, key, value, segments, segments)


def attend_part(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    of_queries: Int[Array, "B T"],
    segments: Int[Array, "B S"],
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "B T H K"]:
    """`attend_packed` of the tokens first .. first + T - 1 of each row, the part that a
    device has; `of_queries` are their segments."""
    B, T, S = *query.shape[:2], key.shape[1]
    keys = jnp.arange(S)[None, None]

    def block(start, query, of_queries):
        queries = start + jnp.arange(query.shape[1])[None, :, None]
        same = of_queries[:, :, None] == segments[:, None, :]
        return _attend(query, key, value, same & (keys <= queries))

    if T <= QUERY_BLOCK:
        return block(first, query, of_queries)
    count = -(-T // QUERY_BLOCK)
    padded = lambda x: jnp.pad(
        x, ((0, 0), (0, count * QUERY_BLOCK - T)) + ((0, 0),) * (x.ndim - 2)
    )
    blocks = lambda x: jnp.moveaxis(
        padded(x).reshape(B, count, QUERY_BLOCK, *x.shape[2:]), 1, 0
    )
    starts = first + QUERY_BLOCK * jnp.arange(count)
    parts = jax.lax.map(
        jax.checkpoint(lambda part: block(*part)),
        (starts, blocks(query), blocks(of_queries)),
    )
    return jnp.moveaxis(parts, 0, 1).reshape(B, -1, *query.shape[2:])[:, :T]


def _attend(
    query: Float[Array, "B T H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
    B, T, H, K = query.shape
    G = key.shape[2]
    query = query.reshape(B, T, G, H // G, K)
    scores = jnp.einsum(
        "btgrk,bsgk->bgrts", query, key, preferred_element_type=jnp.float32
    )
    # A finite mask: a query that may see nothing (padding) then gives no NaN.
    scores = jnp.where(
        mask[:, None, None], scores * K**-0.5, jnp.finfo(scores.dtype).min
    )
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(B, T, H, K)
