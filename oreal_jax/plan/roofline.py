"""How long a step takes at least, from what it computes, reads and moves.

Every phase is as long as the slowest of three: its products at the peak of the matrix
units, its bytes at the bandwidth of the memory, its collectives at that of the links.
As if the three overlapped wholly and each reached its peak: a real step is longer.
"""

from collections.abc import Mapping
from typing import NamedTuple

from oreal_jax import efficiency
from oreal_jax.config import TrainConfig
from oreal_jax.efficiency import Peak, Work
from oreal_jax.model import ModelConfig
from oreal_jax.plan.programs import mean_prompt

# What recomputing costs, in forward passes; attention's alone is small beside it.
RECOMPUTED = {
    "everything": 1.0,
    "offloaded": 1.0,
    "but_attention": 1.0,
    "elementwise": 0.0,
    "nothing": 0.0,
}


def passes(config: TrainConfig) -> float:
    """Forward passes' worth of products in an update, backward being two."""
    return 3 + RECOMPUTED[config.remat]


def widths(config: TrainConfig) -> tuple[int, int]:
    """Bytes of a number in decoding's weights and in its cache."""
    return (
        1 if config.decode_weights == "int8" else 2,
        1 if config.decode_cache == "float8" else 2,
    )


class Devices(NamedTuple):
    """How a run uses `all` devices: `tensor` of them make an engine of `rows` rows at a
    time."""

    all: int
    tensor: int
    rows: int
    peak: Peak


class Phase(NamedTuple):
    """FLOPs of all devices, and the seconds at the bound of each kind."""

    flops: float
    products: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        """The longest of the three."""
        return max(self.products, self.memory, self.links)

    @property
    def limit(self) -> str:
        """What that is."""
        named = {"products": self.products, "memory": self.memory}
        named["links"] = self.links
        return max(named, key=lambda name: named[name])


def phases(
    config: TrainConfig,
    shape: ModelConfig,
    devices: Devices,
    learned: list[tuple[int, int]],
    packed: int,
    micros: int,
    state_bytes: int,
    mean_tokens: int,
    moved: Mapping[str, int],
) -> dict[str, Phase]:
    """Bounds of a step's phases.

    `learned` are (prompt, completion) lengths of what is learned from, in `packed`
    tokens of rows, padding included, and `micros` micro-batches; `state_bytes` is what
    an update reads and writes on a device; `moved` is bytes through a device's links by
    phase (in "decode", for one token a row).
    """
    prompt = mean_prompt(config)
    peak, count = devices.peak, devices.all
    work = efficiency.whole(learned)._replace(tokens=packed)
    forward = efficiency.forward_flops(shape, work)
    models = 2 if config.token_reward else 1
    body = efficiency.forward_flops(shape, work._replace(predicted=0))
    update = passes(config) * (forward + (models - 1) * body)
    weights = 2 * (efficiency.layer_weights(shape) + efficiency.head_weights(shape))
    reads = weights * micros
    drawn = config.prompts_per_step * config.samples_per_prompt
    prompts = efficiency.prefill([prompt] * config.prompts_per_step)
    prefill = efficiency.forward_flops(shape, prompts)
    context = prompt + mean_tokens // 2
    steps = drawn * mean_tokens / (count / devices.tensor) / devices.rows
    width, wide = widths(config)
    step = efficiency.decode_bytes(
        shape, [context] * devices.rows, weight_bytes=width, cache_bytes=wide
    )
    tokens = drawn * mean_tokens
    decode = efficiency.forward_flops(shape, Work(tokens, tokens * context, tokens))
    bound = lambda flops, bytes, through: Phase(
        flops,
        flops / count / peak.flops,
        bytes / peak.bandwidth,
        through / peak.links,
    )
    return {
        "prefill": bound(prefill, weights / devices.tensor, moved["prefill"]),
        "decode": bound(decode, steps * step / devices.tensor, steps * moved["decode"]),
        "ref": bound(forward, reads, moved["ref"]),
        "update_actor": bound(
            update,
            2 * state_bytes + passes(config) * models * reads,
            moved["update_actor"],
        ),
    }
