"""Choosing the next token: bias, penalties, temperature, top-k, top-p, min-p, then
uniform numbers.

The vocabulary is never sorted. A token is found by inverting the cumulative
distribution in two levels; whether it lies in the nucleus, by one sum over what is
likelier.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from oreal_jax.errors import BadInput
from oreal_jax.model import Distribution

BLOCK = 256  # tokens per block of the two-level cumulative sum
# Drawing anew until a token is inside is for nuclei that hold at least this much; after
# so many misses (2^-100) it is the likeliest token.
WIDE, MOST_ATTEMPTS = 0.5, 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0
    are off. Each leaves fewer tokens than the one before: top_k the likeliest k, top_p
    the likeliest that hold so much of what is left, min_p (arXiv:2407.01082) those at
    least so likely as that share of the likeliest.

    `logit_bias` is added to the logits of these tokens: (token, bias) pairs. Penalties
    come next: `repetition_penalty` (arXiv:1909.05858) divides positive logits of tokens
    that prompt or completion have, and multiplies negative ones; `presence_penalty` is
    taken from the logits of tokens that the completion has, `frequency_penalty` once
    for each time it has them (OpenAI's definitions).

    Raises:
        BadInput: a value outside its range.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self):
        for name, value, fits, range_ in [
            ("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: off)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0,
                "above 0 (1: off)",
            ),
        ]:
            if not fits:
                raise BadInput(f"sampling: {name}={value} must be {range_}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                value = getattr(self, name)
                raise BadInput(f"sampling: {name}={value} must be finite")
        for token, value in self.logit_bias:
            if token < 0:
                raise BadInput(f"sampling: logit_bias: no token {token}")
            if not value < math.inf:  # -inf bans a token
                raise BadInput(f"sampling: logit_bias of token {token} is {value}")

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on those before it, beyond the model."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class Seen(NamedTuple):
    """What penalties look at: tokens of the prompt, and how often each was drawn."""

    prompt: Bool[Array, "B V"]
    drawn: Int[Array, "B V"]


class Chosen(NamedTuple):
    """A token a row. `log_prob` is that of the full, untempered model, `sampled` that
    of the distribution it was drawn from (0 where greedy)."""

    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    sampled: Float[Array, "B"]


def choose(
    logits: Float[Array, "B V"],
    keys: UInt32[Array, "B 2"],
    sampling: Sampling,
    seen: Seen | None = None,
    *,
    renormalise: bool = True,
) -> Chosen:
    """Draws a token of every row; row b's depends on its logits, key and `seen` alone.

    A wide nucleus is not searched for: a token is drawn of all, and drawn anew where
    more than `top_p` of the mass is likelier than it is. Its log-probability within the
    nucleus needs the nucleus; without `renormalise` it is not computed (but 0).
    """
    scores = penalised(biased(logits, sampling), sampling, seen)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    if sampling.temperature == 0:
        token = first_where(scores == highest)
        log_prob = _log_prob(logits, token)
        return Chosen(token, log_prob, jnp.zeros_like(log_prob))
    # A barrier, so that what follows reads these numbers and does not redo them.
    weights = jax.lax.optimization_barrier(
        jnp.exp((scores - highest) / sampling.temperature)
    )
    if sampling.top_k:
        weights = only_top_k(weights, sampling.top_k)
    sums = block_sums(weights)
    mass = sampling.top_p * jnp.sum(sums, axis=-1)
    if sampling.min_p:
        weights = jnp.where(weights >= sampling.min_p, weights, 0)
        sums = block_sums(weights)
    if sampling.top_p < WIDE:
        weights = only_nucleus(weights, mass)
        sums = block_sums(weights)
    token = draw(weights, sums, keys, mass if WIDE <= sampling.top_p < 1 else None)
    pick = lambda values: jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]
    log_prob = _log_prob(logits, token)
    if not renormalise:
        return Chosen(token, log_prob, jnp.zeros_like(log_prob))
    kept = only_nucleus(weights, mass) if sampling.top_p < 1 else weights
    sampled = jnp.log(pick(weights)) - jnp.log(jnp.sum(kept, axis=-1))
    return Chosen(token, log_prob, sampled)


def _log_prob(logits: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    highest = jnp.max(logits, axis=-1, keepdims=True)
    total = jnp.sum(jnp.exp(logits - highest), axis=-1)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)
    return (chosen - highest)[:, 0] - jnp.log(total)


def biased(
    logits: Float[Array, "*batch V"], sampling: Sampling
) -> Float[Array, "*batch V"]:
    """Logits with `logit_bias` added."""
    if not sampling.logit_bias:
        return logits
    tokens, values = zip(*sampling.logit_bias, strict=True)
    return logits.at[..., jnp.array(tokens)].add(jnp.array(values))


def penalised(
    logits: Float[Array, "B V"], sampling: Sampling, seen: Seen | None
) -> Float[Array, "B V"]:
    """Logits after the penalties."""
    if seen is None or not sampling.penalises:
        return logits
    if sampling.repetition_penalty != 1:
        factor = jnp.where(
            logits > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty
        )
        logits = jnp.where(seen.prompt | (seen.drawn > 0), logits * factor, logits)
    presence = sampling.presence_penalty * (seen.drawn > 0)
    return logits - presence - sampling.frequency_penalty * seen.drawn


def draw(
    weights: Float[Array, "B V"],
    sums: Float[Array, "B C"],
    keys: UInt32[Array, "B 2"],
    mass: Float[Array, "B"] | None,
) -> Int[Array, "B"]:
    """A token of every row, in proportion to its weight; of the nucleus of this `mass`
    alone, where one is given. `sums` are the weights' `block_sums`.

    Rows whose token lies outside draw again, each with numbers of its own; the nucleus
    holds most of the mass, so few do.
    """

    def attempt(state):
        number, token, accepted = state
        uniform = jax.vmap(lambda key: _uniform(key, number))(keys)
        drawn = invert(weights, sums, uniform)
        inside = jnp.ones_like(accepted)
        if mass is not None:
            weight = jnp.take_along_axis(weights, drawn[:, None], axis=-1)
            inside = jnp.sum(weights, axis=-1, where=weights > weight) < mass
        token = jnp.where(inside & ~accepted, drawn, token)
        return number + 1, token, accepted | inside

    # The likeliest token is inside whatever rounding says.
    likeliest = first_where(weights == jnp.max(weights, axis=-1, keepdims=True))
    none = jnp.zeros(weights.shape[0], bool)
    going = lambda state: ~jnp.all(state[2]) & (state[0] < MOST_ATTEMPTS)
    return jax.lax.while_loop(going, attempt, (0, likeliest, none))[1]


def _uniform(key: UInt32[Array, "2"], number) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), number))


def sampled_from(sampling: Sampling) -> Distribution:
    """Scores of the distribution that `sampling` draws from, for a trainer that wants
    the probabilities of the policy that acts: biased, tempered, and renormalised over
    the kept tokens. Penalties are not in it: they depend on what came before.

    The kept set is a constant to gradients. The target is always in it: rounding may
    tell the trainer's last kept token from the sampler's.
    """

    def scores(
        logits: Float[Array, "B C V"], targets: Int[Array, "B C"]
    ) -> Float[Array, "B C V"]:
        logits = biased(logits, sampling)
        flat = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
        kept = (truncated(flat, sampling) > 0).reshape(logits.shape)
        kept |= jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
        # Finite, so that the entropy has no 0 times infinity.
        lowest = jnp.finfo(logits.dtype).min
        return jnp.where(kept, logits / sampling.temperature, lowest)

    return scores


def truncated(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered weights, 0 for what is not drawn (unnormalised)."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp((logits - highest) / sampling.temperature)
    if sampling.top_k:
        weights = only_top_k(weights, sampling.top_k)
    if sampling.top_p < 1:
        mass = sampling.top_p * jnp.sum(block_sums(weights), axis=-1)
        weights = only_nucleus(weights, mass)
    return jnp.where(weights >= sampling.min_p, weights, 0)


def only_top_k(weights: Float[Array, "B V"], k: int) -> Float[Array, "B V"]:
    """The k largest weights (more where they tie), 0 elsewhere."""
    count = lambda threshold: jnp.sum(weights >= threshold[:, None], axis=-1)
    enough = jnp.full(weights.shape[0], min(k, weights.shape[-1]))
    exactly = lambda low, above_low, above_high: above_low == enough
    return jnp.where(weights >= _bisect(count, enough, exactly)[:, None], weights, 0)


def only_nucleus(
    weights: Float[Array, "B V"], mass: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """The likeliest tokens that hold `mass` (arXiv:1904.09751), 0 elsewhere; all where
    there is less. The smallest kept weight is found by bisection."""
    above = lambda threshold: jnp.sum(
        weights, axis=-1, where=weights >= threshold[:, None]
    )
    # Every token between two thresholds weighs at least the lower one.
    single = lambda low, above_low, above_high: above_low - above_high < 2 * low
    return jnp.where(weights >= _bisect(above, mass, single)[:, None], weights, 0)


def _bisect(
    above: Callable[[Float[Array, "B"]], Shaped[Array, "B"]],
    enough: Shaped[Array, "B"],
    settled: Callable[[Array, Array, Array], Bool[Array, "B"]],
) -> Float[Array, "B"]:
    """A threshold above which there is `enough`, and above whose next larger weight
    there is not. The largest weight is 1.

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
        return jnp.any(~done & (high - low > 1))

    low = jnp.zeros(enough.shape, jnp.int32)
    high = jnp.full(enough.shape, 0x3F800001, jnp.int32)  # just above 1.0
    start = (low, high, above(as_float(low)), jnp.zeros_like(enough))
    return as_float(jax.lax.while_loop(open_, halve, start)[0])


def block_sums(weights: Float[Array, "B V"]) -> Float[Array, "B C"]:
    """Sums of blocks of `BLOCK` tokens."""
    return jnp.sum(_blocks(weights), axis=-1)


def _blocks(values: Shaped[Array, "B V"]) -> Shaped[Array, "B C block"]:
    padded = jnp.pad(values, ((0, 0), (0, -values.shape[1] % BLOCK)))
    return padded.reshape(values.shape[0], -1, BLOCK)


def first_where(mask: Bool[Array, "B V"]) -> Int[Array, "B"]:
    """The first token where the mask holds; looked for by block, as an argmax over the
    whole vocabulary is slow on CPU."""
    blocks = _blocks(mask)
    block = jnp.argmax(jnp.any(blocks, axis=-1), axis=-1)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + jnp.argmax(inside, axis=-1)


def invert(
    weights: Float[Array, "B V"],
    sums: Float[Array, "B C"],
    uniform: Float[Array, "B"],
) -> Int[Array, "B"]:
    """The token at which the running sum of `weights` passes `uniform` of the total;
    `sums` are the weights' `block_sums`."""
    B, _ = weights.shape
    block, rest = _pass(sums, uniform, None)
    columns = block[:, None] * BLOCK + jnp.arange(BLOCK)[None]
    inside = jnp.take_along_axis(
        weights, columns, axis=1, mode="fill", fill_value=0
    ).reshape(B, BLOCK)
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
