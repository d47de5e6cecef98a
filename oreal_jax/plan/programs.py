"""The programs of a run, the shapes of their arguments, and other arrays in memory.

The training loop makes its programs by the same functions (train/programs.py).
"""

import functools
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
from oreal_jax.loading import compute_dtype
from oreal_jax.model import ModelConfig, decoding
from oreal_jax.sampling import Engine, runner
from oreal_jax.sampling.programs import Size, Starts
from oreal_jax.sampling.scheduler import smaller_engines
from oreal_jax.train import programs as run_programs
from oreal_jax.train.scoring import batch_shardings, make_reference_scorer
from oreal_jax.train_state import TrainedModels, TrainState


class Program(NamedTuple):
    """A jitted function of a phase and the shapes of its arguments.

    others: bytes that a device holds in addition to the arguments.
    repeats: length of loops whose length is data: micro-batches; 1 token in decoding.
    """

    name: str
    phase: str
    function: Any
    arguments: tuple
    others: int
    repeats: int = 1


class Layout(NamedTuple):
    """A run on the devices of a topology: shapes and shardings, no values."""

    mesh: Mesh
    models: TrainedModels
    engine: Engine
    size: Size
    state: TrainState
    reference: Any
    weights: Any  # the engine's
    batch: Batch
    micros: int  # micro-batches that are not empty
    processes: int

    @property
    def held(self) -> dict[str, int]:
        """Bytes that a device holds between programs."""
        models = [m for m in (self.state.policy, self.state.token_reward) if m]
        return {
            "parameters": device_bytes([m.params for m in models]),
            "optimizer": device_bytes([m.optimizer for m in models]),
            "reference": device_bytes(self.reference),
        }

    @property
    def sampling(self) -> dict[str, int]:
        """Bytes that a device holds in addition while generating."""
        cache = self.engine.programs.abstract(self.size).cache
        return {"weights": device_bytes(self.weights), "cache": device_bytes(cache)}


def layout(
    config: TrainConfig,
    shape: ModelConfig,
    devices: list,
    own: list,
    selected: list[tuple[int, int]],
) -> Layout:
    """Return the layout of a run on `devices`, of which `own` are one process's.

    `selected` are (prompt, completion) lengths of the sequences that a step trains on.

    Raises:
        InputError: mesh, engines, cache and model do not go together.
    """
    mesh = run_programs.make_run_mesh(config, shape, devices)
    models = run_programs.make_trained_models(config, shape, mesh, config.steps)
    longest = config.max_prompt_tokens
    # A plan has no tokenizer, so no stop strings: they take a few kilobytes.
    dtype = compute_dtype(config.compute, mesh)
    build = functools.partial(Engine, shape, mesh, [0], dtype=dtype, devices=own)
    engine = run_programs.make_engine(config, build, longest)
    processes = len({device.process_index for device in devices})
    completions = -(-config.prompts_per_step // processes) * config.samples_per_prompt
    batch, _ = pack(
        [Example([0] * prompt, [0] * completion) for prompt, completion in selected],
        rows=config.packing.rows * sharding.count_row_shards(mesh),
        row_length=config.packing.row_length,
        limits=run_programs.step_size_limits(config),
    )
    state = models.abstract(mesh)
    reference = model.abstract(shape, dtype)
    weights = jax.eval_shape(engine.programs.reshard, state.policy.params)
    return Layout(
        mesh=mesh,
        models=models,
        engine=engine,
        size=engine.size(completions, longest, config.sampling.max_tokens),
        state=state,
        reference=sharding.with_shardings(
            reference, sharding.param_shardings(shape, mesh)
        ),
        weights=sharding.with_shardings(weights, engine.programs.own),
        batch=sharding.with_shardings(batch, batch_shardings(mesh)),
        micros=int(batch.filled),
        processes=processes,
    )


def selected_lengths(
    config: TrainConfig, lengths: Int[np.ndarray, "N K"]
) -> list[tuple[int, int]]:
    """Return (prompt, completion) lengths of the largest batch that a step trains on.

    It has as many completions per prompt as `keep` may select, of these lengths.
    """
    completions = run_programs.step_size_limits(config).completions
    selected = lengths[:, : completions // config.prompts_per_step]
    return [(mean_prompt_tokens(config), int(size)) for size in selected.flat]


def mean_prompt_tokens(config: TrainConfig) -> int:
    """Return the mean tokens of a prompt, assumed for competition problems."""
    return min(256, config.max_prompt_tokens)


def programs(config: TrainConfig, shape: ModelConfig, run: Layout) -> Iterator[Program]:
    """Yield all programs of a run, in the order of their first use."""
    mesh, state, batch, held = run.mesh, run.state, run.batch, run.held
    training, reference = held["parameters"] + held["optimizer"], held["reference"]
    start = run.models.initializer(mesh)
    yield Program("start", "load", start, (state.policy.params,), reference)
    yield from _sampling(config, run, training + reference)
    dtype = compute_dtype(config.compute, mesh)
    score = make_reference_scorer(shape, mesh, dtype)
    inputs = run.reference, batch
    yield Program("reference", "ref", score, inputs, training, run.micros)
    update = run_programs.make_run_step(config, run.models, mesh).program
    for frozen in (False, True) if config.freeze_steps else (False,):
        name = "train step, policy frozen" if frozen else "train step"
        inputs = state, batch, frozen
        yield Program(name, "update_actor", update, inputs, reference, run.micros)


def _sampling(config: TrainConfig, run: Layout, held: int) -> Iterator[Program]:
    """Yield the engine's programs, on the devices of one process."""
    programs, mesh, size = run.engine.programs, run.engine.mesh, run.size
    params, weights = run.state.policy.params, run.weights
    state = programs.abstract(size)
    engines = sharding.count_row_shards(mesh)
    by_rows = sharding.make_sharding(mesh, "rows")
    others = held + device_bytes(weights)

    def array(*shape: int, dtype=jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((engines, *shape), dtype, sharding=by_rows)

    outer, layers = decoding.split_layers(params)
    name, remaining = "reshard embedding, head", held - device_bytes(outer)
    yield Program(name, "gen", programs.reshard_outer, (outer,), remaining)
    everywhere = sharding.replicated(run.mesh)
    inputs = layers, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    outer, by_layer = decoding.split_layers(weights)
    finished = device_bytes((outer, by_layer[:-1]))  # before the last layer
    name, remaining = "reshard a layer", held - device_bytes(layers) + finished
    yield Program(name, "gen", programs.reshard_layer, inputs, remaining)
    width = runner.prompt_width(config.max_prompt_tokens - 1)
    count = runner.prompt_batch(max(1, runner.PREFILL // width))
    pages = -(-width // runner.PAGE)
    prompts = array(count, width), array(count), array(count, pages)
    name, inputs = f"prefill of {count} x {width}", (weights, state, *prompts)
    yield Program(name, "prefill", programs.prefill, inputs, held)

    batch = runner.slot_batch(size.slots)
    starts = Starts(
        *(array(batch) for _ in Starts._fields[:-2]),
        prompts=array(batch, size.table_pages * runner.PAGE),
        sampling=programs.abstract(size._replace(slots=batch)).slots.sampling,
    )._replace(key=array(batch, dtype=jnp.uint32))
    name, inputs = f"admission of {batch}", (state, starts, 0)
    yield Program(name, "gen", programs.admit, inputs, others)

    stop_shardings = jax.tree.map(lambda _: sharding.replicated(mesh), run.engine.stops)
    stops = sharding.with_shardings(run.engine.stops, stop_shardings)
    for slots in [size.slots, *smaller_engines(size.slots)[-1:]]:
        rows = programs.abstract(size._replace(slots=slots))
        table, runs = array(slots, size.table_pages), array(slots, dtype=bool)
        inputs = weights, rows, table, runs, runner.DISPATCH, 0, stops
        name = f"decode in {slots} slots"
        yield Program(name, "decode", programs.decode, inputs, held)

    if config.cache_tokens:  # rows may be swapped out
        pages = size.table_pages
        row = programs.abstract(size._replace(slots=1, pages=pages))
        place = array(1), array(1, pages)
        name, inputs = f"swap-out of {pages} pages", (state, *place)
        yield Program(name, "gen", programs.swap_out, inputs, others)
        name, inputs = f"swap-in of {pages} pages", (state, row, *place)
        yield Program(name, "gen", programs.swap_in, inputs, others)
    name, inputs = f"collection of {batch}", (state.slots.outputs, array(batch))
    yield Program(name, "gen", programs.take, inputs, others)


def device_bytes(tree: Any) -> int:
    """Count the bytes of `ShapeDtypeStruct`s on one device, not in host memory."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.ShapeDtypeStruct)
        and leaf.sharding.memory_kind != "pinned_host"
    )
