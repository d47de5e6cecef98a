"""FLOPs of the phases of a run by formula, and peak rates of devices.

Two FLOPs for each multiply-add of a matrix product of the model; norms, softmax and
optimizer are bound by memory and do not count. Useful work only: no padding, masked
scores or rematerialised passes. (PaLM, arXiv:2204.02311 appendix B, the source of model
FLOPs utilisation, counts the full square of attention; here causal attention counts
half of that.)
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from oreal_jax.model.config import ModelConfig


class Peak(NamedTuple):
    """The peak rates of one JAX device.

    FLOP/s in bfloat16, bytes/s from its HBM, bytes/s to its neighbours over all links.
    """

    flops: float
    bandwidth: float
    links: float


# By `jax.Device.device_kind`. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,
# tpu7x}; each of the two cores of a TPU7x chip (2307 TFLOP/s, 7380 GB/s, 1200 GB/s) is
# a device. GPUs: NVIDIA's data sheets of A100, H100 and H200, dense (they print the
# double, with sparsity), NVLink in one direction.
PEAKS = {
    "TPU v4": Peak(275e12, 1200e9, 300e9),
    "TPU v5 lite": Peak(197e12, 819e9, 200e9),
    "TPU v5": Peak(459e12, 2765e9, 600e9),
    "TPU v5p": Peak(459e12, 2765e9, 600e9),
    "TPU v6 lite": Peak(918e12, 1640e9, 448e9),
    "TPU7x": Peak(1153.5e12, 3690e9, 600e9),
    "NVIDIA A100-SXM4-40GB": Peak(312e12, 1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": Peak(312e12, 2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": Peak(989.5e12, 3350e9, 450e9),
    "NVIDIA H200": Peak(989.5e12, 4800e9, 450e9),
}


class Work(NamedTuple):
    """The size of a forward pass, summed over sequences.

    tokens: inputs of the layers; pairs: of a token and one that it attends to, itself
    included; predicted: outputs of the head.
    """

    tokens: int
    pairs: int
    predicted: int


def full_pass(sequences: Iterable[tuple[int, int]]) -> Work:
    """Return the work of sequences of (prompt, completion) tokens, as in training."""
    lengths = [(prompt + completion, completion) for prompt, completion in sequences]
    return Work(
        tokens=sum(size for size, _ in lengths),
        pairs=sum(size * (size + 1) // 2 for size, _ in lengths),
        predicted=sum(completion for _, completion in lengths),
    )


def prefill(prompts: Iterable[int]) -> Work:
    """Return the work of prompts of these lengths: all tokens but their last."""
    return full_pass((prompt - 1, 0) for prompt in prompts)


def decode(sequences: Iterable[tuple[int, int]]) -> Work:
    """Return the work of decoding sequences of (prompt, completion) tokens."""
    sequences = list(sequences)
    tokens = sum(completion for _, completion in sequences)
    pairs = sum(
        completion * prompt + completion * (completion - 1) // 2
        for prompt, completion in sequences
    )
    return Work(tokens=tokens, pairs=pairs, predicted=tokens)


def layer_weights(config: ModelConfig) -> int:
    """Return the number of weights in the matrices of all layers."""
    heads = 2 * config.heads + 2 * config.kv_heads  # query, output; key, value
    return config.layers * config.embed * (heads * config.head_dim + 3 * config.mlp)


def head_weights(config: ModelConfig) -> int:
    """Return the number of weights in the head: vocabulary or token score."""
    return config.embed * (config.vocab if config.head == "vocabulary" else 1)


def forward_flops(config: ModelConfig, work: Work) -> float:
    """Return the FLOPs of a forward pass: weights, scores and sums over values."""
    weights = layer_weights(config) * work.tokens
    head = head_weights(config) * work.predicted
    attention = 2 * config.layers * config.heads * config.head_dim * work.pairs
    return 2.0 * (weights + head + attention)


def training_flops(config: ModelConfig, work: Work) -> float:
    """Return the FLOPs of forward and backward pass, which has two per product."""
    return 3 * forward_flops(config, work)


def decode_bytes(
    config: ModelConfig,
    contexts: Iterable[int | float],
    *,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
) -> float:
    """Return the bytes that a decoding step reads.

    All weights once, and the keys and values of every context. `weight_bytes` and
    `cache_bytes` are per element.
    """
    weights = layer_weights(config) + head_weights(config)
    cache = 2 * config.layers * config.kv_heads * config.head_dim * sum(contexts)
    return float(weights * weight_bytes + cache * cache_bytes)


class PhaseTotals(NamedTuple):
    """The tokens and FLOPs of a phase, on all devices."""

    tokens: int
    flops: float


def metrics(
    totals: Mapping[str, PhaseTotals],
    seconds: Mapping[str, float],
    *,
    devices: int,
    peak: Peak | None,
) -> dict[str, float]:
    """Return the rates of each phase from its totals and seconds.

    `perf/<phase>_throughput` is in tokens/s of all devices, `perf/tflops/<phase>` in
    TFLOP/s per device, `perf/mfu/<phase>` its share of the peak, where that is known.
    The phase "update_actor" is called "actor".
    """
    rates: dict[str, float] = {}
    for name, (tokens, flops) in totals.items():
        phase = name.removeprefix("update_")
        rate = flops / seconds[name] / devices
        rates[f"perf/{phase}_throughput"] = tokens / seconds[name]
        rates[f"perf/tflops/{phase}"] = rate / 1e12
        if peak:
            rates[f"perf/mfu/{phase}"] = rate / peak.flops
    return rates
