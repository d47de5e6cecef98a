"""Sampling parameters: of one request, and of all slots as arrays."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from oreal_jax.errors import InputError

# Limits of terms and factors of a logit: within them, biases and penalties together
# stay finite in float32. Infinite logits would become NaN.
MAX_SHIFT, MAX_FACTOR = 1e30, 1e6
MAX_INT32 = np.iinfo(np.int32).max


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
    """Keep the fewest most likely tokens that hold this share of the probability that
    `top_k` left; 1: off."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0: off."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one
    (arXiv:2407.01082); 0: off."""
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
        factors = f"from {1 / MAX_FACTOR} to {MAX_FACTOR} (1: off)"
        shifts = f"from {-MAX_SHIFT} to {MAX_SHIFT}"
        is_factor = 1 / MAX_FACTOR <= self.repetition_penalty <= MAX_FACTOR
        for name, is_valid, range_ in [
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 and finite"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0: off)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", is_factor, factors),
            ("presence_penalty", abs(self.presence_penalty) <= MAX_SHIFT, shifts),
            ("frequency_penalty", abs(self.frequency_penalty) <= MAX_SHIFT, shifts),
        ]:
            if not is_valid:
                value = getattr(self, name)
                raise InputError(f"sampling: {name}={value} must be {range_}")
        for token, bias in self.logit_bias:
            if token < 0:
                raise InputError(f"sampling: logit_bias: no token {token}")
            if not abs(bias) <= MAX_SHIFT and bias != -math.inf:
                raise InputError(
                    f"sampling: logit_bias of token {token} is {bias}; it must be "
                    f"{shifts}, or -inf, which bans the token"
                )

    @property
    def penalises(self) -> bool:
        """Whether a token's probability depends on the penalties of earlier ones."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or any(penalties)


class SlotSampling(NamedTuple):
    """`Sampling` as arrays, over any axes of slots, with K biases per slot.

    Unused biases have a token beyond the vocabulary. `renormalise` requests the
    log-probabilities of the distribution that tokens are sampled from.
    """

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
    def one(
        cls, sampling: Sampling, biases: int, renormalise: bool = False
    ) -> "SlotSampling":
        """Return the parameters of one slot, with room for `biases` biases."""
        padding = ((MAX_INT32, 0.0),) * (biases - len(sampling.logit_bias))
        tokens, values = zip(*sampling.logit_bias, *padding, strict=True)
        return cls(
            temperature=np.float32(sampling.temperature),
            top_p=np.float32(sampling.top_p),
            top_k=np.int32(min(sampling.top_k, MAX_INT32)),
            min_p=np.float32(sampling.min_p),
            repetition_penalty=np.float32(sampling.repetition_penalty),
            presence_penalty=np.float32(sampling.presence_penalty),
            frequency_penalty=np.float32(sampling.frequency_penalty),
            bias_tokens=np.array(tokens, np.int32),
            bias_values=np.array(values, np.float32),
            renormalise=np.bool_(renormalise),
        )
