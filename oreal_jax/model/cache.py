"""Keys and values in pages: memory by what rows hold, not by the longest possible.

A row of the decoding batch has a table of page numbers; the token at position p lies in
page table[p // size], at p % size. Rows that begin alike share pages. Page 0 is
nobody's: rows that are idle write there. A cache is one `Pages` per layer.

How a page lies in memory is what its reader wants: `Pages` is for XLA on any device,
kernels.py has the forms that the kernels for TPU and GPU read. All have these methods.
"""

import functools
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.float8 import saturated

FEWEST = 8  # rows that attend together, whatever they have


@runtime_checkable
class Cached(Protocol):
    """The pages of one layer, in some form: a named tuple of arrays.

    The class has `axes`, the names of the arrays' axes, for `sharding.py`.
    """

    @classmethod
    def empty(cls, pages: int, size: int, heads: int, head_dim: int, dtype) -> "Cached":
        """Room for `pages` pages of `size` tokens, the idle page included."""
        ...

    def write(
        self,
        table: Int[Array, "B M"],
        positions: Int[Array, "B"],
        key: Float[Array, "B G K"],
        value: Float[Array, "B G K"],
    ) -> "Cached":
        """Stores one token a row."""
        ...

    def write_prompts(
        self,
        table: Int[Array, "R M"],
        key: Float[Array, "R S G K"],
        value: Float[Array, "R S G K"],
    ) -> "Cached":
        """Stores whole prompts: S tokens in M pages each."""
        ...

    def copy(self, source: Int[Array, "A"], target: Int[Array, "A"]) -> "Cached":
        """Copies pages."""
        ...

    def attend(
        self,
        query: Float[Array, "B H K"],
        table: Int[Array, "B M"],
        lengths: Int[Array, "B"],
    ) -> Float[Array, "B H K"]:
        """Each row attends to the first `lengths` tokens of its pages."""
        ...


class Pages(NamedTuple):
    """The form for XLA: both products of attention then run along memory."""

    keys: Float[Array, "N G K size"]
    values: Float[Array, "N G size K"]

    axes = (("pages", "kv_heads", None, None),) * 2

    @classmethod
    def empty(cls, pages: int, size: int, heads: int, head_dim: int, dtype) -> "Pages":
        """See `Cached`."""
        return cls(
            jnp.zeros((pages, heads, head_dim, size), dtype),
            jnp.zeros((pages, heads, size, head_dim), dtype),
        )

    def write(self, table, positions, key, value) -> "Pages":
        """See `Cached`."""
        page, offset = place(table, positions, self.values.shape[2])
        dtype = self.keys.dtype
        return self._replace(
            keys=self.keys.at[page, :, :, offset].set(saturated(key, dtype)),
            values=self.values.at[page, :, offset].set(saturated(value, dtype)),
        )

    def write_prompts(self, table, key, value) -> "Pages":
        """See `Cached`."""
        dtype, shape = self.keys.dtype, (table.shape[1], self.values.shape[2])
        key, value = (saturated(in_pages(x, *shape), dtype) for x in (key, value))
        return self._replace(
            keys=self.keys.at[table].set(jnp.einsum("rmsgk->rmgks", key)),
            values=self.values.at[table].set(jnp.einsum("rmsgk->rmgsk", value)),
        )

    def copy(self, source, target) -> "Pages":
        """See `Cached`."""
        return self._make(x.at[target].set(x[source]) for x in self)

    def attend(self, query, table, lengths) -> Float[Array, "B H K"]:
        """See `Cached`. Page by page with a running softmax: one program for all
        lengths, and a row's result does not depend on how long others are.

        Rows that stand first may be the longest: the later half is left out of pages
        that none of it has, then the later half of what remains, and so on.
        """
        B, H, K = query.shape
        _, G, size, _ = self.values.shape
        query = query.reshape(B, G, H // G, K)
        lowest = jnp.finfo(jnp.float32).min

        def add(rows, index, running):
            highest, total, mixed = (x[:rows] for x in running)
            numbers = table[:rows, index]
            scores = jnp.einsum(
                "bgrk,bgks->bgrs",
                query[:rows],
                self.keys[numbers].astype(query.dtype),
                preferred_element_type=jnp.float32,
            )
            seen = index * size + jnp.arange(size)[None] < lengths[:rows, None]
            scores = jnp.where(seen[:, None, None], scores * K**-0.5, lowest)
            now = jnp.maximum(highest, jnp.max(scores, axis=-1))
            fade = jnp.exp(highest - now)
            weights = jnp.exp(scores - now[..., None])
            weights = jnp.where(seen[:, None, None], weights, 0)
            more = jnp.einsum(
                "bgrs,bgsk->bgrk",
                weights.astype(query.dtype),
                self.values[numbers].astype(query.dtype),
                preferred_element_type=jnp.float32,
            )
            total = total * fade + jnp.sum(weights, axis=-1)
            added = now, total, mixed * fade[..., None] + more
            return tuple(
                jnp.concatenate([new, old[rows:]]) if rows < B else new
                for new, old in zip(added, running, strict=True)
            )

        shape = query.shape[:3]
        running = (
            jnp.full(shape, lowest),
            jnp.zeros(shape),
            jnp.zeros(query.shape, jnp.float32),
        )
        first, rows = 0, B
        while True:
            half = rows // 2 if rows > FEWEST else 0
            needed = -(-jnp.max(lengths[half:rows]) // size)
            last = jnp.maximum(first, needed)
            loop = functools.partial(add, rows)
            running = jax.lax.fori_loop(first, last, loop, running)
            if not half:
                break
            first, rows = last, half
        _, total, mixed = running
        return (mixed / total[..., None]).astype(query.dtype).reshape(B, H, K)


def place(
    table: Int[Array, "B M"], positions: Int[Array, "B"], size: int
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """The page of each position, and where in the page it lies."""
    page = jnp.take_along_axis(table, positions[:, None] // size, axis=1)[:, 0]
    return page, positions % size


def in_pages(
    x: Float[Array, "R S G K"], pages: int, size: int
) -> Float[Array, "R M size G K"]:
    """Splits S tokens into `pages` pages of `size`, padding the last one."""
    padded = jnp.pad(x, ((0, 0), (0, pages * size - x.shape[1]), (0, 0), (0, 0)))
    return padded.reshape(x.shape[0], pages, size, *x.shape[2:])
