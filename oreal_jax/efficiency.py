"""What the phases of a run compute by formula, and what a device could.

Two FLOPs for each multiply-add of a matrix product of the model; norms, softmax and
optimizer are bound by memory and do not count. Useful work only: no padding, no score
that is masked, no pass that is rematerialised. (PaLM, arXiv:2204.02311 appendix B, from
which model FLOPs utilisation is, counts the whole square of attention; here a token
sees its own past, half of that.)
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from oreal_jax.model.config import ModelConfig


class Peak(NamedTuple):
    """What one JAX device can do at most: FLOP/s in bfloat16, bytes/s from its HBM, and
    bytes/s to its neighbours over all of its links."""

    flops: float
    bandwidth: float
    links: float


# By `jax.Device.device_kind`. TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,
# tpu7x}; of a TPU7x chip (2307 TFLOP/s, 7380 GB/s, 1200 GB/s) each of the two cores is
# a device. GPUs: NVIDIA's data sheets of A100, H100 and H200, dense (they print twice
# as much, with sparsity), NVLink in one direction.
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
    """What a forward pass goes over, summed over sequences.

    tokens: those that pass the layers; pairs: of a token and one that it sees, itself
    included; predicted: tokens that the head predicts.
    """

    tokens: int
    pairs: int
    predicted: int


def whole(sequences: Iterable[tuple[int, int]]) -> Work:
    """Sequences of (prompt, completion) tokens in one pass, as in training."""
    lengths = [(prompt + completion, completion) for prompt, completion in sequences]
    return Work(
        tokens=sum(size for size, _ in lengths),
        pairs=sum(size * (size + 1) // 2 for size, _ in lengths),
        predicted=sum(completion for _, completion in lengths),
    )


def prefill(prompts: Iterable[int]) -> Work:
    """Prompts of these lengths before anything is drawn: all tokens but their last."""
    return whole((prompt - 1, 0) for prompt in prompts)


def decode(sequences: Iterable[tuple[int, int]]) -> Work:
    """Completions of (prompt, completion) tokens drawn one by one from a cache."""
    sequences = list(sequences)
    drawn = sum(completion for _, completion in sequences)
    seen = sum(
        completion * prompt + completion * (completion - 1) // 2
        for prompt, completion in sequences
    )
    return Work(tokens=drawn, pairs=seen, predicted=drawn)


def layer_weights(config: ModelConfig) -> int:
    """Numbers in the matrices of all layers: each token is multiplied with each."""
    heads = 2 * config.heads + 2 * config.kv_heads  # query, output; key, value
    return config.layers * config.embed * (heads * config.head_dim + 3 * config.mlp)


def head_weights(config: ModelConfig) -> int:
    """Numbers in the head: of the vocabulary, or of the token score."""
    return config.embed * (config.vocab if config.head == "vocabulary" else 1)


def forward_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of a forward pass: of the weights, the scores and the sums over values."""
    weights = layer_weights(config) * work.tokens
    head = head_weights(config) * work.predicted
    attention = 2 * config.layers * config.heads * config.head_dim * work.pairs
    return 2.0 * (weights + head + attention)


def training_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of forward and backward pass; each product has two in its gradient."""
    return 3 * forward_flops(config, work)


def decode_bytes(
    config: ModelConfig,
    contexts: Iterable[int | float],
    *,
    weight_bytes: int = 2,
    cache_bytes: int = 2,
) -> float:
    """Bytes that one decoding step reads for rows that see so many tokens each: all
    weights once, and the keys and values of every row. `weight_bytes` and
    `cache_bytes` are those of a number."""
    weights = layer_weights(config) + head_weights(config)
    cache = 2 * config.layers * config.kv_heads * config.head_dim * sum(contexts)
    return float(weights * weight_bytes + cache * cache_bytes)


class Done(NamedTuple):
    """What a phase has done, on all devices."""

    tokens: int
    flops: float


def metrics(
    done: Mapping[str, Done],
    seconds: Mapping[str, float],
    *,
    devices: int,
    peak: Peak | None,
) -> dict[str, float]:
    """Of each phase that took `seconds`: `perf/<phase>_throughput` in tokens/s of all
    devices, `perf/tflops/<phase>` in TFLOP/s of one, and, where its peak is known,
    the share of it as `perf/mfu/<phase>`; the phase "update_actor" is "actor"."""
    found: dict[str, float] = {}
    for name, (tokens, flops) in done.items():
        phase = name.removeprefix("update_")
        rate = flops / seconds[name] / devices
        found[f"perf/{phase}_throughput"] = tokens / seconds[name]
        found[f"perf/tflops/{phase}"] = rate / 1e12
        if peak:
            found[f"perf/mfu/{phase}"] = rate / peak.flops
    return found
