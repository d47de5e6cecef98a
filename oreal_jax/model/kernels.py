"""Pages in the forms that JAX's attention kernels for TPU and GPU read.

The kernels stream a row's pages through fast memory once, whatever the lengths of the
other rows are. `cache.py` has the XLA form, which is their oracle.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ragged_paged_attention,
)
from jaxtyping import Array, Float

from oreal_jax.model.cache import Cached, Pages, in_pages, place

GPU_SPLITS = 16  # parts of a row's pages that a GPU works on at once


class TpuPages(NamedTuple):
    """Keys at even heads, values at odd ones (ragged paged attention, Pallas)."""

    pages: Float[Array, "N size G2 K"]

    axes = (("pages", None, "kv_heads", None),)

    @classmethod
    def empty(
        cls, pages: int, size: int, heads: int, head_dim: int, dtype
    ) -> "TpuPages":
        """See `Cached`."""
        return cls(jnp.zeros((pages, size, 2 * heads, head_dim), dtype))

    def write(self, table, positions, key, value) -> "TpuPages":
        """See `Cached`."""
        page, offset = place(table, positions, self.pages.shape[1])
        both = _interleave(key, value).astype(self.pages.dtype)
        return TpuPages(self.pages.at[page, offset].set(both))

    def write_prompts(self, table, key, value) -> "TpuPages":
        """See `Cached`."""
        both = in_pages(_interleave(key, value), table.shape[1])
        return TpuPages(self.pages.at[table].set(both.astype(self.pages.dtype)))

    def copy(self, source, target) -> "TpuPages":
        """See `Cached`."""
        return TpuPages(self.pages.at[target].set(self.pages[source]))

    def attend(self, query, table, lengths, count) -> Float[Array, "B H K"]:
        """See `Cached`; the kernel itself stops at each row's length."""
        rows = query.shape[0]
        narrow = self.pages.dtype.itemsize == 1  # the kernel reads float8 with a scale
        return ragged_paged_attention(
            query,
            self.pages,
            lengths,
            table,
            jnp.arange(rows + 1, dtype=jnp.int32),
            jnp.array([rows], jnp.int32),
            sm_scale=query.shape[-1] ** -0.5,
            k_scale=1.0 if narrow else None,
            v_scale=1.0 if narrow else None,
        )


class GpuPages(NamedTuple):
    """Heads first (paged attention, Pallas on Triton)."""

    keys: Float[Array, "G N size K"]
    values: Float[Array, "G N size K"]

    axes = (("kv_heads", "pages", None, None),) * 2

    @classmethod
    def empty(
        cls, pages: int, size: int, heads: int, head_dim: int, dtype
    ) -> "GpuPages":
        """See `Cached`."""
        return cls(*(jnp.zeros((heads, pages, size, head_dim), dtype),) * 2)

    def write(self, table, positions, key, value) -> "GpuPages":
        """See `Cached`."""
        page, offset = place(table, positions, self.keys.shape[2])
        put = lambda pages, new: pages.at[:, page, offset].set(
            jnp.swapaxes(new, 0, 1).astype(pages.dtype)
        )
        return GpuPages(put(self.keys, key), put(self.values, value))

    def write_prompts(self, table, key, value) -> "GpuPages":
        """See `Cached`."""
        put = lambda pages, new: pages.at[:, table].set(
            jnp.moveaxis(in_pages(new, table.shape[1]), 3, 0).astype(pages.dtype)
        )
        return GpuPages(put(self.keys, key), put(self.values, value))

    def copy(self, source, target) -> "GpuPages":
        """See `Cached`."""
        return GpuPages(*(x.at[:, target].set(x[:, source]) for x in self))

    def attend(
        self, query, table, lengths, count, *, interpret: bool = False
    ) -> Float[Array, "B H K"]:
        """See `Cached`; scores are float32, products in the query's dtype."""
        splits = min(GPU_SPLITS, table.shape[1])
        return paged_attention(
            query * query.shape[-1] ** -0.5,
            self.keys,
            self.values,
            table,
            lengths,
            k_splits=splits,
            interpret=interpret,
        )


def pages_for(backend: str, head_dim: int) -> type[Cached]:
    """The form that decodes fastest on a backend.

    The TPU kernel reads whole lanes: head sizes other than multiples of 128 are left to
    XLA.
    """
    if backend == "tpu" and head_dim % 128 == 0:
        return TpuPages
    if backend in ("gpu", "cuda"):
        return GpuPages
    return Pages


def _interleave(
    key: Float[Array, "*batch G K"], value: Float[Array, "*batch G K"]
) -> Float[Array, "*batch G2 K"]:
    """key 0, value 0, key 1, value 1, ..."""
    both = jnp.stack([key, value], axis=-2)
    return both.reshape(*key.shape[:-2], 2 * key.shape[-2], key.shape[-1])
