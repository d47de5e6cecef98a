"""Choosing the next token: bias, penalties, temperature, top-k, top-p, min-p, then
uniform numbers.

The parameters are arrays over slots, so one compiled program serves every mixture of
requests; a step that no slot needs is skipped (`Uses`). The vocabulary is never sorted.
Truncation is a threshold per slot: tokens of smaller weight are masked. A token is
sampled by inverting the cumulative distribution in two levels; one sum over the
likelier tokens tells whether it is in the nucleus.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from oreal_jax.errors import InputError
from oreal_jax.model import Distribution

BLOCK = 256  # tokens per block of the two-level cumulative sum
# Nuclei of at least mass `WIDE` are sampled by rejection; after `MAX_ATTEMPTS`
# rejections (probability 2^-100) the likeliest token is chosen.
WIDE, MAX_ATTEMPTS = 0.5, 100
# What may be added to a logit, and what it may be multiplied by: within these, biases
# and penalties together stay finite in float32. Infinite logits would be drawn as NaN.
MAX_SHIFT, MAX_FACTOR = 1e30, 1e6


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
        InputError: a value outside its range.
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
            (
                "temperature",
                self.temperature,
                0 <= self.temperature < math.inf,
                "at least 0 and finite",
            ),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0 (0: off)"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                1 / MAX_FACTOR <= self.repetition_penalty <= MAX_FACTOR,
                f"from {1 / MAX_FACTOR} to {MAX_FACTOR} (1: off)",
            ),
        ]:
            if not fits:
                raise InputError(f"sampling: {name}={value} must be {range_}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not abs(value) <= MAX_SHIFT:
                raise InputError(
                    f"sampling: {name}={value} must be from {-MAX_SHIFT} to {MAX_SHIFT}"
                )
        for token, value in self.logit_bias:
            if token < 0:
                raise InputError(f"sampling: logit_bias: no token {token}")
            if not abs(value) <= MAX_SHIFT and value != -math.inf:
                raise InputError(
                    f"sampling: logit_bias of token {token} is {value}; it must be "
                    f"from {-MAX_SHIFT} to {MAX_SHIFT}, or -inf, which bans the token"
                )

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on those before it, beyond the model."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )


class SlotSampling(NamedTuple):
    """`Sampling` as arrays over slots, with K biases per slot (unused ones have a token
    beyond the vocabulary). `renormalise` requests `Chosen.sampled`."""

    temperature: Float[Any, "*B"]
    top_p: Float[Any, "*B"]
    top_k: Int[Any, "*B"]
    min_p: Float[Any, "*B"]
    repetition_penalty: Float[Any, "*B"]
    presence_penalty: Float[Any, "*B"]
    frequency_penalty: Float[Any, "*B"]
    bias_tokens: Int[Any, "*B K"]
    bias_values: Float[Any, "*B K"]
    renormalise: Bool[Any, "*B"]

    @classmethod
    def off(cls, shape: tuple[int, ...], biases: int) -> "SlotSampling":
        """Greedy choice without any option, with room for `biases` per slot."""
        floats = lambda x: np.full(shape, x, np.float32)
        integers = lambda shape, x: np.full(shape, x, np.int32)
        no_token = np.iinfo(np.int32).max
        return cls(
            temperature=floats(0),
            top_p=floats(1),
            top_k=integers(shape, 0),
            min_p=floats(0),
            repetition_penalty=floats(1),
            presence_penalty=floats(0),
            frequency_penalty=floats(0),
            bias_tokens=integers((*shape, biases), no_token),
            bias_values=np.zeros((*shape, biases), np.float32),
            renormalise=np.zeros(shape, bool),
        )

    @classmethod
    def of(
        cls, samplings: Sequence[Sampling], biases: int, renormalise: bool = False
    ) -> "SlotSampling":
        """One slot for each of `samplings`, each with at most `biases` biases."""
        slots = cls.off((len(samplings),), biases)
        for slot, sampling in enumerate(samplings):
            slots.put(slot, sampling, renormalise)
        return slots

    def put(self, slot: Any, sampling: Sampling, renormalise: bool) -> None:
        """Writes one slot of NumPy arrays in place."""
        for name in self._fields:
            if hasattr(sampling, name) and name != "top_k":
                getattr(self, name)[slot] = getattr(sampling, name)
        self.top_k[slot] = min(sampling.top_k, np.iinfo(np.int32).max)
        for k, (token, value) in enumerate(sampling.logit_bias):
            self.bias_tokens[slot][k], self.bias_values[slot][k] = token, value
        self.renormalise[slot] = renormalise


class Uses(NamedTuple):
    """Sampling steps that at least one slot needs. Scalars, the same for all engines of
    a program, so that unneeded steps are skipped, not computed and discarded."""

    adjustment: Bool[Any, ""]  # a bias or a penalty
    random: Bool[Any, ""]  # a temperature above 0
    top_k: Bool[Any, ""]
    narrow: Bool[Any, ""]  # a nucleus found by search
    wide: Bool[Any, ""]  # a nucleus sampled by rejection
    cut: Bool[Any, ""]  # fewer tokens than top-k leaves, before sampling
    exact: Bool[Any, ""]  # the mass of a wide nucleus

    @classmethod
    def of(cls, slots: SlotSampling, running: Bool[Array, "*B"]) -> "Uses":
        """The steps that `running` slots need."""
        needed = lambda slot: jnp.any(slot & running)
        random = slots.temperature > 0
        penalty = (slots.repetition_penalty != 1) | (slots.presence_penalty != 0)
        penalty |= slots.frequency_penalty != 0
        narrow, wide = _nuclei(slots)
        return cls(
            adjustment=needed(penalty | jnp.any(slots.bias_values != 0, axis=-1)),
            random=needed(random),
            top_k=needed(random & (slots.top_k > 0)),
            narrow=needed(narrow),
            wide=needed(wide),
            cut=needed(narrow | (random & (slots.min_p > 0))),
            exact=needed(wide & slots.renormalise),
        )


def _nuclei(slots: SlotSampling) -> tuple[Bool[Array, "*B"], Bool[Array, "*B"]]:
    """Masks of the slots with a narrow nucleus and of those with a wide one."""
    nucleus = (slots.temperature > 0) & (slots.top_p < 1)
    narrow = slots.top_p < WIDE
    return nucleus & narrow, nucleus & ~narrow


class Seen(NamedTuple):
    """What penalties look at: tokens of the prompt, and how often each was drawn."""

    prompt: Bool[Array, "B V"]
    drawn: Int[Array, "B V"]


class Chosen(NamedTuple):
    """A token per row. `log_prob` is that of the full, untempered model, `sampled` that
    of the distribution it was sampled from (0 where greedy or not requested)."""

    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    sampled: Float[Array, "B"]


def choose(
    logits: Float[Array, "B V"],
    uses: Uses,
    keys: UInt32[Array, "B 2"],
    slots: SlotSampling,
    seen: Seen,
) -> Chosen:
    """Chooses a token for every row, from that row's arguments alone.

    A wide nucleus is not searched for: a token is sampled from all, and again where at
    least `top_p` of the mass is likelier. Its log-probability within the nucleus needs
    the mass of the nucleus; without `renormalise` it is not computed.
    """

    # Complete choices as branches: one that returned scores would copy them.
    def choose_by(scores: Float[Array, "B V"]) -> Chosen:
        highest, likeliest = largest(scores)
        token, sampled = jax.lax.cond(
            uses.random,
            lambda: _draw(scores - highest[:, None], likeliest, uses, keys, slots),
            lambda: (likeliest, jnp.zeros(likeliest.shape)),
        )
        if scores is not logits:
            highest, _ = largest(logits)
        total = jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)
        log_prob = _pick(logits, token) - highest - jnp.log(total)
        return Chosen(token, log_prob, sampled)

    return jax.lax.cond(
        uses.adjustment,
        lambda: choose_by(adjusted(logits, slots, seen)),
        lambda: choose_by(logits),
    )


def _pick(values: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]


def adjusted(
    logits: Float[Array, "B V"], slots: SlotSampling, seen: Seen
) -> Float[Array, "B V"]:
    """Logits with biases added and then penalties applied."""
    rows = jnp.arange(len(logits))[:, None]
    logits = logits.at[rows, slots.bias_tokens].add(slots.bias_values, mode="drop")
    repetition = slots.repetition_penalty[:, None]
    factor = jnp.where(logits > 0, 1 / repetition, repetition)
    logits = jnp.where(seen.prompt | (seen.drawn > 0), logits * factor, logits)
    presence = slots.presence_penalty[:, None] * (seen.drawn > 0)
    return logits - presence - slots.frequency_penalty[:, None] * seen.drawn


def _draw(
    scores: Float[Array, "B V"],
    likeliest: Int[Array, "B"],
    uses: Uses,
    keys: UInt32[Array, "B 2"],
    slots: SlotSampling,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples a token where the temperature is above 0, else returns the likeliest;
    also its log-probability where requested. The largest score is 0."""
    random = slots.temperature > 0
    temperature = jnp.where(random, slots.temperature, 1)
    # A barrier, so that the consumers read these numbers and do not recompute them.
    weights = jax.lax.optimization_barrier(jnp.exp(scores / temperature[:, None]))
    zeros = jnp.zeros(len(weights))
    narrow, wide = _nuclei(slots)
    lowest = jax.lax.cond(
        uses.top_k,
        lambda: top_k_threshold(weights, slots.top_k, random & (slots.top_k > 0)),
        lambda: zeros,
    )
    sums = block_sums(_only(weights, lowest))
    mass = slots.top_p * jnp.sum(sums, axis=-1)
    lowest = jnp.maximum(lowest, slots.min_p)  # the largest weight is 1
    lowest = jax.lax.cond(
        uses.narrow,
        lambda: nucleus_threshold(weights, lowest, mass, narrow),
        lambda: lowest,
    )
    sums = jax.lax.cond(
        uses.cut, lambda: block_sums(_only(weights, lowest)), lambda: sums
    )

    def inside(token: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether less than the nucleus' mass is likelier than the token."""
        likelier = weights > _pick(weights, token)[:, None]
        above = jnp.sum(_only(weights, lowest), axis=-1, where=likelier)
        return ~wide | (above < mass)

    def attempt(state):
        number, token, accepted = state
        uniform = jax.vmap(lambda key: _uniform(key, number))(keys)
        candidate = invert(weights, lowest, sums, uniform)
        fits = jax.lax.cond(
            uses.wide, lambda: inside(candidate), lambda: jnp.ones_like(accepted)
        )
        token = jnp.where(fits & ~accepted, candidate, token)
        return number + 1, token, accepted | fits

    # Rows whose token is outside sample again, each with its own random numbers; a wide
    # nucleus holds most of the mass, so few do. The likeliest token is inside whatever
    # the rounding.
    unfinished = lambda state: ~jnp.all(state[2]) & (state[0] < MAX_ATTEMPTS)
    token = jax.lax.while_loop(unfinished, attempt, (0, likeliest, ~random))[1]

    def nucleus_mass():
        return jnp.sum(
            _only(weights, nucleus_threshold(weights, lowest, mass, wide)), axis=-1
        )

    total = jax.lax.cond(uses.exact, nucleus_mass, lambda: jnp.sum(sums, axis=-1))
    sampled = jnp.log(_pick(weights, token)) - jnp.log(total)
    return token, jnp.where(random & slots.renormalise, sampled, 0)


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
        logits = _biased(logits, sampling)
        flat = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
        kept = (truncated(flat, sampling) > 0).reshape(logits.shape)
        kept |= jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
        # Finite, so that the entropy has no 0 times infinity.
        lowest = jnp.finfo(logits.dtype).min
        return jnp.where(kept, logits / sampling.temperature, lowest)

    return scores


def _biased(logits: Float[Array, "B C V"], sampling: Sampling) -> Float[Array, "B C V"]:
    if not sampling.logit_bias:
        return logits
    tokens, values = zip(*sampling.logit_bias, strict=True)
    return logits.at[..., jnp.array(tokens)].add(jnp.array(values))


def truncated(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Tempered weights, 0 for what is not drawn (unnormalised)."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp((logits - highest) / sampling.temperature)
    rows, lowest = jnp.ones(len(logits), bool), jnp.zeros(len(logits))
    if sampling.top_k:
        k = jnp.full(len(logits), sampling.top_k)
        lowest = top_k_threshold(weights, k, rows)
    if sampling.top_p < 1:
        mass = sampling.top_p * jnp.sum(_only(weights, lowest), axis=-1)
        lowest = nucleus_threshold(weights, lowest, mass, rows)
    return _only(weights, jnp.maximum(lowest, sampling.min_p))


def _only(
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
    above = lambda threshold: jnp.sum(_only(weights, least(threshold)), axis=-1)
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
    token, _ = _pass(_only(inside, lowest), uniform, rest)
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
