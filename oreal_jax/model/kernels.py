"""The KV cache as attention kernels for TPU (JAX's) and GPU (our own) read it.

The kernels load the pages of each sequence into fast memory once, whatever the lengths
of the others. `cache.py` has the XLA form, their oracle. Pallas is imported where a
kernel is used (see flash.py). Letters as in cache.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oreal_jax.errors import InputError
from oreal_jax.model.cache import Pages, locate, split_into_pages
from oreal_jax.model.float8 import saturating_cast

# Block sizes of the TPU kernel: tokens per sequence, and sequences. The kernel's own
# table needs a device, which compilation ahead of time does not have.
TPU_TOKENS, TPU_ROWS = 512, 16
GPU_SPLITS = 16  # parts of a sequence's pages that a GPU processes in parallel
LOWEST = -1e30  # finite, so that a part without tokens gives 0 instead of NaN


class TpuPages(NamedTuple):
    """Keys at even heads, values at odd ones (ragged paged attention, Pallas)."""

    pages: Float[Array, "N size G2 K"]

    axes = (("pages", None, "kv_heads", None),)

    @classmethod
    def empty(
        cls, pages: int, size: int, heads: int, head_dim: int, dtype
    ) -> "TpuPages":
        """See `Pages`."""
        return cls(jnp.zeros((pages, size, 2 * heads, head_dim), dtype))

    def write(self, table, positions, key, value) -> "TpuPages":
        """See `Pages`."""
        page, offset = locate(table, positions, self.pages.shape[1])
        new = saturating_cast(_interleave(key, value), self.pages.dtype)
        return TpuPages(self.pages.at[page, offset].set(new))

    def write_prompts(self, table, key, value) -> "TpuPages":
        """See `Pages`."""
        shape = table.shape[1], self.pages.shape[1]
        new = split_into_pages(_interleave(key, value), *shape)
        new = saturating_cast(new, self.pages.dtype)
        return TpuPages(self.pages.at[table].set(new))

    def attend(self, query, table, lengths) -> Float[Array, "B H K"]:
        """See `Pages`; the kernel stops at the length of each sequence."""
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
            ragged_paged_attention,
        )

        rows, size = query.shape[0], self.pages.shape[1]
        # The kernel requires a scale for float8; ours are folded into the weights.
        scale = 1.0 if self.pages.dtype.itemsize == 1 else None
        return ragged_paged_attention(
            query,
            self.pages,
            lengths,
            table,
            jnp.arange(rows + 1, dtype=jnp.int32),
            jnp.array([rows], jnp.int32),
            sm_scale=query.shape[-1] ** -0.5,
            k_scale=scale,
            v_scale=scale,
            num_kv_pages_per_block=min(table.shape[1], max(1, TPU_TOKENS // size)),
            num_queries_per_block=min(rows, TPU_ROWS),
        )


class GpuPages(Pages):
    """The pages of XLA, read by a kernel of our own (Pallas on Triton)."""

    __slots__ = ()

    def attend(
        self, query, table, lengths, *, interpret: bool = False
    ) -> Float[Array, "B H K"]:
        """See `Pages`.

        Each program takes one sequence, one key-value head and one part of the
        sequence's pages; the running softmaxes of the parts are joined afterwards.
        """
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton

        B, H, K = query.shape
        G, M = self.keys.shape[1], table.shape[1]
        splits = min(GPU_SPLITS, M)
        heads = max(16, pl.next_power_of_2(H // G))  # a matrix unit's minimum
        grouped = query.reshape(B, G, H // G, K)
        grouped = jnp.pad(grouped, ((0, 0), (0, 0), (0, heads - H // G), (0, 0)))
        complete = lambda array: pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)
        part = lambda *block: pl.BlockSpec(
            (None, None, None, *block), lambda b, g, s: (b, g, s) + (0,) * len(block)
        )
        shape = (B, G, splits, heads)
        highest, total, mixed = pl.pallas_call(
            functools.partial(_attend_part, pages=-(-M // splits)),
            grid=(B, G, splits),
            in_specs=[
                pl.BlockSpec((None, None, heads, K), lambda b, g, s: (b, g, 0, 0)),
                pl.BlockSpec((None, M), lambda b, g, s: (b, 0)),
                pl.BlockSpec((None,), lambda b, g, s: (b,)),
                complete(self.keys),
                complete(self.values),
            ],
            out_specs=[part(heads), part(heads), part(heads, K)],
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


def _attend_part(
    query, table, length, keys, values, highest_out, total_out, mixed_out, *, pages: int
):
    """Attend from one sequence's queries [heads, K] to `pages` of its pages."""
    from jax.experimental import pallas as pl

    head, split = pl.program_id(1), pl.program_id(2)
    heads, K = query.shape
    size = keys.shape[3]
    used = pl.cdiv(length[...], size)
    queries = query[...]

    def add(index, running):
        highest, total, mixed = running
        page = table[index]
        scores = jnp.dot(
            queries,
            keys[page, head].astype(queries.dtype),
            preferred_element_type=jnp.float32,
        )
        token = index * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(token < length[...], scores * K**-0.5, LOWEST)
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        decay = jnp.exp(highest - new_highest)
        weights = jnp.exp(scores - new_highest[:, None])
        added = jnp.dot(
            weights.astype(queries.dtype),
            values[page, head].astype(queries.dtype),
            preferred_element_type=jnp.float32,
        )
        total = total * decay + jnp.sum(weights, axis=1)
        return new_highest, total, mixed * decay[:, None] + added

    start = (
        jnp.full(heads, LOWEST, jnp.float32),
        jnp.zeros(heads, jnp.float32),
        jnp.zeros((heads, K), jnp.float32),
    )
    first = split * pages
    last = jnp.minimum(first + pages, used)
    highest, total, mixed = jax.lax.fori_loop(first, last, add, start)
    highest_out[...], total_out[...], mixed_out[...] = highest, total, mixed


LayerCache = Pages | TpuPages  # GpuPages are Pages


def choose_pages(backend: str, heads: int, head_dim: int, dtype) -> type[LayerCache]:
    """Return the class of pages that decodes fastest on a backend.

    `heads` is the number of key-value heads per device, `dtype` that of the cache. The
    TPU kernel reads whole lanes and tiles, the GPU kernel powers of two; XLA reads
    other shapes.

    Raises:
        InputError: XLA would read eight bits, which takes longer than sixteen.
    """
    if backend == "tpu" and head_dim % 128 == 0:
        if _fills_tiles(heads, dtype):
            return TpuPages
        if jnp.dtype(dtype).itemsize == 1 and _fills_tiles(heads, jnp.bfloat16):
            raise InputError(
                f"a float8 cache with {heads} key-value head(s) on a device: the TPU "
                "kernel reads an even number of them; split the engine over fewer "
                "devices (decode_tensor) or keep bfloat16"
            )
    if backend in ("gpu", "cuda") and head_dim.bit_count() == 1:
        return GpuPages
    return Pages


def _fills_tiles(heads: int, dtype) -> bool:
    """Return whether the TPU kernel can read keys and values of `heads` heads.

    They must fill rows of 32 bits, and these tiles of one, two, four or eight rows.
    """
    rows, remainder = divmod(2 * heads * jnp.dtype(dtype).itemsize, 4)
    return remainder == 0 and (rows in (1, 2, 4) or rows % 8 == 0)


def _interleave(
    key: Float[Array, "*batch G K"], value: Float[Array, "*batch G K"]
) -> Float[Array, "*batch G2 K"]:
    """Return key 0, value 0, key 1, value 1, ... along the axis of heads."""
    pairs = jnp.stack([key, value], axis=-2)
    return pairs.reshape(*key.shape[:-2], 2 * key.shape[-2], key.shape[-1])
