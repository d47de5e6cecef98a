"""How long decoding takes at least: the engines' own scheduler on completions of the
lengths that a config draws, each round priced by the rows that it holds.

A step of an engine multiplies all of its slots and reads all weights, however few rows
still run; of the cache it reads what the rows have. So the tail counts with its price:
a few long completions read the weights as often as all together would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from oreal_jax import efficiency
from oreal_jax.config import TrainConfig
from oreal_jax.efficiency import PEAKS, Work
from oreal_jax.model import ModelConfig
from oreal_jax.plan import roofline
from oreal_jax.plan.findings import Findings
from oreal_jax.plan.programs import mean_prompt
from oreal_jax.plan.roofline import Phase
from oreal_jax.sampling.simulation import Round, heavy_tailed, simulate
from oreal_jax.sampling.work import DISPATCH, PAGE


class DecodingEstimate(NamedTuple):
    """The process that takes longest: its steps, the rows that an engine holds in one
    of them on average, how often a row made room for others, and the bound. What a row
    that makes room costs on its way to the host and back is not in it."""

    steps: int
    rows: float
    swapped: int
    phase: Phase


def lengths_of(config: TrainConfig, mean_tokens: int) -> Int[np.ndarray, "N K"]:
    """Tokens of the completions of a step: log-normal, cut at the most that the config
    allows, `mean_tokens` on average."""
    shape = config.prompts_per_step, config.samples_per_prompt
    longest = config.sampling.max_tokens
    return heavy_tailed(shape[0] * shape[1], mean_tokens, longest).reshape(shape)


def decoding(
    config: TrainConfig,
    shape: ModelConfig,
    found: Findings,
    lengths: Int[np.ndarray, "N K"],
    cache_tokens: int,
) -> DecodingEstimate:
    """Decodes completions of these lengths with engines of `cache_tokens` of cache
    each; process i has prompts i, i + processes, ..."""
    prompt = mean_prompt(config)
    flops = efficiency.forward_flops(
        shape, efficiency.decode((prompt, int(size)) for size in lengths.flat)
    )

    def of_process(own: Int[np.ndarray, "N K"]) -> DecodingEstimate:
        simulated = simulate(
            own,
            shards=found.devices // found.processes // found.tensor,
            slots=found.slots,
            pages=cache_tokens // PAGE + 1,  # as `Engine.size`
            size=PAGE,
            dispatch=DISPATCH,
            prompt=prompt,
            longest=config.sampling.max_tokens,
        )
        rounds = simulated.rounds
        rows = sum(round.steps * round.rows.mean() for round in rounds)
        return DecodingEstimate(
            simulated.steps,
            float(rows / simulated.steps),
            simulated.swapped,
            _price(config, shape, found, rounds)._replace(flops=flops),
        )

    shares = (lengths[i :: found.processes] for i in range(found.processes))
    each = [of_process(own) for own in shares if own.size]
    return max(each, key=lambda one: one.phase.seconds)


def _price(
    config: TrainConfig, shape: ModelConfig, found: Findings, rounds: Sequence[Round]
) -> Phase:
    """The bound of a process's rounds; an engine waits for the one with most to do."""
    peak, tensor = PEAKS[found.kind], found.tensor
    width, wide = roofline.widths(config)
    copies = -(-tensor // shape.kv_heads)  # of key-value heads fewer than devices

    def step(round: Round) -> tuple[float, float, float, float]:
        cached = float(round.cached.max())
        work = Work(round.slots, int(cached), round.slots)
        flops = efficiency.forward_flops(shape, work) / tensor
        read = efficiency.decode_bytes(
            shape, [cached * copies], weight_bytes=width, cache_bytes=wide
        )
        moved = found.moved["decode"] * round.slots / found.slots
        return (
            flops,
            flops / peak.flops,
            read / tensor / peak.bandwidth,
            moved / peak.links,
        )

    times = np.array([round.steps for round in rounds])
    parts = np.array([step(round) for round in rounds])
    totals = (times @ parts).tolist()
    return Phase(*totals, seconds=float(times @ parts[:, 1:].max(axis=1)))
