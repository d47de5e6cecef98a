"""Choosing the next token: bias, penalties, temperature, top-k, top-p, min-p, then
uniform numbers.

The parameters are arrays over slots, so one compiled program serves every mixture of
requests; a step that no slot needs is skipped (`Uses`). The vocabulary is never sorted.
Truncation is a threshold per slot: tokens of smaller weight are masked. A token is
sampled by inverting the cumulative distribution in two levels; one sum over the
likelier tokens tells whether it is in the nucleus.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from oreal_jax.model import Distribution
from oreal_jax.sampling.parameters import Sampling, SlotSampling
from oreal_jax.sampling.truncation import (
    block_sums,
    invert,
    keep_above,
    largest,
    nucleus_threshold,
    top_k_threshold,
)

# Nuclei of at least mass `WIDE` are sampled by rejection; after `MAX_ATTEMPTS`
# rejections (probability 2^-100) the likeliest token is chosen.
WIDE, MAX_ATTEMPTS = 0.5, 100


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
    sums = block_sums(keep_above(weights, lowest))
    mass = slots.top_p * jnp.sum(sums, axis=-1)
    lowest = jnp.maximum(lowest, slots.min_p)  # the largest weight is 1
    lowest = jax.lax.cond(
        uses.narrow,
        lambda: nucleus_threshold(weights, lowest, mass, narrow),
        lambda: lowest,
    )
    sums = jax.lax.cond(
        uses.cut, lambda: block_sums(keep_above(weights, lowest)), lambda: sums
    )

    def inside(token: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether less than the nucleus' mass is likelier than the token."""
        likelier = weights > _pick(weights, token)[:, None]
        above = jnp.sum(keep_above(weights, lowest), axis=-1, where=likelier)
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
            keep_above(weights, nucleus_threshold(weights, lowest, mass, wide)), axis=-1
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
        mass = sampling.top_p * jnp.sum(keep_above(weights, lowest), axis=-1)
        lowest = nucleus_threshold(weights, lowest, mass, rows)
    return keep_above(weights, jnp.maximum(lowest, sampling.min_p))
