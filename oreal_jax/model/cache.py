"""The KV cache in pages: memory for the tokens there are, not for the longest sequence.

A sequence of the decoding batch has a table of page numbers; its token at position p is
stored in page table[p // size] at offset p % size. Sequences with a common prefix share
pages. Page 0 belongs to no sequence: idle slots write there.

Kernels differ in the memory layout that they read. `Pages` is XLA's, for every device;
kernels.py has those of the kernels on TPU and GPU, with the same methods.

Letters: N pages, B sequences, M pages per sequence, R prompts, S tokens, H heads, G
key-value heads, K head size.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.float8 import saturating_cast

MIN_ROWS = 8  # a batch of sequences is not halved below this number


class Pages(NamedTuple):
    """The pages of a layer for XLA: both products of attention read contiguous memory.

    `axes` names the axes of each array for `sharding.py`.
    """

    keys: Float[Array, "N G K size"]
    values: Float[Array, "N G size K"]

    axes = (("pages", "kv_heads", None, None),) * 2

    @classmethod
    def empty(cls, pages: int, size: int, heads: int, head_dim: int, dtype) -> "Pages":
        """Return `pages` pages of `size` tokens, including page 0."""
        return cls(
            jnp.zeros((pages, heads, head_dim, size), dtype),
            jnp.zeros((pages, heads, size, head_dim), dtype),
        )

    def write(
        self,
        table: Int[Array, "B M"],
        positions: Int[Array, "B"],
        key: Float[Array, "B G K"],
        value: Float[Array, "B G K"],
    ) -> "Pages":
        """Store one token of each sequence."""
        page, offset = locate(table, positions, self.values.shape[2])
        dtype = self.keys.dtype
        return self._replace(
            keys=self.keys.at[page, :, :, offset].set(saturating_cast(key, dtype)),
            values=self.values.at[page, :, offset].set(saturating_cast(value, dtype)),
        )

    def write_prompts(
        self,
        table: Int[Array, "R M"],
        key: Float[Array, "R S G K"],
        value: Float[Array, "R S G K"],
    ) -> "Pages":
        """Store prompts from position 0 on."""
        dtype, shape = self.keys.dtype, (table.shape[1], self.values.shape[2])
        key, value = (
            saturating_cast(split_into_pages(x, *shape), dtype) for x in (key, value)
        )
        return self._replace(
            keys=self.keys.at[table].set(jnp.einsum("rmsgk->rmgks", key)),
            values=self.values.at[table].set(jnp.einsum("rmsgk->rmgsk", value)),
        )

    def attend(
        self,
        query: Float[Array, "B H K"],
        table: Int[Array, "B M"],
        lengths: Int[Array, "B"],
    ) -> Float[Array, "B H K"]:
        """Attend from each sequence to the first `lengths` tokens of its pages.

        The softmax runs page by page: there is one program for all lengths, and a
        result does not depend on the lengths of other sequences. It is fastest with the
        longest sequences first, because the later half of the batch skips pages that
        none of its sequences has, then the later half of the remaining ones, and so on.
        """
        B, H, K = query.shape
        _, G, size, _ = self.values.shape
        query = query.reshape(B, G, H // G, K)
        lowest = jnp.finfo(jnp.float32).min

        def add(rows, index, running):
            """Add page `index` of the first `rows` sequences."""
            highest, total, mixed = (x[:rows] for x in running)
            numbers = table[:rows, index]
            scores = jnp.einsum(
                "bgrk,bgks->bgrs",
                query[:rows],
                self.keys[numbers].astype(query.dtype),
                preferred_element_type=jnp.float32,
            )
            used = index * size + jnp.arange(size)[None] < lengths[:rows, None]
            scores = jnp.where(used[:, None, None], scores * K**-0.5, lowest)
            new_highest = jnp.maximum(highest, jnp.max(scores, axis=-1))
            decay = jnp.exp(highest - new_highest)
            weights = jnp.exp(scores - new_highest[..., None])
            weights = jnp.where(used[:, None, None], weights, 0)
            added = jnp.einsum(
                "bgrs,bgsk->bgrk",
                weights.astype(query.dtype),
                self.values[numbers].astype(query.dtype),
                preferred_element_type=jnp.float32,
            )
            total = total * decay + jnp.sum(weights, axis=-1)
            new = new_highest, total, mixed * decay[..., None] + added
            if rows == B:
                return new
            return tuple(
                jnp.concatenate([x, old[rows:]])
                for x, old in zip(new, running, strict=True)
            )

        shape = query.shape[:3]
        running = (
            jnp.full(shape, lowest),
            jnp.zeros(shape),
            jnp.zeros(query.shape, jnp.float32),
        )
        first, rows = 0, B
        if table.shape[1] == 1:
            # XLA would hoist the read of the page out of every loop, and so repeat it.
            # A barrier in the loops prevents that too, but is 6% slower.
            rows, running = 0, add(B, 0, running)
        while rows:
            half = rows // 2 if rows > MIN_ROWS else 0
            needed = -(-jnp.max(lengths[half:rows]) // size)
            last = jnp.maximum(first, needed)
            loop = functools.partial(add, rows)
            running = jax.lax.fori_loop(first, last, loop, running)
            first, rows = last, half
        _, total, mixed = running
        return (mixed / total[..., None]).astype(query.dtype).reshape(B, H, K)


def locate(
    table: Int[Array, "B M"], positions: Int[Array, "B"], size: int
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Return the page and the offset in it of each position."""
    page = jnp.take_along_axis(table, positions[:, None] // size, axis=1)[:, 0]
    return page, positions % size


def split_into_pages(
    x: Float[Array, "R S G K"], pages: int, size: int
) -> Float[Array, "R M size G K"]:
    """Split S tokens into `pages` pages of `size`; the last one is padded."""
    padded = jnp.pad(x, ((0, 0), (0, pages * size - x.shape[1]), (0, 0), (0, 0)))
    return padded.reshape(x.shape[0], pages, size, *x.shape[2:])
