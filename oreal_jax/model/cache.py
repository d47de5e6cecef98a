"""Keys and values in pages: memory by what rows hold, not by the longest possible.

A row of the decoding batch has a table of page numbers; the token at position p lies in
page table[p // size], at p % size. Rows that begin alike share pages. Pages of all
layers lie in one buffer, so that a layer is an offset and never a copy. Page 0 is
nobody's: rows that are idle write there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig


class Cache(NamedTuple):
    """Pages of `size` tokens: keys at even heads, values at odd ones.

    N = layers * pages; page `page` of layer `layer` is number layer * pages + page.
    This is the form that JAX's ragged paged attention kernel reads.
    """

    pages: Float[Array, "N size G2 K"]

    @classmethod
    def empty(cls, config: ModelConfig, pages: int, size: int, dtype) -> "Cache":
        """Room for `pages` pages, the idle page included."""
        shape = (config.layers * pages, size, 2 * config.kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, dtype))

    def write(
        self,
        first: Int[Array, ""],
        table: Int[Array, "B M"],
        positions: Int[Array, "B"],
        key: Float[Array, "B G K"],
        value: Float[Array, "B G K"],
    ) -> "Cache":
        """Stores one token a row; `first` is the number of the layer's page 0."""
        size = self.pages.shape[1]
        page = jnp.take_along_axis(table, positions[:, None] // size, axis=1)[:, 0]
        both = interleave(key, value).astype(self.pages.dtype)
        return Cache(self.pages.at[first + page, positions % size].set(both))

    def write_prompts(
        self, table: Int[Array, "R M"], filled: Float[Array, "L R S G2 K"]
    ) -> "Cache":
        """Stores whole prompts: S tokens in M pages each, for all layers at once."""
        L, R, S, heads, K = filled.shape
        M, size = table.shape[1], self.pages.shape[1]
        blocks = filled.reshape(L, R, M, size, heads, K)
        numbers = self._numbers(L, table.reshape(-1)).reshape(L, R, M)
        return Cache(self.pages.at[numbers].set(blocks.astype(self.pages.dtype)))

    def copy(
        self, layers: int, source: Int[Array, "A"], target: Int[Array, "A"]
    ) -> "Cache":
        """Copies pages, in every layer."""
        taken = self.pages[self._numbers(layers, source)]
        return Cache(self.pages.at[self._numbers(layers, target)].set(taken))

    def _numbers(self, layers: int, pages: Int[Array, "A"]) -> Int[Array, "L A"]:
        """Numbers of these pages in all layers."""
        per_layer = self.pages.shape[0] // layers
        return per_layer * jnp.arange(layers)[:, None] + pages[None]


def interleave(
    key: Float[Array, "*batch G K"], value: Float[Array, "*batch G K"]
) -> Float[Array, "*batch G2 K"]:
    """key 0, value 0, key 1, value 1, ..."""
    both = jnp.stack([key, value], axis=-2)
    return both.reshape(*key.shape[:-2], 2 * key.shape[-2], key.shape[-1])


def attend_pages(
    query: Float[Array, "B H K"],
    cache: Cache,
    first: Int[Array, ""],
    table: Int[Array, "B M"],
    lengths: Int[Array, "B"],
    count: Int[Array, ""],
) -> Float[Array, "B H K"]:
    """Each row attends to the first `lengths` tokens of its pages.

    Page by page with a running softmax, `count` pages, as many as the longest row has:
    no copy of the cache, and a row's result does not depend on how long others are.
    """
    B, H, K = query.shape
    _, size, heads, _ = cache.pages.shape
    G = heads // 2
    query = query.reshape(B, G, H // G, K)
    pages = cache.pages.reshape(-1, size, G, 2, K)
    lowest = jnp.finfo(jnp.float32).min

    def add(index, running):
        highest, total, mixed = running
        numbers = first + table[:, index]
        scores = jnp.einsum(
            "bgrk,bsgk->bgrs",
            query,
            pages[numbers, :, :, 0].astype(query.dtype),
            preferred_element_type=jnp.float32,
        )
        seen = index * size + jnp.arange(size)[None] < lengths[:, None]
        scores = jnp.where(seen[:, None, None], scores * K**-0.5, lowest)
        now = jnp.maximum(highest, jnp.max(scores, axis=-1))
        fade = jnp.exp(highest - now)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - now[..., None]), 0)
        more = jnp.einsum(
            "bgrs,bsgk->bgrk",
            weights.astype(query.dtype),
            pages[numbers, :, :, 1].astype(query.dtype),
            preferred_element_type=jnp.float32,
        )
        total = total * fade + jnp.sum(weights, axis=-1)
        return now, total, mixed * fade[..., None] + more

    shape = query.shape[:3]
    start = (
        jnp.full(shape, lowest),
        jnp.zeros(shape),
        jnp.zeros(query.shape, jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(0, count, add, start)
    return (mixed / total[..., None]).astype(query.dtype).reshape(B, H, K)
