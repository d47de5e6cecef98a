"""Choosing the next token: temperature, top-k, top-p, then one uniform number a row.

The vocabulary is never sorted. The smallest kept probability is found among the most
likely tokens, or, for flat distributions, by bisection; the token by inverting the
cumulative distribution in two levels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from oreal_jax.errors import BadInput
from oreal_jax.model import Distribution

CANDIDATES = 64  # tokens looked at before the nucleus is searched by bisection
BLOCK = 256  # tokens per block of the two-level cumulative sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off.

    Raises:
        BadInput: a value outside its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        for name, value, fits, range_ in [
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: off)"),
        ]:
            if not fits:
                raise BadInput(f"sampling: {name}={value} must be {range_}")


def choose(
    logits: Float[Array, "B V"], keys: UInt32[Array, "B 2"], sampling: Sampling
) -> tuple[Int[Array, "B"], Float[Array, "B"], Float[Array, "B"]]:
    """One token a row, and its log-probability twice: under the full, untempered model,
    and under the distribution that it was drawn from (0 where greedy)."""
    pick = lambda values: jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]
    if sampling.temperature == 0:
        token = jnp.argmax(logits, axis=-1)
        sampled = jnp.zeros_like(logits[:, 0])
    else:
        kept = truncated(logits, sampling)
        uniform = jax.vmap(jax.random.uniform)(jax.random.wrap_key_data(keys))
        token = invert(kept, uniform)
        sampled = jnp.log(pick(kept)) - jnp.log(jnp.sum(kept, axis=-1))
    return token, pick(logits) - jax.nn.logsumexp(logits, axis=-1), sampled


def sampled_from(sampling: Sampling) -> Distribution:
    """Scores of the distribution that `sampling` draws from, for a trainer that wants
    the probabilities of the policy that acts: tempered, and renormalised over the kept
    tokens.

    The kept set is a constant to gradients. The target is always in it: rounding may
    tell the trainer's last kept token from the sampler's.
    """

    def scores(
        logits: Float[Array, "B C V"], targets: Int[Array, "B C"]
    ) -> Float[Array, "B C V"]:
        flat = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
        kept = (truncated(flat, sampling) > 0).reshape(logits.shape)
        kept |= jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
        # Finite, so that the entropy has no 0 times infinity.
        lowest = jnp.finfo(logits.dtype).min
        return jnp.where(kept, logits / sampling.temperature, lowest)

    return scores


def truncated(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered probabilities, 0 outside the top-k and the nucleus (unnormalised)."""
    kept = jax.nn.softmax(logits / sampling.temperature, axis=-1)
    if sampling.top_k:
        size = min(sampling.top_k, logits.shape[-1])
        smallest = jax.lax.top_k(kept, size)[0][:, -1]
        kept = jnp.where(kept >= smallest[:, None], kept, 0)
    if sampling.top_p < 1:
        mass = sampling.top_p * jnp.sum(kept, axis=-1)
        kept = jnp.where(kept >= nucleus(kept, mass)[:, None], kept, 0)
    return kept


def nucleus(
    probabilities: Float[Array, "B V"], mass: Float[Array, "B"]
) -> Float[Array, "B"]:
    """The largest threshold whose upper set still holds `mass` (arXiv:1904.09751)."""
    count = min(CANDIDATES, probabilities.shape[-1])
    best = jax.lax.top_k(probabilities, count)[0]
    short = jnp.cumsum(best, axis=-1) < mass[:, None]
    index = jnp.minimum(jnp.sum(short, axis=-1), count - 1)
    found = jnp.take_along_axis(best, index[:, None], axis=-1)[:, 0]
    return jax.lax.cond(
        jnp.all(~short[:, -1]), lambda: found, lambda: _bisect(probabilities, mass)
    )


def _bisect(
    probabilities: Float[Array, "B V"], mass: Float[Array, "B"]
) -> Float[Array, "B"]:
    """`nucleus` exactly, over the bit patterns of non-negative floats, which are
    ordered like the floats themselves."""
    as_float = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        inside = probabilities >= as_float(middle)[:, None]
        holds = jnp.sum(jnp.where(inside, probabilities, 0), axis=-1) >= mass
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle)

    low = jnp.zeros(mass.shape, jnp.int32)
    high = jnp.full(mass.shape, 0x3F800001, jnp.int32)  # just above 1.0
    return as_float(jax.lax.fori_loop(0, 31, halve, (low, high))[0])


def invert(weights: Float[Array, "B V"], uniform: Float[Array, "B"]) -> Int[Array, "B"]:
    """The token at which the running sum of `weights` passes `uniform` of the total."""
    B, V = weights.shape
    weights = jnp.pad(weights, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    block, rest = _pass(jnp.sum(weights, axis=-1), uniform, None)
    inside = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    token, _ = _pass(inside, uniform, rest)
    return block * BLOCK + token


def _pass(weights, uniform, target):
    """Index where the running sum passes the target, and what the index itself holds
    of it. Rounding can carry the target past the end: the last positive weight then."""
    total = jnp.cumsum(weights, axis=-1)
    target = uniform * total[:, -1] if target is None else target
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    index = jnp.minimum(jnp.sum(total <= target[:, None], axis=-1), last)
    before = jnp.take_along_axis(total - weights, index[:, None], axis=-1)[:, 0]
    return index, target - before
