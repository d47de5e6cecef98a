"""The vocabulary head: logits, and log-probabilities without an array of all logits.

The vocabulary is visited in chunks of tokens, forwards and backwards, so no [B, C, V]
array exists at any time. Of a chunk the gradient needs the log of its sum of
exponentials and the entropy; the logits are computed again. The gradient of the head
is added up in float32.

Letters: B rows, C predicting tokens a row, D embed, V vocabulary; m chunks of c tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig
from oreal_jax.model.execution import ALONE, Execution

# [B, C, V] logits and [B, C] targets to scores of the same shape.
Distribution = Callable[[Array, Array], Array]
full: Distribution = lambda logits, targets: logits

# Rows of logits alive at a time on a device when log-probabilities are taken.
HEAD_CHUNK = 1024


def head_name(config: ModelConfig) -> str:
    """The weight that gives the logits: [V, D] where tied, else [D, V]."""
    return "embedding" if config.tied else "head"


def logits(
    config: ModelConfig, params: Any, states: Float[Array, "B C D"]
) -> Float[Array, "B C V"]:
    """Next-token logits, in float32."""
    weight = params[head_name(config)]
    return _logits(weight.T if config.tied else weight, states)


def _logits(weight: Float[Array, "D V"], states: Array) -> Array:
    weight = weight.astype(states.dtype)
    return jnp.einsum("bcd,dv->bcv", states, weight, preferred_element_type=jnp.float32)


def log_probs(
    config: ModelConfig,
    params: Any,
    states: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    distribution: Distribution = full,
    execution: Execution = ALONE,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Log-probability of each target, and the entropy of its distribution.

    `distribution(logits, targets)` gives the scores whose softmax is meant; the model's
    own unless another is asked for.
    """
    B, C = targets.shape
    ways = execution.column_ways
    most = max(1, HEAD_CHUNK * execution.row_ways // B)
    count = -(-C // (ways * most))
    chunk = -(-C // (ways * count))
    pad = ways * count * chunk - C

    def split(x):
        """[B, C, ...] to [count, B, ways * chunk, ...]: a part of every chunk lies on
        each of the devices that share the columns."""
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(B, ways, count, chunk, *x.shape[2:]), 2, 0)
        return x.reshape(count, B, ways * chunk, *x.shape[4:])

    def join(x):
        x = jnp.moveaxis(x.reshape(count, B, ways, chunk), 0, 2)
        return x.reshape(B, ways * count * chunk)[:, :C]

    weight = params[head_name(config)]
    weight = weight.T if config.tied else weight
    outputs: Any = _in_chunks(
        distribution, execution.gather, weight, split(states), split(targets)
    )
    return join(outputs[0]), join(outputs[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    distribution: Distribution,
    gather: Callable,
    weight: Float[Array, "D V"],
    states: Float[Array, "m B c D"],
    targets: Int[Array, "m B c"],
) -> tuple[Float[Array, "m B c"], Float[Array, "m B c"]]:
    return _forward(distribution, gather, weight, states, targets)[0]


def _is_target(scores: Array, targets: Array) -> Array:
    # A comparison, not a gather: each device looks at its own part of the vocabulary.
    return jnp.arange(scores.shape[-1])[None, None] == targets[..., None]


def _forward(distribution, gather, weight, states, targets):
    """The outcome, and what the gradient needs."""
    used = gather(weight.astype(states.dtype))  # once, not in every chunk

    @jax.named_scope("head")
    def one(chunk):
        states, targets = chunk
        scores = distribution(_logits(used, states), targets)
        top = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - top[..., None])
        chosen = jnp.where(_is_target(scores, targets), scores, 0)
        # All sums in one pass over the scores.
        total, weighted, chosen = jax.lax.reduce(
            (weights, weights * scores, chosen),
            (jnp.float32(0),) * 3,
            lambda sums, more: jax.tree.map(jnp.add, sums, more),
            (2,),
        )
        log_total = top + jnp.log(total)
        return chosen - log_total, log_total - weighted / total, log_total

    log_probs, entropy, log_total = jax.lax.map(one, (states, targets))
    kept = (weight, used, states, targets, log_total, entropy)
    return (log_probs, entropy), kept


def _backward(distribution, gather, kept, slopes):
    """With p = softmax(scores) and entropy H, the gradients by scores are 1[target] - p
    of a log-probability and -p (log p + H) of an entropy."""
    weight, used, *of_chunks = kept

    @jax.named_scope("head")
    def one(of_weight, chunk):
        states, targets, *of_tokens = chunk
        log_total, entropy, of_log_prob, of_entropy = (x[..., None] for x in of_tokens)
        scores, pull = jax.vjp(
            lambda logits: distribution(logits, targets), _logits(used, states)
        )
        log_p = scores - log_total
        p = jnp.exp(log_p)
        of_scores = of_log_prob * (_is_target(scores, targets) - p)
        of_scores -= of_entropy * p * (log_p + entropy)
        slope = pull(of_scores)[0].astype(states.dtype)
        of_weight += jnp.einsum(
            "bcd,bcv->dv", states, slope, preferred_element_type=jnp.float32
        )
        return of_weight, jnp.einsum("bcv,dv->bcd", slope, used)

    start = jnp.zeros(weight.shape, jnp.float32)
    of_weight, of_states = jax.lax.scan(one, start, (*of_chunks, *slopes))
    return of_weight.astype(weight.dtype), of_states, None


_in_chunks.defvjp(_forward, _backward)
