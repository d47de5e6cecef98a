"""How completions are sampled: parameters of a request, and of all slots as arrays."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from oreal_jax.errors import InputError

# Limits of summands and factors of a logit: within them, biases and penalties together
# stay finite in float32. Infinite logits would become NaN.
MAX_SHIFT, MAX_FACTOR = 1e30, 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are sampled.

    Applied in this order: bias, penalties, temperature, top_k, top_p, min_p.

    Raises:
        InputError: a value outside its range.
    """

    max_tokens: int
    """Maximum tokens of a completion."""
    temperature: float = 1.0
    """Divides logits; 0: greedy."""
    top_p: float = 1.0
    """Keep the most likely tokens with this total probability; 1: off."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0: off."""
    min_p: float = 0.0
    """Keep tokens with this share of the highest probability (arXiv:2407.01082);
    0: off."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens in the prompt or completion, and multiplies
    negative ones (arXiv:1909.05858); 1: off."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the completion."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it is in the completion."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, bias) pairs: added to the logits of these tokens; -inf bans one."""

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
