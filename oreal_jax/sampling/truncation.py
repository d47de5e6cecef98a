"""Truncation by thresholds and sampling by inversion, without sorting.

Weights are unnormalized probabilities. A threshold is found by bisection; a cumulative
distribution is inverted in two levels: over the sums of blocks, then within one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

BLOCK = 256  # tokens per block of the two-level cumulative sum


def keep_above(
    weights: Float[Array, "B V"], lowest: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Weights of at least `lowest`, 0 elsewhere."""
    return jnp.where(weights >= lowest[:, None], weights, 0)


def top_k_threshold(
    weights: Float[Array, "B V"], k: Int[Array, "B"], active: Bool[Array, "B"]
) -> Float[Array, "B"]:
    """A threshold that the k largest weights of each active row reach (more than k if
    they tie), 0 for the others."""
    count = lambda threshold: jnp.sum(weights >= threshold[:, None], axis=-1)
    enough = jnp.minimum(k, weights.shape[-1])
    exactly = lambda low, above_low, above_high: above_low == enough
    return _bisect(count, enough, exactly, active)


def nucleus_threshold(
    weights: Float[Array, "B V"],
    lowest: Float[Array, "B"],
    mass: Float[Array, "B"],
    active: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """A threshold that selects the nucleus: the likeliest tokens that hold `mass`
    (arXiv:1904.09751), among those of at least `lowest`; `lowest` where the mass is
    less or the row is inactive."""
    least = lambda threshold: jnp.maximum(threshold, lowest)
    above = lambda threshold: jnp.sum(keep_above(weights, least(threshold)), axis=-1)
    # Every token between two thresholds weighs at least the lower one.
    single = lambda low, above_low, above_high: above_low - above_high < 2 * low
    return jnp.maximum(lowest, _bisect(above, mass, single, active))


def _bisect(
    above: Callable[[Float[Array, "B"]], Shaped[Array, "B"]],
    enough: Shaped[Array, "B"],
    settled: Callable[[Array, Array, Array], Bool[Array, "B"]],
    active: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """A threshold above which there is `enough`, and above whose next larger weight
    there is not; 0 for inactive rows. The largest weight is 1.

    Over the bit patterns of non-negative floats, which are ordered like the floats
    themselves, until the two bounds are neighbours or `settled(low, above low, above
    high)` says that they tell the tokens apart.
    """
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(bounds):
        low, high, above_low, above_high = bounds
        middle = (low + high) // 2
        found = above(as_float(middle))
        holds = found >= enough
        return (
            jnp.where(holds, middle, low),
            jnp.where(holds, high, middle),
            jnp.where(holds, found, above_low),
            jnp.where(holds, above_high, found),
        )

    def open_(bounds):
        low, high, above_low, above_high = bounds
        done = settled(as_float(low), above_low, above_high)
        return jnp.any(active & ~done & (high - low > 1))

    low = jnp.zeros(enough.shape, jnp.int32)
    high = jnp.full(enough.shape, 0x3F800001, jnp.int32)  # just above 1.0
    start = (low, high, above(as_float(low)), jnp.zeros_like(enough))
    threshold = as_float(jax.lax.while_loop(open_, halve, start)[0])
    return jnp.where(active, threshold, 0)


def block_sums(weights: Float[Array, "B V"]) -> Float[Array, "B C"]:
    """Sums of blocks of `BLOCK` tokens."""
    return jnp.sum(_blocks(weights, 0.0), axis=-1)


def _blocks(values: Float[Array, "B V"], fill: float) -> Float[Array, "B C block"]:
    width = ((0, 0), (0, -values.shape[1] % BLOCK))
    padded = jnp.pad(values, width, constant_values=fill)
    return padded.reshape(values.shape[0], -1, BLOCK)


def largest(
    scores: Float[Array, "B V"],
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
    """The largest score and the first token that has it; looked for by block, as an
    argmax over the whole vocabulary is slow on CPU."""
    blocks = _blocks(scores, -jnp.inf)
    by_block = jnp.max(blocks, axis=-1)
    highest, block = jnp.max(by_block, axis=-1), jnp.argmax(by_block, axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return highest, block * BLOCK + jnp.argmax(inside, axis=-1)


def invert(
    weights: Float[Array, "B V"],
    lowest: Float[Array, "B"],
    sums: Float[Array, "B C"],
    uniform: Float[Array, "B"],
) -> Int[Array, "B"]:
    """The token at which the running sum of the weights of at least `lowest` exceeds a
    fraction `uniform` of the total; `sums` are their `block_sums`."""
    B, _ = weights.shape
    block, rest = _pass(sums, uniform, None)
    columns = block[:, None] * BLOCK + jnp.arange(BLOCK)[None]
    inside = jnp.take_along_axis(
        weights, columns, axis=1, mode="fill", fill_value=0
    ).reshape(B, BLOCK)
    token, _ = _pass(keep_above(inside, lowest), uniform, rest)
    return block * BLOCK + token


def _pass(weights, uniform, target):
    """The first index of positive weight where the running sum exceeds the target, and
    the target less the sum before it.

    Rounding can put the target below the sum before a block or above its last sum, and
    running sums by a tree are not monotonic: no index of weight 0 is returned whatever
    the target, and the last positive one where no sum exceeds it.
    """
    total = jnp.cumsum(weights, axis=-1)
    target = uniform * total[:, -1] if target is None else target
    positive = weights > 0
    last = weights.shape[-1] - 1 - jnp.argmax(positive[:, ::-1], axis=-1)
    exceeds = positive & (total > target[:, None])
    candidates = jnp.where(exceeds, jnp.arange(weights.shape[-1]), last[:, None])
    index = jnp.min(candidates, axis=-1)
    before = jnp.take_along_axis(total - weights, index[:, None], axis=-1)[:, 0]
    return index, target - before
