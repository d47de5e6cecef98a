"""The heads: logits, log-probabilities without an array of all logits, token scores.

The vocabulary head is applied to chunks of tokens in both passes, so no [B, C, V] array
ever exists. The backward pass computes a chunk's logits again, and stores their
log-sum-exp and entropy. The gradient of the head is summed in float32.

Letters: B rows, C predicted tokens per row, D embed, V vocabulary; m chunks of c
predicted tokens.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from oreal_jax.model.config import ModelConfig
from oreal_jax.model.execution import ONE_DEVICE, Execution

# Maps logits [B, C, V] and targets [B, C] to scores [B, C, V], whose softmax is meant.
Distribution = Callable[[Array, Array], Array]
full_softmax: Distribution = lambda logits, targets: logits

# Rows of logits that a device holds at once when log-probabilities are computed.
HEAD_CHUNK = 1024


def head_name(config: ModelConfig) -> str:
    """Return the name of the weight of the logits: [V, D] if tied, else [D, V]."""
    return "embedding" if config.tied else "head"


def logits(
    config: ModelConfig, params: Any, states: Float[Array, "B C D"]
) -> Float[Array, "B C V"]:
    """Return next-token logits, in float32."""
    return _logits(_head_weight(config, params), states)


def _head_weight(config: ModelConfig, params: Any) -> Float[Array, "D V"]:
    weight = params[head_name(config)]
    return weight.T if config.tied else weight


def _logits(weight: Float[Array, "D V"], states: Array) -> Array:
    weight = weight.astype(states.dtype)
    return jnp.einsum("bcd,dv->bcv", states, weight, preferred_element_type=jnp.float32)


def token_scores(params: Any, states: Float[Array, "B C D"]) -> Float[Array, "B C"]:
    """Return the raw scores of a token reward model, in float32."""
    states, score = (x.astype(jnp.float32) for x in (states, params["score"]))
    return jnp.einsum("bcd,d->bc", states, score, precision="highest")


def log_probs(
    config: ModelConfig,
    params: Any,
    states: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    distribution: Distribution = full_softmax,
    execution: Execution = ONE_DEVICE,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Return the log-probability of each target, and the entropy at it.

    Both are of the softmax of `distribution(logits, targets)`.
    """
    B, C = targets.shape
    shards = execution.context_shards
    max_chunk = max(1, HEAD_CHUNK * execution.row_shards // B)
    count = -(-C // (shards * max_chunk))
    chunk = -(-C // (shards * count))
    pad = shards * count * chunk - C

    def split(x):
        """Split [B, C, ...] into [count, B, shards * chunk, ...].

        Each device that has a part of the columns has a part of every chunk.
        """
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        x = jnp.moveaxis(x.reshape(B, shards, count, chunk, *x.shape[2:]), 2, 0)
        return x.reshape(count, B, shards * chunk, *x.shape[4:])

    def join(x):
        x = jnp.moveaxis(x.reshape(count, B, shards, chunk), 0, 2)
        return x.reshape(B, shards * count * chunk)[:, :C]

    weight = _head_weight(config, params)
    outputs: Any = _in_chunks(
        distribution, execution.gather_head, weight, split(states), split(targets)
    )
    return join(outputs[0]), join(outputs[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_chunks(
    distribution: Distribution,
    gather_head: Callable,
    weight: Float[Array, "D V"],
    states: Float[Array, "m B c D"],
    targets: Int[Array, "m B c"],
) -> tuple[Float[Array, "m B c"], Float[Array, "m B c"]]:
    return _forward(distribution, gather_head, weight, states, targets)[0]


def _is_target(scores: Array, targets: Array) -> Array:
    # A comparison, not a gather: each device reads its own part of the vocabulary.
    return jnp.arange(scores.shape[-1])[None, None] == targets[..., None]


def _forward(distribution, gather_head, weight, states, targets):
    """Return log-probabilities and entropies, and the residuals."""
    gathered = gather_head(weight.astype(states.dtype))  # once, not in every chunk

    @jax.named_scope("head")
    def score(chunk):
        states, targets = chunk
        scores = distribution(_logits(gathered, states), targets)
        highest = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - highest[..., None])
        chosen = jnp.where(_is_target(scores, targets), scores, 0)
        # All sums in one pass over the scores.
        total, weighted, chosen = jax.lax.reduce(
            (weights, weights * scores, chosen),
            (jnp.float32(0),) * 3,
            lambda sums, terms: jax.tree.map(jnp.add, sums, terms),
            (2,),
        )
        log_total = highest + jnp.log(total)
        return chosen - log_total, log_total - weighted / total, log_total

    log_probs, entropy, log_total = jax.lax.map(score, (states, targets))
    residuals = (weight, gathered, states, targets, log_total, entropy)
    return (log_probs, entropy), residuals


def _backward(distribution, gather_head, residuals, grads):
    """Return the gradients of weight and states.

    With p = softmax(scores) and entropy H, the gradients with respect to the scores are
    1[target] - p of a log-probability and -p (log p + H) of an entropy.
    """
    weight, gathered, *chunks = residuals

    @jax.named_scope("head")
    def pull_back(grad_weight, chunk):
        states, targets, *per_token = chunk
        log_total, entropy, grad_log_prob, grad_entropy = (
            x[..., None] for x in per_token
        )
        scores, pull_distribution = jax.vjp(
            lambda logits: distribution(logits, targets), _logits(gathered, states)
        )
        log_p = scores - log_total
        p = jnp.exp(log_p)
        grad_scores = grad_log_prob * (_is_target(scores, targets) - p)
        grad_scores -= grad_entropy * p * (log_p + entropy)
        grad_logits = pull_distribution(grad_scores)[0].astype(states.dtype)
        grad_weight += jnp.einsum(
            "bcd,bcv->dv", states, grad_logits, preferred_element_type=jnp.float32
        )
        return grad_weight, jnp.einsum("bcv,dv->bcd", grad_logits, gathered)

    start = jnp.zeros(weight.shape, jnp.float32)
    grad_weight, grad_states = jax.lax.scan(pull_back, start, (*chunks, *grads))
    return grad_weight.astype(weight.dtype), grad_states, None


_in_chunks.defvjp(_forward, _backward)
