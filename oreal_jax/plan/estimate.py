"""The same plan for GPUs, by formula: their compiler does not work without one.

State and cache are exact; what a training step needs in between is what our programs
keep: layer inputs, gradients, the head's chunk of logits.
"""

from collections.abc import Sequence
from typing import NamedTuple

from oreal_jax import model, sharding
from oreal_jax.config import TrainConfig
from oreal_jax.data.packing import bucket, fill_rows
from oreal_jax.errors import BadInput
from oreal_jax.model import ModelConfig
from oreal_jax.model.head import HEAD_CHUNK
from oreal_jax.plan import roofline
from oreal_jax.plan.findings import Compiled, Findings
from oreal_jax.sampling.work import PAGE
from oreal_jax.train.state import Optimizer


class Gpu(NamedTuple):
    """A kind of GPU: its name in `efficiency.PEAKS`, and bytes of memory."""

    kind: str
    memory: int


# NVIDIA's data sheets.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80 * 10**9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9),
    "h200": Gpu("NVIDIA H200", 141 * 10**9),
}


def gpus_of(topology: str) -> tuple[Gpu, int]:
    """What "h100:8" names.

    Raises:
        BadInput: no such GPU, or no number.
    """
    name, _, count = topology.partition(":")
    if name not in GPUS or not count.isdigit() or not int(count):
        raise BadInput(
            f"--topology {topology}: GPUs are given as {', '.join(GPUS)} and a number, "
            "e.g. h100:8"
        )
    return GPUS[name], int(count)


def estimated(
    config: TrainConfig,
    shape: ModelConfig,
    topology: str,
    learned: Sequence[tuple[int, int]],
) -> Findings:
    """A run on GPUs, eight of which are a process's. `learned` are the (prompt,
    completion) lengths of what a step learns from.

    Raises:
        BadInput: unknown GPUs, or mesh and model do not go together.
    """
    gpu, devices = gpus_of(topology)
    sizes = sharding.sizes_of(config.mesh, shape, devices)
    mesh: dict[str, int] = dict(zip(sharding.AXES, sizes, strict=True))
    ways = mesh["fsdp"] * mesh["tensor"]
    tensor = config.decode_tensor or mesh["tensor"]
    numbers = model.parameter_count(shape)
    trained = [(numbers, config.policy)]
    if config.token_reward:
        head = 0 if shape.tied else shape.embed * shape.vocab
        trained.append((numbers - head + shape.embed, config.token_reward))
    held = {
        "parameters": sum(4 * count // ways for count, _ in trained),
        "optimizer": sum(count * _moments(how) // ways for count, how in trained),
        "reference": 2 * numbers // ways,
    }
    slots = -(-config.decode_rows * tensor // devices)
    longest = config.max_prompt_tokens + config.sampling.max_tokens
    room = PAGE * (bucket(-(-longest // PAGE)) + 1) * (slots + 1)
    cache_tokens = min(room, config.cache_tokens or room)
    width, wide = roofline.widths(config)
    heads = max(shape.kv_heads, tensor)  # repeated where they are fewer
    a_token = 2 * shape.layers * heads * shape.head_dim * wide
    sampling = {
        "weights": numbers * width // tensor,
        "cache": cache_tokens * a_token // tensor,
        "penalties": slots * shape.vocab * 5,  # `Seen`, a byte and four
    }
    beside, drawing = sum(held.values()), sum(sampling.values())
    training = _training(config, shape, mesh, [count for count, _ in trained])
    packing, parts = config.packing, mesh["data"] * mesh["fsdp"]
    filled = len(fill_rows([sum(pair) for pair in learned], packing.row_length))
    micros = -(-filled // (packing.rows * parts))

    def program(name: str, phase: str, arguments: int, temporary: int) -> Compiled:
        peak = beside + arguments + temporary
        sizes = (arguments, 0, temporary, beside, peak)
        return Compiled(f"{name}, by formula", phase, *sizes, {}, 0.0)

    return Findings(
        kind=gpu.kind,
        memory=gpu.memory,
        devices=devices,
        processes=-(-devices // 8),
        micros=micros,
        mesh=mesh,
        tensor=tensor,
        slots=slots,
        cache_tokens=cache_tokens,
        held=held,
        sampling=sampling,
        programs=[
            program("sampling", "gen", drawing, 0),
            program("train step", "update_actor", 0, training),
        ],
        moved=_moved(config, shape, mesh, tensor, slots, micros),
    )


def _moved(
    config: TrainConfig,
    shape: ModelConfig,
    mesh: dict[str, int],
    tensor: int,
    slots: int,
    micros: int,
) -> dict[str, int]:
    """Bytes through a device's links: weights gathered for each pass of a micro-batch
    and gradients scattered (FSDP); two sums a layer of what is split over tensor."""
    weights = 2 * model.parameter_count(shape) // mesh["tensor"]
    gathered = weights if mesh["fsdp"] > 1 else 0
    tokens = config.packing.rows * config.packing.row_length // mesh["context"]
    sums = lambda rows, ways: 4 * shape.layers * rows * shape.embed * 2 * (ways > 1)
    forward = micros * (gathered + sums(tokens, mesh["tensor"]))
    models = 2 if config.token_reward else 1
    return {
        "prefill": sums(config.max_prompt_tokens, tensor),
        "decode": sums(slots, tensor),
        "ref": forward,
        "update_actor": int(models * roofline.passes(config) * forward),
    }


def _moments(optimizer: Optimizer) -> int:
    """Bytes a weight on the device."""
    if optimizer.offload:
        return 0
    return 4 + (2 if optimizer.momentum == "bfloat16" else 4)


def _training(
    config: TrainConfig, shape: ModelConfig, sizes: dict[str, int], trained: list[int]
) -> int:
    """What a training step needs beside the state, on one device."""
    ways, tensor = sizes["fsdp"] * sizes["tensor"], sizes["tensor"]
    tokens = config.packing.rows * config.packing.row_length // sizes["context"]
    queries, keys = (n * shape.head_dim for n in (shape.heads, shape.kv_heads))
    products = 2 * (queries + keys + shape.mlp) // tensor + shape.embed
    kept = {
        "everything": shape.embed,
        "but_attention": shape.embed + queries // tensor,
        "elementwise": shape.embed + products,
        "nothing": 3 * shape.embed + 2 * products,  # norms, rotated, gated: about
        "offloaded": 0,
    }
    layers = 2 * shape.layers * tokens * kept[config.remat]
    gradients = sum(2 * 4 * count // ways for count in trained)  # the sum and its next
    casts = 2 * max(trained) // ways
    head = (2 + 4) * shape.embed * shape.vocab // tensor  # gathered, its gradient
    logits = 3 * 4 * min(tokens, HEAD_CHUNK) * shape.vocab // tensor
    return layers + gradients + casts + head + logits
