"""Packed rows through a model: log-probabilities of completion tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from oreal_jax import model, model_parallel, sharding
from oreal_jax.data.packing import Batch
from oreal_jax.model import ONE_DEVICE, Execution, ModelConfig, Params

Jitted = Any  # callable, with `lower`


def micro_batch(batch: Batch, index) -> Batch:
    """Return micro-batch `index`: the same arrays without their leading axis."""
    take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return Batch(batch.filled, *(take(x) for x in batch[1:]))


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Put a batch on the mesh."""
    return Batch(*map(sharding.put, batch, batch_shardings(mesh)))


def batch_shardings(mesh: Mesh) -> Batch:
    """Return the shardings of a batch: rows are split over the data axes and their
    tokens over the context axis, everything else is replicated."""
    rows = sharding.make_sharding(mesh, None, "rows", "sequence")
    replicated = sharding.replicated(mesh)
    split = {"tokens", "positions", "segments", "predicts", "targets"}
    return Batch(*(rows if name in split else replicated for name in Batch._fields))


def completion_states(
    config: ModelConfig,
    params: Params,
    part: Batch,
    execution: Execution = ONE_DEVICE,
) -> Float[Array, "R C D"]:
    """Return the hidden states that predict completion tokens, row by row."""
    states = model.hidden(
        config, params, part.tokens, part.positions, part.segments, execution
    )
    return jnp.take_along_axis(states, part.predicts[..., None], axis=1)


def unpack(values: Float[Array, "R C"], part: Batch) -> Float[Array, "N T"]:
    """Return one row per completion, 0 after its end."""
    T = part.reference_log_probs.shape[-1]
    column = jnp.minimum(part.first[:, None] + jnp.arange(T)[None], values.shape[1] - 1)
    inside = jnp.arange(T)[None] < part.length[:, None]
    return jnp.where(inside, values[part.row[:, None], column], 0)


def completion_log_probs(
    config: ModelConfig,
    params: Params,
    part: Batch,
    distribution: model.Distribution = model.full_softmax,
    execution: Execution = ONE_DEVICE,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], Float[Array, "N T"] | None]:
    """Return the log-probability of every completion token and the entropy at each;
    also the log-probabilities of the full distribution if `distribution` is another,
    by a second pass of the head."""
    states = completion_states(config, params, part, execution)

    def score(distribution: model.Distribution) -> list[Float[Array, "N T"]]:
        scores = model.log_probs(
            config, params, states, part.targets, distribution, execution
        )
        return [unpack(x, part) for x in scores]

    log_probs, entropy = score(distribution)
    full = None if distribution is model.full_softmax else score(model.full_softmax)[0]
    return log_probs, entropy, full


def make_reference_scorer(config: ModelConfig, mesh: Mesh, dtype) -> Jitted:
    """Return a jitted function of parameters and batch: the batch with the reference
    model's log-probabilities filled in."""
    execution = model_parallel.make_execution(mesh)

    def score(params: Params, batch: Batch) -> Batch:
        params = model.cast(params, dtype)

        def add(index, log_probs):
            values, *_ = completion_log_probs(
                config, params, micro_batch(batch, index), execution=execution
            )
            return log_probs.at[index].set(values)

        empty = jnp.zeros_like(batch.reference_log_probs)
        log_probs = jax.lax.fori_loop(0, batch.filled, add, empty)
        return batch._replace(reference_log_probs=log_probs)

    return jax.jit(
        model.exact_matmuls(score, dtype), out_shardings=batch_shardings(mesh)
    )
