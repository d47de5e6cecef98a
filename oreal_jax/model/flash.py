"""Causal attention on packed rows, as each kind of device does it best: by kernels,
splash attention on TPU and Triton on GPU, and by XLA on CPU.

The kernels are JAX's own. They take a row apart in blocks and skip those that nobody
sees, so that no scores leave fast memory. `attention.py` is their oracle.

A kernel is prepared for a shape: that may take arrays (which blocks to visit) that are
split over the devices as the queries are. What is prepared is a callable pytree.

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

from oreal_jax.model.attention import ATTENDED, attend_part

# (heads, tokens of a row, where [heads, tokens] lie) to an `attend_part` for a device's
# share of the heads and queries, and the specs of its arrays.
Prepare = Callable[[int, int, NamedSharding], tuple[Partial, Any]]

SMALLEST, LARGEST = 128, 1024  # blocks of queries and of keys


def plain(heads: int, length: int, where: NamedSharding) -> tuple[Partial, Any]:
    """XLA, on any device."""
    return Partial(attend_part), Partial(attend_part)


def on_cpu(heads: int, length: int, where: NamedSharding) -> tuple[Partial, Any]:
    """XLA in smaller blocks: fewer keys are visited in vain, and larger products are
    hardly faster there."""
    attend = Partial(functools.partial(attend_part, block=64))
    return attend, attend


def on_tpu(
    heads: int, length: int, where: NamedSharding, *, interpret: bool = False
) -> tuple[Partial, Any]:
    """Splash attention with segment ids."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    own_heads, own = where.shard_shape((heads, length))
    queries, keys = _block(own), _block(length)
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
        head_shards=heads // own_heads,
        q_seq_shards=length // own,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    lies = kernel.manual_sharding_spec(where)
    return Partial(_splash, kernel), Partial(_splash, lies)


def _splash(kernel, query, key, value, of_queries, segments, first):
    """`attend_part` by a prepared kernel, which knows `first` by its own arrays."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    ids = splash.SegmentIds(of_queries, segments)
    attended = jax.vmap(kernel)(
        heads_first(query * query.shape[-1] ** -0.5),
        heads_first(key),
        heads_first(value),
        ids,
    )
    return heads_first(attended)


def on_gpu(
    heads: int, length: int, where: NamedSharding, *, interpret: bool = False
) -> tuple[Partial, Any]:
    """Flash attention in Triton; each device needs whole rows."""
    attend = Partial(functools.partial(_triton, interpret=interpret))
    return attend, attend


def repeat_heads(x: Float[Array, "B S G K"], repeats: int) -> Float[Array, "B S H K"]:
    """Every head `repeats` times; their gradients are summed in float32."""
    return jnp.repeat(x.astype(jnp.float32), repeats, axis=2).astype(x.dtype)


def _triton(query, key, value, of_queries, segments, first, *, interpret):
    from jax.experimental.pallas.ops.gpu import attention as triton

    repeats = query.shape[2] // key.shape[2]
    return _naming(triton.mha)(
        query,
        repeat_heads(key, repeats),
        repeat_heads(value, repeats),
        segments,
        sm_scale=query.shape[-1] ** -0.5,
        causal=True,
        interpret=interpret,
    )


def _naming(kernel: Any) -> Callable:
    """`triton.mha` with names for its output and its log of the sum of exponentials,
    which its gradient reads. Without names `remat` cannot keep them, and the backward
    pass would run the kernel again."""

    def forward(*arguments):
        out, (*inputs, _, log_total) = kernel.fwd(*arguments)
        out, log_total = (checkpoint_name(x, ATTENDED) for x in (out, log_total))
        return out, (*inputs, out, log_total)

    named = jax.custom_vjp(kernel.fun, nondiff_argnums=kernel.nondiff_argnums)
    named.defvjp(forward, kernel.bwd)
    return named


def prepare_for(platform: str, length: int, context: int) -> Prepare:
    """What attends fastest on a platform, where its blocks fit the shape."""
    fits = length % (SMALLEST * context) == 0
    if platform == "tpu" and fits:
        return on_tpu
    if platform in ("gpu", "cuda") and fits and context == 1:
        return on_gpu
    return on_cpu if platform == "cpu" else plain


def _block(length: int) -> int:
    """The largest block that divides a length."""
    size = LARGEST
    while length % size:
        size //= 2
    return size
