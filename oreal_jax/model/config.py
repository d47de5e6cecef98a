"""The shape of a decoder: the few numbers that tell Qwen2, Qwen3 and Llama apart."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from oreal_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding: base frequency and how it is stretched.

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
        """Angle per position of each of the `head_dim / 2` planes, and the factor
        that multiplies cosine and sine."""
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
        """Long waves are slowed by `factor`, short ones kept, between them a ramp."""
        turns = self.original_max_length * frequency / (2 * math.pi)
        ramp = (turns - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        kept = min(1.0, max(0.0, ramp))
        return kept * frequency + (1 - kept) * frequency / self.factor

    def _yarn(self, base: list[float], head_dim: int) -> tuple[list[float], float]:
        """YaRN's ramp over the planes: fast ones kept, slow ones interpolated."""

        def plane(rotations: float) -> float:
            wave = self.original_max_length / (rotations * 2 * math.pi)
            return head_dim * math.log(wave) / (2 * math.log(self.theta))

        low, high = plane(self.beta_fast), plane(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low if high != low else 0.001
        slowed = [min(1.0, max(0.0, (i - low) / width)) for i in range(len(base))]
        mixed = [
            f * (1 - s) + f / self.factor * s for f, s in zip(base, slowed, strict=True)
        ]
        stretch = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return mixed, self.attention_factor or stretch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer (pre-norm, RMSNorm, SwiGLU, grouped-query RoPE).

    `tied` shares the embedding with the vocabulary head; `qkv_bias` is Qwen2's;
    `qk_norm` is Qwen3's RMSNorm over `head_dim` of queries and keys. `head` says what
    the last layer predicts: the next token, or one token score (the token reward
    model: a linear layer with one output, no bias, zero at the start).
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
        """Checks the one relation between the numbers that can be wrong."""
        if self.heads % self.kv_heads:
            raise InputError(
                f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}"
            )

    def require_tokens(self, tokens: Iterable[int], what: str) -> None:
        """Checks that the vocabulary has all tokens: in place of one that it has not,
        JAX would read another.

        Raises:
            InputError: it has not; the tokenizer is likely another model's.
        """
        for token in tokens:
            if not 0 <= token < self.vocab:
                raise InputError(
                    f"{what}: no token {token}, the model has {self.vocab}"
                )
