"""Lower bounds of the phases of a step, from FLOPs and bytes.

A phase takes at least as long as the slowest of three: its matrix products at peak
FLOP/s, its reads and writes at memory bandwidth, its collectives at link bandwidth. The
bound assumes that the three overlap completely and reach their peaks.

Decoding is the engine's own scheduler, run on lengths without a model. A step
multiplies all slots of an engine and reads all weights, even if few rows are running;
a few long completions at the end are therefore nearly as expensive as full slots.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from oreal_jax import efficiency
from oreal_jax.config import TrainConfig
from oreal_jax.efficiency import PEAKS, Work
from oreal_jax.model import ModelConfig
from oreal_jax.plan.findings import Findings
from oreal_jax.plan.programs import mean_prompt_tokens
from oreal_jax.sampling.runner import DISPATCH, PAGE
from oreal_jax.sampling.simulation import Round, heavy_tailed, simulate


class Phase(NamedTuple):
    """FLOPs of all devices; seconds of each resource at its peak, and of the phase."""

    flops: float
    products: float
    memory: float
    links: float
    seconds: float

    @property
    def limit(self) -> str:
        """The slowest of products, memory and links."""
        return max("products", "memory", "links", key=lambda kind: getattr(self, kind))


def phases(
    config: TrainConfig,
    shape: ModelConfig,
    findings: Findings,
    selected: list[tuple[int, int]],
    decode: Phase,
) -> dict[str, Phase]:
    """Return the bounds of a step that trains on these (prompt, completion) lengths.

    Rows are computed with their padding.
    """
    peak, micros = PEAKS[findings.kind], findings.micros
    rows = config.packing.rows * findings.mesh["data"] * findings.mesh["fsdp"]
    packed = micros * rows * config.packing.row_length
    work = efficiency.full_pass(selected)._replace(tokens=packed)
    body = work._replace(predicted=0)  # the layers, without the vocabulary head
    models = 2 if config.token_reward else 1
    forward = efficiency.forward_flops(shape, work)
    update = 3 * (forward + (models - 1) * efficiency.forward_flops(shape, body))
    passes = 3  # over the weights: forward, and two products in the gradient
    if config.remat in ("everything", "offloaded", "but_attention"):
        again = body._replace(pairs=0) if config.remat == "but_attention" else body
        update += models * efficiency.forward_flops(shape, again)
        passes += 1
    weights = 2.0 * (efficiency.layer_weights(shape) + efficiency.head_weights(shape))
    state = findings.held["parameters"] + findings.held["optimizer"]
    prompts = efficiency.prefill([mean_prompt_tokens(config)] * config.prompts_per_step)

    def bound(name: str, flops: float, memory_bytes: float) -> Phase:
        seconds = (
            flops / findings.devices / peak.flops,
            memory_bytes / peak.bandwidth,
            findings.moved[name] / peak.links,
        )
        return Phase(flops, *seconds, seconds=max(seconds))  # they overlap completely

    prefill = efficiency.forward_flops(shape, prompts)
    update_bytes = 2 * state + passes * models * weights * micros
    return {
        "prefill": bound("prefill", prefill, weights / findings.tensor),
        "decode": decode,
        "ref": bound("ref", forward, weights * micros),
        "update_actor": bound("update_actor", update, update_bytes),
    }


class DecodingEstimate(NamedTuple):
    """The slowest process: decoding steps, mean running rows of an engine, swaps.

    `swapped` counts rows; the bound `phase` does not include swapping.
    """

    steps: int
    rows: float
    swapped: int
    phase: Phase


def completion_lengths(config: TrainConfig, mean: int) -> Int[np.ndarray, "N K"]:
    """Return log-normal lengths of a step's completions, cut at the maximum."""
    shape = config.prompts_per_step, config.samples_per_prompt
    count, longest = shape[0] * shape[1], config.sampling.max_tokens
    return heavy_tailed(count, mean, longest).reshape(shape)


def estimate_decoding(
    config: TrainConfig,
    shape: ModelConfig,
    findings: Findings,
    lengths: Int[np.ndarray, "N K"],
    cache_tokens: int,
) -> DecodingEstimate:
    """Simulate decoding to these lengths with `cache_tokens` per engine.

    Process i generates for prompts i, i + processes, ...
    """
    prompt = mean_prompt_tokens(config)
    work = efficiency.decode((prompt, int(size)) for size in lengths.flat)
    flops = efficiency.forward_flops(shape, work)
    estimates = []
    for process in range(min(findings.processes, len(lengths))):
        simulated = simulate(
            lengths[process :: findings.processes],
            engines=findings.devices // findings.processes // findings.tensor,
            slots=findings.slots,
            pages=cache_tokens // PAGE + 1,  # as in `Engine.size`
            page_size=PAGE,
            steps=DISPATCH,
            prompt=prompt,
            longest=config.sampling.max_tokens,
        )
        steps, rounds = simulated.steps, simulated.rounds
        rows = sum(r.steps * float(r.running.mean()) for r in rounds) / steps
        phase = decoding_bound(config, shape, findings, rounds)._replace(flops=flops)
        estimates.append(DecodingEstimate(steps, rows, simulated.swap_outs, phase))
    return max(estimates, key=lambda estimate: estimate.phase.seconds)


def decoding_bound(
    config: TrainConfig, shape: ModelConfig, findings: Findings, rounds: Sequence[Round]
) -> Phase:
    """Return the bound of a process's rounds; its engines wait for the fullest."""
    peak, tensor = PEAKS[findings.kind], findings.tensor
    copies = -(-tensor // shape.kv_heads)  # key-value heads are repeated if too few

    def step(round: Round) -> tuple[float, float, float, float]:
        cached = float(round.cached.max())
        work = Work(round.slots, int(cached), round.slots)
        flops = efficiency.forward_flops(shape, work) / tensor
        read = efficiency.decode_bytes(
            shape,
            [cached * copies],
            weight_bytes=1 if config.decode_weights == "int8" else 2,
            cache_bytes=1 if config.decode_cache == "float8" else 2,
        )
        products, memory = flops / peak.flops, read / tensor / peak.bandwidth
        moved = findings.moved["decode"] * round.slots / findings.slots
        return flops, products, memory, moved / peak.links

    steps = np.array([round.steps for round in rounds])
    parts = np.array([step(round) for round in rounds])
    totals = (steps @ parts).tolist()
    return Phase(*totals, seconds=float(steps @ parts[:, 1:].max(axis=1)))
