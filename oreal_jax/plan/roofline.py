"""How long a step takes at least, from what it computes, reads and moves.

Every phase is as long as the slowest of three: its products at the peak of the matrix
units, its bytes at the bandwidth of the memory, its collectives at that of the links.
As if the three overlapped wholly and each reached its peak: a real step is longer.
"""

from typing import NamedTuple

from oreal_jax import efficiency
from oreal_jax.config import TrainConfig
from oreal_jax.efficiency import PEAKS, Work
from oreal_jax.model import ModelConfig, Remat
from oreal_jax.plan.findings import Findings
from oreal_jax.plan.programs import mean_prompt

# How often the backward pass gathers and reads a layer's weights to compute it again.
RECOMPUTED = {
    "everything": 1.0,
    "offloaded": 1.0,
    "but_attention": 1.0,
    "elementwise": 0.0,
    "nothing": 0.0,
}


def passes(config: TrainConfig) -> float:
    """How often an update reads each layer's weights, backward twice."""
    return 3 + RECOMPUTED[config.remat]


def widths(config: TrainConfig) -> tuple[int, int]:
    """Bytes of a number in decoding's weights and in its cache."""
    return (
        1 if config.decode_weights == "int8" else 2,
        1 if config.decode_cache == "float8" else 2,
    )


class Phase(NamedTuple):
    """FLOPs of all devices, the seconds of each kind of work at its peak, and of the
    phase, in every part of which the slowest kind counts."""

    flops: float
    products: float
    memory: float
    links: float
    seconds: float

    @classmethod
    def of(cls, flops: float, products: float, memory: float, links: float) -> "Phase":
        """One part, whose kinds of work overlap."""
        return cls(flops, products, memory, links, max(products, memory, links))

    @property
    def limit(self) -> str:
        """What takes longest."""
        kinds = ("products", "memory", "links")
        return max(kinds, key=lambda kind: getattr(self, kind))


def phases(
    config: TrainConfig,
    shape: ModelConfig,
    found: Findings,
    learned: list[tuple[int, int]],
    decode: Phase,
) -> dict[str, Phase]:
    """Bounds of a step's phases. `learned` are (prompt, completion) lengths of what is
    learned from; rows are computed whole, padding included."""
    peak, count, micros = PEAKS[found.kind], found.devices, found.micros
    together = config.packing.rows * found.mesh["data"] * found.mesh["fsdp"]
    packed = micros * together * config.packing.row_length
    work = efficiency.full_pass(learned)._replace(tokens=packed)
    forward = efficiency.forward_flops(shape, work)
    models = 2 if config.token_reward else 1
    body = work._replace(predicted=0)
    again = _recomputed(config.remat, body)
    update = 3 * (forward + (models - 1) * efficiency.forward_flops(shape, body))
    update += models * efficiency.forward_flops(shape, again)
    weights = 2 * (efficiency.layer_weights(shape) + efficiency.head_weights(shape))
    reads = weights * micros
    prompts = efficiency.prefill([mean_prompt(config)] * config.prompts_per_step)
    prefill = efficiency.forward_flops(shape, prompts)
    state_bytes = found.held["parameters"] + found.held["optimizer"]
    bound = lambda flops, bytes, through: Phase.of(
        flops,
        flops / count / peak.flops,
        bytes / peak.bandwidth,
        through / peak.links,
    )
    return {
        "prefill": bound(prefill, weights / found.tensor, found.moved["prefill"]),
        "decode": decode,
        "ref": bound(forward, reads, found.moved["ref"]),
        "update_actor": bound(
            update,
            2 * state_bytes + passes(config) * models * reads,
            found.moved["update_actor"],
        ),
    }


def _recomputed(remat: Remat, body: Work) -> Work:
    """What the backward pass computes again of the layers' forward pass."""
    if remat == "but_attention":
        return body._replace(pairs=0)
    return body if RECOMPUTED[remat] else Work(0, 0, 0)
