"""Truncation by thresholds and sampling by inversion, without sorting.

Weights are unnormalised probabilities. A threshold is found by bisection; a cumulative
distribution is inverted in two levels: over the sums of blocks, then within one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

BLOCK = 256  # tokens per block of the two-level cumulative sum


def mask_below(
    weights: Float[Array, "B V"], threshold: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Set weights below the threshold to 0."""
    return jnp.where(weights >= threshold[:, None], weights, 0)


def top_k_threshold(
    weights: Float[Array, "B V"], k: Int[Array, "B"], active: Bool[Array, "B"]
) -> Float[Array, "B"]:
    """Return a threshold that the k largest weights of each active row reach.

    More than k reach it if they tie. 0 for inactive rows.
    """
    count = lambda threshold: jnp.sum(weights >= threshold[:, None], axis=-1)
    limit = jnp.minimum(k, weights.shape[-1])
    is_exact = lambda low, above_low, above_high: above_low == limit
    return _bisect(count, limit, is_exact, active)


def nucleus_threshold(
    weights: Float[Array, "B V"],
    minimum: Float[Array, "B"],
    mass: Float[Array, "B"],
    active: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """Return a threshold that selects the nucleus (arXiv:1904.09751).

    The nucleus is the likeliest tokens that hold `mass`, among those of at least
    `minimum`. `minimum` where these hold less, and for inactive rows.
    """
    clip = lambda threshold: jnp.maximum(threshold, minimum)
    mass_above = lambda x: jnp.sum(mask_below(weights, clip(x)), axis=-1)
    # Every token between two thresholds weighs at least the lower one.
    is_single = lambda low, above_low, above_high: above_low - above_high < 2 * low
    return clip(_bisect(mass_above, mass, is_single, active))


def _bisect(
    above: Callable[[Float[Array, "B"]], Shaped[Array, "B"]],
    required: Shaped[Array, "B"],
    is_settled: Callable[[Array, Array, Array], Bool[Array, "B"]],
    active: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """Return the largest threshold with `above(threshold) >= required`, up to ties.

    0 for inactive rows; the largest weight is 1. Bisects the bit patterns of
    non-negative floats, which are ordered like the floats themselves, until the bounds
    are neighbours or `is_settled(low, above(low), above(high))`: no two weights lie
    between them.
    """
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(bounds):
        low, high, above_low, above_high = bounds
        middle = (low + high) // 2
        above_middle = above(as_float(middle))
        is_enough = above_middle >= required
        return (
            jnp.where(is_enough, middle, low),
            jnp.where(is_enough, high, middle),
            jnp.where(is_enough, above_middle, above_low),
            jnp.where(is_enough, above_high, above_middle),
        )

    def is_open(bounds):
        low, high, above_low, above_high = bounds
        settled = is_settled(as_float(low), above_low, above_high)
        return jnp.any(active & ~settled & (high - low > 1))

    low = jnp.zeros(required.shape, jnp.int32)
    high = jnp.full(required.shape, 0x3F800001, jnp.int32)  # just above 1.0
    start = (low, high, above(as_float(low)), jnp.zeros_like(required))
    threshold = as_float(jax.lax.while_loop(is_open, halve, start)[0])
    return jnp.where(active, threshold, 0)


def block_sums(weights: Float[Array, "B V"]) -> Float[Array, "B C"]:
    """Return the sums of blocks of `BLOCK` tokens."""
    return jnp.sum(_blocks(weights, 0.0), axis=-1)


def _blocks(values: Float[Array, "B V"], fill: float) -> Float[Array, "B C block"]:
    width = ((0, 0), (0, -values.shape[1] % BLOCK))
    padded = jnp.pad(values, width, constant_values=fill)
    return padded.reshape(values.shape[0], -1, BLOCK)


def largest(
    scores: Float[Array, "B V"],
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    """Return the largest score and the first token that has it.

    By blocks, because an argmax over the whole vocabulary is slow on CPU.
    """
    blocks = _blocks(scores, -jnp.inf)
    by_block = jnp.max(blocks, axis=-1)
    highest, block = jnp.max(by_block, axis=-1), jnp.argmax(by_block, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return highest, block * BLOCK + jnp.argmax(inside, axis=-1)


def invert(
    weights: Float[Array, "B V"],
    threshold: Float[Array, "B"],
    sums: Float[Array, "B C"],
    uniform: Float[Array, "B"],
) -> Int[Array, "B"]:
    """Return the token at the `uniform` quantile of the weights above the threshold.

    That is where their running sum exceeds this fraction of the total. `sums` are their
    `block_sums`.
    """
    B, _ = weights.shape
    running = jnp.cumsum(sums, axis=-1)
    block, target = _first_above(sums, running, uniform * running[:, -1])
    columns = block[:, None] * BLOCK + jnp.arange(BLOCK)[None]
    inside = jnp.take_along_axis(
        weights, columns, axis=1, mode="fill", fill_value=0
    ).reshape(B, BLOCK)
    inside = mask_below(inside, threshold)
    token, _ = _first_above(inside, jnp.cumsum(inside, axis=-1), target)
    return block * BLOCK + token


def _first_above(
    weights: Float[Array, "B N"],
    running: Float[Array, "B N"],
    target: Float[Array, "B"],
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Return the first index whose running sum exceeds the target, and the remainder.

    The remainder is the target minus the sum before the index. Rounding can put the
    target below the sum before a block or above its last sum, and running sums by a
    tree are not monotonic: no index of weight 0 is returned whatever the target, and
    the last positive one where no sum exceeds it.
    """
    positive = weights > 0
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    exceeds = positive & (running > target[:, None])
    candidates = jnp.where(exceeds, jnp.arange(weights.shape[-1]), last[:, None])
    index = jnp.min(candidates, axis=-1)
    before = jnp.take_along_axis(running - weights, index[:, None], axis=-1)[:, 0]
    return index, target - before
