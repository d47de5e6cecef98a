"""The same plan for GPUs, by formula: their compiler does not work without one.

State and cache are exact; what a training step needs in between is what our programs
keep: layer inputs, gradients, the head's chunk of logits.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from oreal_jax import model, sharding
from oreal_jax.config import TrainConfig
from oreal_jax.data.packing import Shape, arrange
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig
from oreal_jax.model.head import HEAD_CHUNK
from oreal_jax.plan import roofline
from oreal_jax.plan.findings import Compiled, Findings
from oreal_jax.sampling.work import PAGE
from oreal_jax.shapes import bucket
from oreal_jax.train.programs import limits_of
from oreal_jax.train.state import Optimizer


class Gpu(NamedTuple):
    """A kind of GPU: its name in `efficiency.PEAKS`, and bytes of memory, of which
    JAX takes a part (`allocated`)."""

    kind: str
    memory: int


PROCESS = 8  # GPUs
PREALLOCATED = 0.75  # JAX's share of a GPU's memory where nothing is set
FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# NVIDIA's data sheets; a driver reports a few percent more.
GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80 * 10**9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9),
    "h200": Gpu("NVIDIA H200", 141 * 10**9),
}


def gpus_of(topology: str) -> tuple[Gpu, int]:
    """What "h100:8" names.

    Raises:
        InputError: no such GPU, or no number.
    """
    name, _, count = topology.partition(":")
    if name not in GPUS or not count.isdigit() or not int(count):
        raise InputError(
            f"--topology {topology}: GPUs are given as {', '.join(GPUS)} and a number, "
            "e.g. h100:8"
        )
    if int(count) > PROCESS and int(count) % PROCESS:
        raise InputError(
            f"--topology {topology}: a process has {PROCESS} GPUs; take a multiple, "
            f"e.g. {name}:{PROCESS}"
        )
    return GPUS[name], int(count)


def allocated(memory: int) -> int:
    """Bytes of a GPU's `memory` that JAX can allocate, by the variables that it reads
    (docs.jax.dev/en/latest/gpu_memory_allocation.html). The share bounds it whether it
    preallocates or not; only the allocator "platform" knows none.

    Raises:
        InputError: a variable that JAX would refuse, or more than there is.
    """
    given = {name: os.environ[name] for name in FRACTIONS if os.environ.get(name)}
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are both set; JAX accepts only one")
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return memory
    for name, text in given.items():
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise InputError(f"{name}={text} must be a number above 0 and at most 1")
        return int(share * memory)
    return int(PREALLOCATED * memory)


def estimated(
    config: TrainConfig,
    shape: ModelConfig,
    topology: str,
    learned: Sequence[tuple[int, int]],
) -> Findings:
    """A run on GPUs, eight of which are a process's. `learned` are the (prompt,
    completion) lengths of what a step learns from.

    Raises:
        InputError: unknown GPUs, or mesh, engines and model do not go together, or the
            longest completion does not fit the cache.
    """
    gpu, devices = gpus_of(topology)
    memory = allocated(gpu.memory)
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
    own = min(devices, PROCESS)
    if own % tensor:
        raise InputError(
            f"--topology {topology}: an engine of {tensor} devices "
            f"(decode_tensor={config.decode_tensor}) does not divide a process's {own}"
        )
    slots = -(-config.decode_rows * tensor // devices)
    completions = -(-config.prompts_per_step * own // devices)
    completions *= config.samples_per_prompt
    slots = min(slots, bucket(-(-completions * tensor // own)))
    longest = config.max_prompt_tokens + config.sampling.max_tokens
    if 0 < config.cache_tokens < longest + 2 * PAGE:
        raise InputError(
            f"cache_tokens={config.cache_tokens} has no room for max_prompt_tokens="
            f"{config.max_prompt_tokens} + sampling.max_tokens="
            f"{config.sampling.max_tokens}"
        )
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
    groups, size = arrange(
        learned,
        rows=packing.rows * parts,
        row_length=packing.row_length,
        limits=limits_of(config),
    )

    def program(name: str, phase: str, arguments: int, temporary: int) -> Compiled:
        peak = beside + arguments + temporary
        sizes = (arguments, 0, temporary, beside, peak)
        return Compiled(f"{name}, by formula", phase, *sizes, {}, 0.0)

    return Findings(
        kind=gpu.kind,
        memory=memory,
        devices=devices,
        processes=-(-devices // PROCESS),
        micros=len(groups),
        mesh=mesh,
        tensor=tensor,
        slots=slots,
        cache_tokens=cache_tokens,
        held=held,
        sampling=sampling,
        programs=[
            program("sampling", "gen", drawing, 0),
            program("train step", "update_actor", _batch(config, mesh, size), training),
        ],
        moved=_moved(config, shape, mesh, tensor, slots, len(groups)),
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


def _batch(config: TrainConfig, mesh: dict[str, int], size: Shape) -> int:
    """A step's batch and the scores of its tokens, on one device: rows are split,
    arrays with one entry per completion are replicated (train/step.py)."""
    packing = config.packing
    tokens = 3 * packing.row_length // mesh["context"] + 2 * size.columns
    completions = size.completions * (2 + 4) * size.tokens
    return 4 * size.micros * (packing.rows * tokens + completions)


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
        # and the log-sum-exp of each head, in float32
        "but_attention": shape.embed + (queries + 2 * shape.heads) // tensor,
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
