"""The shape of a decoder: the numbers in which Qwen2, Qwen3 and Llama differ."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from oreal_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: its base, and how it is scaled to longer contexts.

    `kind` is Hugging Face's `rope_type`: "default", "linear", "llama3" or "yarn"
    (arXiv:2309.00071). The other fields are that type's parameters, 0 where unused.
    """

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_length: int = 0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True

    def frequencies(self, head_dim: int) -> tuple[list[float], float]:
        """Return radians per position, and the factor of cosine and sine.

        There is a frequency for each of the `head_dim / 2` planes of channels.
        """
        half = head_dim // 2
        base = [self.theta ** (-i / half) for i in range(half)]
        if self.kind == "linear":
            return [f / self.factor for f in base], 1.0
        if self.kind == "llama3":
            return [self._llama3(f) for f in base], 1.0
        if self.kind == "yarn":
            return self._yarn(base, head_dim)
        return base, 1.0

    def _llama3(self, frequency: float) -> float:
        """Divide low frequencies by `factor`, keep high ones, interpolate between."""
        turns = self.original_max_length * frequency / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        share = min(1.0, max(0.0, ramp))
        return share * frequency + (1 - share) * frequency / self.factor

    def _yarn(self, base: list[float], head_dim: int) -> tuple[list[float], float]:
        """Keep the first planes, divide the last by `factor`, interpolate between."""

        def plane(rotations: float) -> float:
            """Return the index at which a plane makes this number of rotations."""
            wave = self.original_max_length / (rotations * 2 * math.pi)
            return head_dim * math.log(wave) / (2 * math.log(self.theta))

        low, high = plane(self.beta_fast), plane(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low if high != low else 0.001
        shares = [min(1.0, max(0.0, (i - low) / width)) for i in range(len(base))]
        frequencies = [
            f * (1 - s) + f / self.factor * s for f, s in zip(base, shares, strict=True)
        ]
        default = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return frequencies, self.attention_factor or default


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer (pre-norm, RMSNorm, SwiGLU, grouped-query RoPE).

    `tied` shares the embedding with the vocabulary head; `qkv_bias` is Qwen2's;
    `qk_norm` is Qwen3's RMSNorm over `head_dim` of queries and keys. `head` is what
    the last layer predicts: the next token, or one token score (the token reward
    model: a linear layer with one output, without bias, initialised with zeros).
    """

    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope: Rope = Rope()
    norm_epsilon: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    max_length: int = 32_768
    head: Literal["vocabulary", "score"] = "vocabulary"

    def __post_init__(self):
        """Check that query heads divide into groups."""
        if self.heads % self.kv_heads:
            raise InputError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}"
            )

    def check_tokens(self, tokens: Iterable[int], source: str) -> None:
        """Check that all tokens are in the vocabulary.

        JAX would read another row of the embedding instead.

        Raises:
            InputError: a token is not; the tokenizer is likely that of another model.
        """
        for token in tokens:
            if not 0 <= token < self.vocab:
                raise InputError(
                    f"{source}: no token {token}, the model has {self.vocab}"
                )
