"""Causal grouped-query attention: on packed rows, and on a window of the cache.

These XLA forms run everywhere and are the oracle of any kernel. Scores and softmax are
float32 whatever the inputs are.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend_packed(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B S G K"],
    value: Float[Array, "B S G K"],
    segments: Int[Array, "B S"],
) -> Float[Array, "B S H K"]:
    """Each token attends to itself and to earlier tokens of its own segment."""
    S = query.shape[1]
    causal = jnp.tril(jnp.ones((S, S), bool))
    same = segments[:, :, None] == segments[:, None, :]
    return _attend(query, key, value, same & causal[None])


def attend_window(
    query: Float[Array, "B T H K"],
    keys: Float[Array, "B W G K"],
    values: Float[Array, "B W G K"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T H K"]:
    """Each new token attends to the slots up to its own position.

    Slots behind it may hold leftovers; no token looks at them.
    """
    slots = jnp.arange(keys.shape[1])
    return _attend(query, keys, values, slots[None, None] <= positions[:, :, None])


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
    scores = jnp.where(mask[:, None, None], scores * K**-0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bgrts,bsgk->btgrk", weights, value).reshape(B, T, H, K)
