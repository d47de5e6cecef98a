"""Pages as attention kernels for TPU (JAX's own) and GPU (ours) read them.

The kernels stream a row's pages through fast memory once, whatever the lengths of the
other rows are. `cache.py` has the XLA form, which is their oracle. Pallas is imported
where a kernel is used (see flash.py).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oreal_jax.errors import InputError
from oreal_jax.model.cache import Cached, Pages, in_pages, place
from oreal_jax.model.float8 import saturated

# What a TPU holds in fast memory at a time: tokens of a row, and rows. The kernel's own
# table asks the device, which a compilation ahead of time does not have.
TPU_TOKENS, TPU_ROWS = 512, 16
GPU_SPLITS = 16  # stretches of a row's pages that a GPU works on at once
LOWEST = -1e30  # finite, so that a stretch without tokens gives 0 and no NaN


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
        both = saturated(_interleave(key, value), self.pages.dtype)
        return TpuPages(self.pages.at[page, offset].set(both))

    def write_prompts(self, table, key, value) -> "TpuPages":
        """See `Cached`."""
        both = in_pages(_interleave(key, value), table.shape[1], self.pages.shape[1])
        return TpuPages(self.pages.at[table].set(saturated(both, self.pages.dtype)))

    def copy(self, source, target) -> "TpuPages":
        """See `Cached`."""
        return TpuPages(self.pages.at[target].set(self.pages[source]))

    def attend(self, query, table, lengths) -> Float[Array, "B H K"]:
        """See `Cached`; the kernel itself stops at each row's length."""
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
            ragged_paged_attention,
        )

        rows, size = query.shape[0], self.pages.shape[1]
        # The kernel reads float8 with one scale for all heads. Ours are in the weights.
        narrow = self.pages.dtype.itemsize == 1
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
            num_kv_pages_per_block=min(table.shape[1], max(1, TPU_TOKENS // size)),
            num_queries_per_block=min(rows, TPU_ROWS),
        )


class GpuPages(Pages):
    """Pages as XLA reads them, read by a kernel of our own (Pallas on Triton)."""

    __slots__ = ()

    def attend(
        self, query, table, lengths, *, interpret: bool = False
    ) -> Float[Array, "B H K"]:
        """See `Cached`. Each program takes one row, one key-value head and one stretch
        of the row's pages; the stretches' running softmaxes are then joined."""
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        B, H, K = query.shape
        G, M = self.keys.shape[1], table.shape[1]
        splits = min(GPU_SPLITS, M)
        heads = max(16, pl.next_power_of_2(H // G))  # the least a matrix unit takes
        grouped = query.reshape(B, G, H // G, K)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, heads - H // G), (0, 0)))
        whole = lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)
        here = lambda *block: pl.BlockSpec(
            (None, None, None, *block), lambda b, g, s: (b, g, s) + (0,) * len(block)
        )
        shape = (B, G, splits, heads)
        highest, total, mixed = pl.pallas_call(
            functools.partial(_attend_stretch, pages=-(-M // splits)),
            grid=(B, G, splits),
            in_specs=[
                pl.BlockSpec((None, None, heads, K), lambda b, g, s: (b, g, 0, 0)),
                pl.BlockSpec((None, M), lambda b, g, s: (b, 0)),
                pl.BlockSpec((None,), lambda b, g, s: (b,)),
                whole(self.keys),
                whole(self.values),
            ],
            out_specs=[here(heads), here(heads), here(heads, K)],
            out_shape=[
                jax.ShapeDtypeStruct(shape, jnp.float32),
                jax.ShapeDtypeStruct(shape, jnp.float32),
                jax.ShapeDtypeStruct((*shape, K), jnp.float32),
            ],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=interpret,
            name="attend_pages",
        )(grouped, table, lengths, self.keys, self.values)
        share = jnp.exp(highest - jnp.max(highest, axis=2, keepdims=True))
        mixed = jnp.sum(mixed * share[..., None], axis=2)
        mixed = mixed / jnp.sum(total * share, axis=2)[..., None]
        return mixed[:, :, : H // G].reshape(B, H, K).astype(query.dtype)


def _attend_stretch(
    query, table, length, keys, values, highest_out, total_out, mixed_out, *, pages: int
):
    """Attention of one row's `heads` queries to its pages [split * pages, ...)."""
    from jax.experimental import pallas as pl

    head, split = pl.program_id(1), pl.program_id(2)
    heads, K = query.shape
    size = keys.shape[3]
    used = pl.cdiv(length[...], size)
    asked = query[...]

    def add(index, running):
        highest, total, mixed = running
        page = table[index]
        scores = jnp.dot(
            asked,
            keys[page, head].astype(asked.dtype),
            preferred_element_type=jnp.float32,
        )
        token = index * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(token < length[...], scores * K**-0.5, LOWEST)
        now = jnp.maximum(highest, jnp.max(scores, axis=1))
        fade = jnp.exp(highest - now)
        weights = jnp.exp(scores - now[:, None])
        more = jnp.dot(
            weights.astype(asked.dtype),
            values[page, head].astype(asked.dtype),
            preferred_element_type=jnp.float32,
        )
        total = total * fade + jnp.sum(weights, axis=1)
        return now, total, mixed * fade[:, None] + more

    start = (
        jnp.full(heads, LOWEST, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros((heads, K), jnp.float32),
    )
    first = split * pages
    last = jnp.minimum(first + pages, used)
    highest, total, mixed = jax.lax.fori_loop(first, last, add, start)
    highest_out[...], total_out[...], mixed_out[...] = highest, total, mixed


def pages_for(backend: str, heads: int, head_dim: int, dtype) -> type[Cached]:
    """The form that decodes fastest on a backend whose devices have so many key-value
    heads each, kept in `dtype`.

    The TPU kernel reads whole lanes and tiles, the GPU kernel powers of two; other
    shapes are left to XLA.

    Raises:
        InputError: eight bits would be left to XLA, and take longer than sixteen.
    """
    if backend == "tpu" and head_dim % 128 == 0:
        if _tiles(heads, dtype):
            return TpuPages
        if jnp.dtype(dtype).itemsize == 1 and _tiles(heads, jnp.bfloat16):
            raise InputError(
                f"a float8 cache with {heads} key-value head(s) on a device: the TPU "
                "kernel reads an even number of them; split the engine over fewer "
                "devices (decode_tensor) or keep bfloat16"
            )
    if backend in ("gpu", "cuda") and head_dim.bit_count() == 1:
        return GpuPages
    return Pages


def _tiles(heads: int, dtype) -> bool:
    """Whether keys and values of so many heads fill rows of 32 bits, and those tiles of
    one, two, four or eight rows."""
    rows, rest = divmod(2 * heads * jnp.dtype(dtype).itemsize, 4)
    return rest == 0 and (rows in (1, 2, 4) or rows % 8 == 0)


def _interleave(
    key: Float[Array, "*batch G K"], value: Float[Array, "*batch G K"]
) -> Float[Array, "*batch G2 K"]:
    """key 0, value 0, key 1, value 1, ..."""
    both = jnp.stack([key, value], axis=-2)
    return both.reshape(*key.shape[:-2], 2 * key.shape[-2], key.shape[-1])
