"""Sampling of the next token in every slot.

The parameters are arrays over slots, so one compiled program serves every mixture of
requests; a stage that no slot needs is skipped (`Stages`). The vocabulary is never
sorted. Truncation is a threshold per slot: tokens of smaller weight are masked. A token
is sampled by inverting the cumulative distribution in two levels. It is in the nucleus
if the tokens that are likelier hold less than `top_p`.

The vocabulary of many models is padded: its last rows belong to no token of the
tokenizer. They are masked like banned tokens; the log-probability under the full model
includes them, as in the trainer.
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
    largest,
    mask_below,
    nucleus_threshold,
    top_k_threshold,
)

# Nuclei with `top_p` of at least `WIDE` are sampled by rejection; after `MAX_ATTEMPTS`
# rejections (probability 2^-100) the likeliest token is chosen.
WIDE, MAX_ATTEMPTS = 0.5, 100


class Stages(NamedTuple):
    """Stages of sampling that at least one slot needs.

    Scalars, the same for all engines of a program, so that other stages are skipped,
    not computed and discarded.
    """

    adjustment: Bool[Any, ""]  # biases or penalties
    random: Bool[Any, ""]  # a temperature above 0
    top_k: Bool[Any, ""]
    narrow: Bool[Any, ""]  # nuclei found by bisection
    wide: Bool[Any, ""]  # nuclei sampled by rejection
    truncation: Bool[Any, ""]  # fewer tokens than after top-k, before sampling
    nucleus_mass: Bool[Any, ""]  # mass of wide nuclei

    @classmethod
    def needed(cls, slots: SlotSampling, running: Bool[Array, "*B"]) -> "Stages":
        """Return the stages that `running` slots need."""
        is_needed = lambda slot: jnp.any(slot & running)
        random = slots.temperature > 0
        penalty = (slots.repetition_penalty != 1) | (slots.presence_penalty != 0)
        penalty |= slots.frequency_penalty != 0
        narrow, wide = _nuclei(slots)
        return cls(
            adjustment=is_needed(penalty | jnp.any(slots.bias_values != 0, axis=-1)),
            random=is_needed(random),
            top_k=is_needed(random & (slots.top_k > 0)),
            narrow=is_needed(narrow),
            wide=is_needed(wide),
            truncation=is_needed(narrow | (random & (slots.min_p > 0))),
            nucleus_mass=is_needed(wide & slots.renormalise),
        )


def _nuclei(slots: SlotSampling) -> tuple[Bool[Array, "*B"], Bool[Array, "*B"]]:
    """Return masks of the slots with narrow and with wide nuclei."""
    nucleus = (slots.temperature > 0) & (slots.top_p < 1)
    narrow = slots.top_p < WIDE
    return nucleus & narrow, nucleus & ~narrow


class History(NamedTuple):
    """Tokens that penalties apply to: those of the prompt, and counts of the others."""

    prompt: Bool[Array, "B V"]
    generated: Int[Array, "B V"]


class NextToken(NamedTuple):
    """A token per slot.

    `log_prob` is that of the full model at temperature 1, `sampled_log_prob` that of
    the distribution it was sampled from (0 where greedy or not requested).
    """

    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    sampled_log_prob: Float[Array, "B"]


def sample_tokens(
    logits: Float[Array, "B V"],
    stages: Stages,
    keys: UInt32[Array, "B 2"],
    slots: SlotSampling,
    history: History,
    real_tokens: int = 0,
) -> NextToken:
    """Sample a token for every slot, from that slot's arguments alone.

    Only the first `real_tokens` are sampled (0: all).

    A wide nucleus is not searched for: a token is sampled from all, and again where
    likelier tokens hold at least `top_p` of the mass. Its log-probability within the
    nucleus needs the mass of the nucleus, which is computed if `renormalise` is set.
    """

    # Each branch returns tokens: one that returned scores would copy them. For the same
    # reason they are masked where they are read.
    def sample_from(scores: Float[Array, "B V"]) -> NextToken:
        highest, likeliest = largest(mask_padding(scores, real_tokens))

        def sample() -> tuple[Int[Array, "B"], Float[Array, "B"]]:
            shifted = mask_padding(scores, real_tokens) - highest[:, None]
            return _sample(shifted, likeliest, stages, keys, slots)

        token, sampled = jax.lax.cond(
            stages.random, sample, lambda: (likeliest, jnp.zeros(likeliest.shape))
        )
        if scores is not logits:
            highest, _ = largest(logits)
        elif has_padding(logits, real_tokens):
            padding = jnp.max(logits[:, real_tokens:], axis=-1)
            highest = jnp.maximum(highest, padding)
        total = jnp.sum(jnp.exp(logits - highest[:, None]), axis=-1)
        log_prob = _at(logits, token) - highest - jnp.log(total)
        return NextToken(token, log_prob, sampled)

    return jax.lax.cond(
        stages.adjustment,
        lambda: sample_from(adjust(logits, slots, history)),
        lambda: sample_from(logits),
    )


def has_padding(logits: Float[Array, "*B V"], real_tokens: int) -> bool:
    """Return whether the vocabulary has padded rows (`real_tokens` 0: none)."""
    return 0 < real_tokens < logits.shape[-1]


def mask_padding(logits: Float[Array, "B V"], real_tokens: int) -> Float[Array, "B V"]:
    """Set the logits of padded rows to -inf."""
    if not has_padding(logits, real_tokens):
        return logits
    is_token = jnp.arange(logits.shape[-1])[None] < real_tokens
    return jnp.where(is_token, logits, -jnp.inf)


def _at(values: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(values, token[:, None], axis=-1)[:, 0]


def adjust(
    logits: Float[Array, "B V"], slots: SlotSampling, history: History
) -> Float[Array, "B V"]:
    """Add biases to logits and then apply penalties."""
    rows = jnp.arange(len(logits))[:, None]
    logits = logits.at[rows, slots.bias_tokens].add(slots.bias_values, mode="drop")
    repetition = slots.repetition_penalty[:, None]
    factor = jnp.where(logits > 0, 1 / repetition, repetition)
    is_repeated = history.prompt | (history.generated > 0)
    logits = jnp.where(is_repeated, logits * factor, logits)
    presence = slots.presence_penalty[:, None] * (history.generated > 0)
    return logits - presence - slots.frequency_penalty[:, None] * history.generated


def _sample(
    scores: Float[Array, "B V"],
    likeliest: Int[Array, "B"],
    stages: Stages,
    keys: UInt32[Array, "B 2"],
    slots: SlotSampling,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Sample a token where the temperature is above 0, else return the likeliest.

    Also returns its log-probability where requested. The largest score is 0.
    """
    random = slots.temperature > 0
    temperature = jnp.where(random, slots.temperature, 1)
    # A barrier, so that the consumers read these numbers and do not recompute them.
    weights = jax.lax.optimization_barrier(jnp.exp(scores / temperature[:, None]))
    zeros = jnp.zeros(len(weights))
    narrow, wide = _nuclei(slots)
    threshold = jax.lax.cond(
        stages.top_k,
        lambda: top_k_threshold(weights, slots.top_k, random & (slots.top_k > 0)),
        lambda: zeros,
    )
    sums = block_sums(mask_below(weights, threshold))
    mass = slots.top_p * jnp.sum(sums, axis=-1)
    threshold = jnp.maximum(threshold, slots.min_p)  # the largest weight is 1
    threshold = jax.lax.cond(
        stages.narrow,
        lambda: nucleus_threshold(weights, threshold, mass, narrow),
        lambda: threshold,
    )
    sums = jax.lax.cond(
        stages.truncation,
        lambda: block_sums(mask_below(weights, threshold)),
        lambda: sums,
    )

    def in_nucleus(token: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether tokens likelier than this one hold less than the nucleus' mass."""
        likelier = weights > _at(weights, token)[:, None]
        above = jnp.sum(mask_below(weights, threshold), axis=-1, where=likelier)
        return ~wide | (above < mass)

    def attempt(state):
        number, token, accepted = state
        uniform = jax.vmap(lambda key: _uniform(key, number))(keys)
        candidate = invert(weights, threshold, sums, uniform)
        accept = jax.lax.cond(
            stages.wide, lambda: in_nucleus(candidate), lambda: jnp.ones_like(accepted)
        )
        token = jnp.where(accept & ~accepted, candidate, token)
        return number + 1, token, accepted | accept

    # Rejected slots sample again, each with its own random numbers; a wide nucleus
    # holds most of the mass, so few do. The likeliest token is in the nucleus whatever
    # the rounding.
    unfinished = lambda state: ~jnp.all(state[2]) & (state[0] < MAX_ATTEMPTS)
    token = jax.lax.while_loop(unfinished, attempt, (0, likeliest, ~random))[1]

    def nucleus_mass():
        cut = nucleus_threshold(weights, threshold, mass, wide)
        return jnp.sum(mask_below(weights, cut), axis=-1)

    total = jax.lax.cond(
        stages.nucleus_mass, nucleus_mass, lambda: jnp.sum(sums, axis=-1)
    )
    sampled = jnp.log(_at(weights, token)) - jnp.log(total)
    return token, jnp.where(random & slots.renormalise, sampled, 0)


def _uniform(key: UInt32[Array, "2"], number) -> Float[Array, ""]:
    return jax.random.uniform(jax.random.fold_in(jax.random.wrap_key_data(key), number))


def sampling_distribution(sampling: Sampling, real_tokens: int = 0) -> Distribution:
    """Return the distribution that tokens are sampled from, as a function of logits.

    Only the first `real_tokens` are sampled (0: all).

    For trainers whose loss is about these probabilities: biased, tempered, and
    renormalised over the kept tokens. It has no penalties, which depend on earlier
    tokens. The set of kept tokens is a constant to gradients, and always contains the
    target: rounding may make the trainer's last kept token differ from the sampler's.
    """

    def scores(
        logits: Float[Array, "B C V"], targets: Int[Array, "B C"]
    ) -> Float[Array, "B C V"]:
        if sampling.logit_bias:
            tokens, values = zip(*sampling.logit_bias, strict=True)
            logits = logits.at[..., jnp.array(tokens)].add(jnp.array(values))
        flat = jax.lax.stop_gradient(logits).reshape(-1, logits.shape[-1])
        flat = mask_padding(flat, real_tokens)
        kept = (truncate(flat, sampling) > 0).reshape(logits.shape)
        kept |= jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
        # Finite, so that the entropy has no 0 times infinity.
        minimum = jnp.finfo(logits.dtype).min
        return jnp.where(kept, logits / sampling.temperature, minimum)

    return scores


def truncate(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Return tempered unnormalised probabilities, 0 for tokens that are cut off."""
    highest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp((logits - highest) / sampling.temperature)
    rows, threshold = jnp.ones(len(logits), bool), jnp.zeros(len(logits))
    if sampling.top_k:
        k = jnp.full(len(logits), min(sampling.top_k, logits.shape[-1]))
        threshold = top_k_threshold(weights, k, rows)
    if sampling.top_p < 1:
        mass = sampling.top_p * jnp.sum(mask_below(weights, threshold), axis=-1)
        threshold = nucleus_threshold(weights, threshold, mass, rows)
    return mask_below(weights, jnp.maximum(threshold, sampling.min_p))
