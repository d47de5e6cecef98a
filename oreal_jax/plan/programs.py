"""The programs of a run, each with its arguments as shapes, and what lies beside it.

They are made by the same functions as the loop's (train/programs.py); nothing here is
a copy of one.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from oreal_jax import model, sharding
from oreal_jax.config import TrainConfig
from oreal_jax.data.packing import Batch, Example, pack
from oreal_jax.model import ModelConfig
from oreal_jax.sampling import Engine
from oreal_jax.sampling.programs import Size, Starts
from oreal_jax.sampling.scheduler import smaller
from oreal_jax.sampling.work import (
    DISPATCH,
    PAGE,
    PREFILL,
    prompt_batch,
    prompt_width,
    slot_batch,
)
from oreal_jax.train.programs import (
    compute_dtype,
    engine_of,
    learners_of,
    limits_of,
    mesh_of,
    update_of,
)
from oreal_jax.train.state import Learners, TrainState
from oreal_jax.train.step import of_batch, reference_scorer


class Program(NamedTuple):
    """A jitted function of a phase, its arguments as shapes, and the bytes a device
    holds beside them while it runs. `repeats` is how often a loop of it runs whose
    length is data: the micro-batches of a step; of decoding, one token is counted."""

    name: str
    phase: str
    function: Any
    arguments: tuple
    beside: int
    repeats: int = 1

    def lower(self) -> jax.stages.Lowered:
        """What the compiler is given."""
        return self.function.lower(*self.arguments)


class Layout(NamedTuple):
    """A run on the devices of a topology, without its numbers."""

    mesh: Mesh
    learners: Learners
    engine: Engine
    size: Size
    state: TrainState
    reference: Any
    weights: Any  # as decoding reads them
    batch: Batch
    micros: int  # of which the batch is made
    processes: int

    @property
    def bytes(self) -> dict[str, int]:
        """What a device holds between programs."""
        state = self.state
        players = [p for p in (state.policy, state.token_reward) if p]
        return {
            "parameters": on_device([p.params for p in players]),
            "optimizer": on_device([p.optimizer for p in players]),
            "reference": on_device(self.reference),
        }


def layout(
    config: TrainConfig,
    shape: ModelConfig,
    devices: list,
    host: list,
    learned: list[tuple[int, int]],
) -> Layout:
    """Lays a run out on `devices`, of which `host` is one process's part. `learned` are
    the (prompt, completion) lengths of what a step learns from.

    Raises:
        InputError: mesh and model do not go together.
    """
    mesh = mesh_of(config, shape, devices)
    learners = learners_of(config, shape, mesh, config.steps)
    # Stop tokens and strings are the tokenizer's, which a plan does not have; they
    # take a few kilobytes.
    longest = config.max_prompt_tokens
    engine = engine_of(config, shape, mesh, [0], None, longest, devices=host)
    new_tokens = config.sampling.max_tokens
    processes = len({device.process_index for device in devices})
    prompts = -(-config.prompts_per_step // processes)
    size = engine.size(prompts * config.samples_per_prompt, longest, new_tokens)
    batch, _ = pack(
        [Example([0] * prompt, [0] * completion) for prompt, completion in learned],
        rows=config.packing.rows * sharding.row_ways(mesh),
        row_length=config.packing.row_length,
        limits=limits_of(config),
    )
    dtype = compute_dtype(config.compute, mesh)
    state = learners.abstract(mesh)
    weights = jax.eval_shape(engine.programs.reshard, state.policy.params)
    return Layout(
        mesh,
        learners,
        engine,
        size,
        state,
        sharding.placed(model.abstract(shape, dtype), sharding.of_params(shape, mesh)),
        sharding.placed(weights, engine.programs.own),
        sharding.placed(batch, of_batch(mesh)),
        int(batch.filled),
        processes,
    )


def learned(
    config: TrainConfig, lengths: Int[np.ndarray, "N K"]
) -> list[tuple[int, int]]:
    """(prompt, completion) lengths of the most that a step learns from, where its
    completions have these lengths: as many of each prompt as `keep` may leave."""
    each = limits_of(config).completions // config.prompts_per_step
    prompt = mean_prompt(config)
    return [(prompt, int(size)) for size in lengths[:, :each].flat]


def mean_prompt(config: TrainConfig) -> int:
    """Tokens of a prompt on average, as problems of competitions have them."""
    return min(256, config.max_prompt_tokens)


def programs(config: TrainConfig, shape: ModelConfig, run: Layout) -> Iterator[Program]:
    """All programs of a run, in the order in which it meets them."""
    mesh, state, batch = run.mesh, run.state, run.batch
    held = run.bytes
    training, reference = held["parameters"] + held["optimizer"], held["reference"]
    params = state.policy.params
    yield Program("start", "load", run.learners.starter(mesh), (params,), reference)
    yield from _sampling(config, run, training + reference)
    score = reference_scorer(shape, mesh, compute_dtype(config.compute, mesh))
    yield Program(
        "reference",
        "ref",
        score,
        (run.reference, batch),
        training,
        run.micros,
    )
    update = update_of(config, run.learners, mesh)
    kinds = [("train step", False)]
    if config.freeze_steps:
        kinds.append(("train step, policy frozen", True))
    for name, frozen in kinds:
        yield Program(
            name,
            "update_actor",
            update.program,
            (state, batch, frozen),
            reference,
            run.micros,
        )


def _sampling(config: TrainConfig, run: Layout, held: int) -> Iterator[Program]:
    """The engine's programs: one process's, on its own devices."""
    programs, mesh, size = run.engine.programs, run.engine.mesh, run.size
    params, weights = run.state.policy.params, run.weights
    beside = held - on_device(params)
    yield Program("reshard", "gen", programs.reshard, (params,), beside)
    engines, rows = sharding.row_ways(mesh), sharding.of_rows(mesh)
    array = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
        (engines, *shape), dtype, sharding=rows
    )
    replicated = lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding.replicated(mesh)
    )
    stops = jax.tree.map(replicated, run.engine.stops)
    state = programs.abstract(size)
    length = prompt_width(config.max_prompt_tokens - 1)
    count = prompt_batch(max(1, PREFILL // length))
    prompts = array(count, length), array(count), array(count, -(-length // PAGE))
    yield Program(
        f"prefill of {count} x {length}",
        "prefill",
        programs.prefill,
        (weights, state, *prompts),
        held,
    )
    batch = slot_batch(size.slots)
    starts = Starts(
        *(array(batch) for _ in Starts._fields[:-2]),
        prompts=array(batch, size.table_pages * PAGE),
        sampling=programs.abstract(size._replace(slots=batch)).sampling,
    )._replace(key=array(batch, dtype=jnp.uint32))
    beside = held + on_device(weights)
    yield Program(
        f"admission of {batch}",
        "gen",
        programs.admit,
        (state, starts, 0),
        beside,
    )
    fewest = size.slots
    while smaller(fewest):
        fewest = smaller(fewest)
    for slots in dict.fromkeys([size.slots, fewest]):
        remaining = programs.abstract(size._replace(slots=slots))
        table, runs = array(slots, size.table_pages), array(slots, dtype=bool)
        yield Program(
            f"decode in {slots} slots",
            "decode",
            programs.decode,
            (weights, remaining, table, runs, DISPATCH, 0, stops),
            held,
        )
    if config.cache_tokens:  # rows may have to make room
        row = programs.abstract(size._replace(slots=1, pages=size.table_pages))
        where = array(1), array(size.table_pages)
        for name, function, arguments in [
            ("swap-out", programs.swap_out, (state, *where)),
            ("swap-in", programs.swap_in, (state, row, *where)),
        ]:
            name += f" of {size.table_pages} pages"
            yield Program(name, "gen", function, arguments, beside)
    yield Program(
        f"collection of {batch}",
        "gen",
        programs.take,
        (state, array(batch)),
        beside,
    )


def on_device(tree: Any) -> int:
    """Bytes of one device's part of `ShapeDtypeStruct`s, host memory left out; plain
    numbers do not count."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        is_array = isinstance(leaf, jax.ShapeDtypeStruct)
        if is_array and leaf.sharding.memory_kind != "pinned_host":
            part = leaf.sharding.shard_shape(leaf.shape)
            total += math.prod(part) * np.dtype(leaf.dtype).itemsize
    return total
