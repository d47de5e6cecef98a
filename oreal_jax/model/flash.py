"""The fastest causal attention on packed rows for each kind of device.

Splash attention on TPU, Triton on GPU (both JAX's own), XLA in blocks on CPU. The
kernels skip blocks that no query attends to, and scores never leave fast memory.
`attention.py` is their oracle.

A kernel is prepared for a shape. It is a callable pytree, because its arrays (the
blocks to visit) may be sharded like the queries.

A kernel is imported where it is used: JAX may move or remove one (it has deprecated
`jax.experimental.pallas.triton`) without breaking other kinds of devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.tree_util import Partial
from jaxtyping import Array, Float

from oreal_jax.model.attention import ATTENDED, BLOCK, attend_part

# (heads, tokens per row, sharding of [heads, tokens]) -> an `attend_part` for a
# device's heads and queries, and the partition specs of its arrays.
Prepare = Callable[[int, int, NamedSharding], tuple[Partial, Any]]

MIN_BLOCK, MAX_BLOCK = 128, 1024  # of queries and of keys, for splash attention


def choose_kernel(platform: str, length: int, context: int) -> Prepare:
    """Return the fastest kernel for rows of `length` tokens on `context` devices."""
    fits = length % (MIN_BLOCK * context) == 0
    if platform == "tpu" and fits:
        return prepare_splash
    if platform in ("gpu", "cuda") and fits and context == 1:
        return prepare_triton
    return prepare_xla_cpu if platform == "cpu" else prepare_xla


def prepare_xla(
    heads: int, length: int, sharding: NamedSharding, *, block: int = BLOCK
) -> tuple[Partial, Any]:
    """Prepare XLA's attention, which runs on every device."""
    attend = Partial(functools.partial(attend_part, block=block))
    return attend, attend


def prepare_xla_cpu(
    heads: int, length: int, sharding: NamedSharding
) -> tuple[Partial, Any]:
    """Prepare XLA's attention for CPUs.

    Small blocks visit fewer masked keys, and larger products are hardly faster there.
    """
    return prepare_xla(heads, length, sharding, block=64)


def prepare_splash(
    heads: int, length: int, sharding: NamedSharding, *, interpret: bool = False
) -> tuple[Partial, Any]:
    """Prepare splash attention with segment ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shard_heads, shard_length = sharding.shard_shape((heads, length))
    queries, keys = _block_size(shard_length), _block_size(length)
    mask = splash.CausalMask((length, length))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=queries,
            block_kv=keys,
            block_kv_compute=min(keys, 512),
            block_q_dkv=queries,
            block_kv_dkv=keys,
            block_kv_dkv_compute=min(keys, 512),
            block_q_dq=queries,
            block_kv_dq=keys,
        ),
        head_shards=heads // shard_heads,
        q_seq_shards=length // shard_length,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    specs = kernel.manual_sharding_spec(sharding)
    return Partial(_splash, kernel), Partial(_splash, specs)


def _splash(kernel, query, key, value, query_segments, segments, first):
    """Apply a prepared kernel as `attend_part`; its arrays imply `first`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    ids = splash.SegmentIds(query_segments, segments)
    attended = jax.vmap(kernel)(
        heads_first(query * query.shape[-1] ** -0.5),
        heads_first(key),
        heads_first(value),
        ids,
    )
    return heads_first(attended)


def _block_size(length: int) -> int:
    """Return the largest block size that divides a length."""
    size = MAX_BLOCK
    while length % size:
        size //= 2
    return size


def prepare_triton(
    heads: int, length: int, sharding: NamedSharding, *, interpret: bool = False
) -> tuple[Partial, Any]:
    """Prepare flash attention in Triton; each device needs whole rows."""
    attend = Partial(functools.partial(_triton, interpret=interpret))
    return attend, attend


def _triton(query, key, value, query_segments, segments, first, *, interpret):
    from jax.experimental.pallas.ops.gpu import attention as triton

    repeats = query.shape[2] // key.shape[2]
    return _name_residuals(triton.mha)(
        query,
        repeat_heads(key, repeats),
        repeat_heads(value, repeats),
        segments,
        sm_scale=query.shape[-1] ** -0.5,
        causal=True,
        interpret=interpret,
    )


def _name_residuals(kernel: Any) -> Callable:
    """Return `triton.mha` with checkpoint names for its output and log-sum-exp.

    Its gradient reads both. Rematerialisation stores them by name only, and otherwise
    the backward pass would run the kernel again.
    """

    def forward(*arguments):
        out, (*inputs, _, log_total) = kernel.fwd(*arguments)
        out, log_total = (checkpoint_name(x, ATTENDED) for x in (out, log_total))
        return out, (*inputs, out, log_total)

    named = jax.custom_vjp(kernel.fun, nondiff_argnums=kernel.nondiff_argnums)
    named.defvjp(forward, kernel.bwd)
    return named


def repeat_heads(x: Float[Array, "B S G K"], repeats: int) -> Float[Array, "B S H K"]:
    """Repeat every head; the gradients of the repetitions are summed in float32."""
    return jnp.repeat(x.astype(jnp.float32), repeats, axis=2).astype(x.dtype)
