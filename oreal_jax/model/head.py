"""The vocabulary head: log-probabilities without an array of all logits.

The vocabulary is visited in chunks of tokens, forwards and backwards, so no [B, C, V]
array exists at any time. Of a chunk the gradient needs the log of its sum of
exponentials and the entropy; the logits are computed again.

Letters: m chunks of c tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# [B, C, V] logits and [B, C] targets to scores of the same shape.
Distribution = Callable[[Array, Array], Array]
full: Distribution = lambda logits, targets: logits

Head = Float[Array, "_ _"]  # [V, D] where tied, else [D, V]


def product(states: Float[Array, "B C D"], head: Head, tied: bool) -> Array:
    """Logits, [B, C, V], in float32."""
    form = "bcd,vd->bcv" if tied else "bcd,dv->bcv"
    return jnp.einsum(form, states, head, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_log_probs(
    distribution: Distribution,
    tied: bool,
    head: Head,
    states: Float[Array, "m B c D"],
    targets: Int[Array, "m B c"],
) -> tuple[Float[Array, "m B c"], Float[Array, "m B c"]]:
    """Log-probability of each target under the softmax of what `distribution` makes of
    the logits, and the entropy of that."""
    return _forward(distribution, tied, head, states, targets)[0]


def _is_target(scores: Array, targets: Array) -> Array:
    # A comparison, not a gather: each device looks at its own part of the vocabulary.
    return jnp.arange(scores.shape[-1])[None, None] == targets[..., None]


def _forward(distribution, tied, head, states, targets):
    @jax.named_scope("head")
    def one(chunk):
        states, targets = chunk
        scores = distribution(product(states, head, tied), targets)
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
    return (log_probs, entropy), (head, states, targets, log_total, entropy)


def _backward(distribution, tied, kept, slopes):
    head, *of_chunks = kept

    @jax.named_scope("head")
    def one(of_head, chunk):
        states, targets, *of_tokens = chunk
        log_total, entropy, of_log_prob, of_entropy = (x[..., None] for x in of_tokens)
        scores, pull = jax.vjp(
            lambda logits: distribution(logits, targets), product(states, head, tied)
        )
        log_share = scores - log_total
        share = jnp.exp(log_share)
        here = _is_target(scores, targets)
        slope = of_log_prob * (here - share) - of_entropy * share * (
            log_share + entropy
        )
        slope = pull(slope)[0].astype(states.dtype)
        if tied:
            form, pair, back = "bcv,bcd->vd", (slope, states), "bcv,vd->bcd"
        else:
            form, pair, back = "bcd,bcv->dv", (states, slope), "bcv,dv->bcd"
        of_head += jnp.einsum(form, *pair, preferred_element_type=jnp.float32)
        return of_head, jnp.einsum(back, slope, head)

    nothing = jnp.zeros(head.shape, jnp.float32)
    of_head, of_states = jax.lax.scan(one, nothing, (*of_chunks, *slopes))
    return of_head.astype(head.dtype), of_states, None


chunked_log_probs.defvjp(_forward, _backward)
