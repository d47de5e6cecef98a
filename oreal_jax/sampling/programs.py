"""Compiled programs of the engines: prefill, admission, decoding, swapping.

Letters: E engines, B slots, A slots written or read at once, N new tokens per slot, R
prompts of S tokens, M pages of a block table, T stop tokens, V vocabulary.

Every data shard of the mesh is an engine; arrays have a leading axis of engines, which
the functions of one engine do not see. Sampling parameters and stop conditions are
arrays too, so requests of every kind share the compiled programs.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from oreal_jax import model_parallel, sharding
from oreal_jax.mesh import EngineMeshes, platform
from oreal_jax.metrics import compilations
from oreal_jax.model import ModelConfig, Params, decoding, exact_matmuls, float8
from oreal_jax.model.decoding import Cache, Weights
from oreal_jax.model.kernels import choose_pages
from oreal_jax.sampling.parameters import Sampling, SlotSampling
from oreal_jax.sampling.sampler import History, Stages, sample_tokens
from oreal_jax.sampling.stops import MATCHED, START, Stops


class Size(NamedTuple):
    """Static shapes of each engine in a call; powers of two, so that programs are few.

    `pages` is the size of the cache; `table_pages` (the length of a block table),
    `new_tokens` and `biases` (of logits) are maxima per slot.
    """

    slots: int
    pages: int
    table_pages: int
    new_tokens: int
    biases: int


class Slots(NamedTuple):
    """The state of B slots, each with at most N new tokens."""

    token: Int[Array, "B"]  # to be fed next
    position: Int[Array, "B"]  # of that token
    generated: Int[Array, "B"]  # number of tokens
    limit: Int[Array, "B"]  # maximum of `generated`
    done: Bool[Array, "B"]  # finished, or idle
    stop_state: Int[Array, "B"]  # of the automaton of stop strings
    sampling: SlotSampling
    history: History
    keys: UInt32[Array, "B 2"]
    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    sampled_log_probs: Float[Array, "B N"]

    @classmethod
    def idle(cls, size: Size, vocab: int) -> "Slots":
        """Return idle slots."""
        B, N = size.slots, size.new_tokens
        greedy = SlotSampling.one(Sampling(max_tokens=1, temperature=0.0), size.biases)
        return cls(
            token=jnp.zeros(B, jnp.int32),
            position=jnp.zeros(B, jnp.int32),
            generated=jnp.zeros(B, jnp.int32),
            limit=jnp.zeros(B, jnp.int32),
            done=jnp.ones(B, bool),
            stop_state=jnp.full(B, START, jnp.int32),
            sampling=jax.tree.map(lambda x: jnp.full((B, *x.shape), x), greedy),
            history=History(
                jnp.zeros((B, vocab), bool), jnp.zeros((B, vocab), jnp.int32)
            ),
            keys=jnp.zeros((B, 2), jnp.uint32),
            tokens=jnp.zeros((B, N), jnp.int32),
            log_probs=jnp.zeros((B, N)),
            sampled_log_probs=jnp.zeros((B, N)),
        )

    @property
    def outputs(self) -> tuple[Any, Any, Any, Any]:
        """The arrays that completions are made of."""
        return self.tokens, self.log_probs, self.sampled_log_probs, self.stop_state


class DecodeState(NamedTuple):
    """The cache and the slots of an engine."""

    cache: Cache
    slots: Slots


class Starts(NamedTuple):
    """Samples to start in slots; slot -1 is padding.

    Page `source` is copied to page `target`. `prompts` are tokens for the penalties,
    padded with one beyond the vocabulary.
    """

    slot: Int[Any, "*A"]
    token: Int[Any, "*A"]  # the last of the prompt
    position: Int[Any, "*A"]  # of that token
    limit: Int[Any, "*A"]
    seed: Int[Any, "*A"]
    key: UInt32[Any, "*A"]  # of the prompt
    sample: Int[Any, "*A"]
    source: Int[Any, "*A"]
    target: Int[Any, "*A"]
    prompts: Int[Any, "*A S"]
    sampling: SlotSampling


class Programs:
    """The jitted programs of a process's engines; each compiled once per shape.

    `compile_seconds` is the longest compilation of a decoding program so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        meshes: EngineMeshes,
        *,
        page_size: int,
        dtype: Any,
        weights: Literal["full", "int8"],
        cache_dtype: Any,
        real_tokens: int,
    ):
        """Make programs for a cache of `page_size` tokens per page.

        The other arguments are as in `Engine`. Only resharding of the weights concerns
        the engines of other processes.
        """
        mesh = self.mesh = meshes.own
        self.page_size, self.cache_dtype = page_size, cache_dtype
        self.config = decoding.repeat_kv_heads(config, mesh.shape["tensor"])
        heads = self.config.kv_heads // mesh.shape["tensor"]
        self.form = choose_pages(platform(mesh), heads, config.head_dim, cache_dtype)
        self.attend = model_parallel.shard_over_heads(self.form.attend, mesh)
        choose = functools.partial(sample_tokens, real_tokens=real_tokens)
        self.sample_tokens = model_parallel.shard_over_slots(choose, mesh)
        self.execution = model_parallel.make_prompt_execution(mesh)

        int8 = weights == "int8"
        fit = (
            float8.fold_scales
            if cache_dtype.itemsize == 1
            else lambda _, params: params
        )
        axes = decoding.axes(self.config, int8=int8)
        self.own = sharding.decoding_shardings(axes, mesh)
        shardings = sharding.decoding_shardings(axes, meshes.all)
        outer_shardings, layer_shardings = decoding.split_layers(shardings)
        layout = {"dtype": dtype, "int8": int8}

        def layer(layers, index):
            take = lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1)
            one = fit(self.config, {"layers": jax.tree.map(take, layers)})["layers"]
            one = jax.tree.map(lambda x: x[0], one)
            return decoding.lay_out_layer(self.config, one, **layout)

        self.reshard_layer = jax.jit(layer, out_shardings=layer_shardings[0])
        self.reshard_outer = jax.jit(
            lambda outer: decoding.lay_out_outer(self.config, outer, **layout),
            out_shardings=outer_shardings,
        )

        # A decoder compiled for a size must accept the state from all these programs.
        by_engine = sharding.make_sharding(mesh, "rows")
        page = sharding.page_shardings(self.form, mesh)
        shapes = jax.eval_shape(lambda: Slots.idle(Size(1, 1, 1, 1, 1), config.vocab))
        self.shardings = DecodeState(
            (page,) * config.layers, jax.tree.map(lambda _: by_engine, shapes)
        )
        jit = functools.partial(jax.jit, out_shardings=self.shardings)
        # `split` tells which arguments have a leading axis of engines.
        per_engine = lambda function, *split: model_parallel.map_engines(
            function, mesh, split
        )
        self.empty = jit(self._empty, static_argnums=0)
        prefill = exact_matmuls(self._prefill, dtype)
        prefill = per_engine(prefill, False, True, True, True, True)
        self.prefill = jit(prefill, donate_argnums=1)
        self.admit = jit(per_engine(self._admit, True, True, False), donate_argnums=0)
        self.decode = jax.jit(
            exact_matmuls(self._decode, dtype),
            donate_argnums=1,
            out_shardings=(self.shardings, sharding.replicated(mesh)),
        )
        self.take = jax.jit(per_engine(_take, True, True), out_shardings=by_engine)
        self.swap_out = jax.jit(per_engine(_swap_out, True, True, True))
        swap_in = per_engine(_swap_in, True, True, True, True)
        self.swap_in = jit(swap_in, donate_argnums=0)
        self._compiled: dict[tuple, Callable] = {}
        self.compile_seconds = 0.0

    def reshard(self, params: Params) -> Weights:
        """Return the trainer's parameters as decoding reads them, on all engines.

        One program, compiled once, lays out each layer in turn; it needs temporary
        memory for a single layer.
        """
        outer, layers = decoding.split_layers(params)
        weights = self.reshard_outer(outer)
        indices = map(np.int32, range(self.config.layers))
        layers = tuple(self.reshard_layer(layers, index) for index in indices)
        return weights | {"layers": layers}

    def weights(self, params: Params) -> Weights:
        """Return the trainer's parameters as decoding reads them, on our engines."""
        return jax.tree.map(sharding.local_part, self.reshard(params), self.own)

    def compiled_decode(self, size: Size, *arguments) -> Callable:
        """Return `decode`, compiled once for each size and shape of the stops."""
        key = size, arguments[-1].shapes
        if key not in self._compiled:
            # A program loaded from disk counts with the seconds it once took.
            saved, start = compilations.saved_seconds, time.perf_counter()
            self._compiled[key] = self.decode.lower(*arguments).compile()
            seconds = time.perf_counter() - start + compilations.saved_seconds - saved
            self.compile_seconds = max(self.compile_seconds, seconds)
        return self._compiled[key]

    def compiled_sizes(self, stops: Stops) -> list[Size]:
        """Return the sizes that decoding with stops of these shapes is compiled for."""
        return [size for size, shapes in self._compiled if shapes == stops.shapes]

    def abstract(self, size: Size) -> DecodeState:
        """Return the shapes, types and shardings of `empty`."""
        shapes = jax.eval_shape(lambda: self._empty(size))
        return sharding.with_shardings(shapes, self.shardings)

    def _empty(self, size: Size) -> DecodeState:
        """Return idle slots and an empty cache on every engine."""
        config, engines = self.config, sharding.count_row_shards(self.mesh)
        page = self.form.empty(
            size.pages,
            self.page_size,
            config.kv_heads,
            config.head_dim,
            self.cache_dtype,
        )
        state = DecodeState((page,) * config.layers, Slots.idle(size, config.vocab))
        repeat = lambda x: jnp.broadcast_to(x[None], (engines, *x.shape))
        return jax.tree.map(repeat, state)

    def _prefill(
        self,
        weights: Weights,
        state: DecodeState,
        prompts: Int[Array, "R S"],
        lengths: Int[Array, "R"],
        table: Int[Array, "R M"],
    ) -> DecodeState:
        """Run prompts and store their keys and values in the pages of `table`."""
        cache = decoding.prefill(
            self.config, weights, prompts, lengths, state.cache, table, self.execution
        )
        return state._replace(cache=cache)

    def _admit(self, state: DecodeState, starts: Starts, step) -> DecodeState:
        """Start samples in slots."""
        A, N = len(starts.slot), state.slots.tokens.shape[1]
        size = Size(A, 0, 0, N, starts.sampling.bias_tokens.shape[1])
        slots = Slots.idle(size, self.config.vocab)
        in_prompt = slots.history.prompt.at[jnp.arange(A)[:, None], starts.prompts]
        slots = slots._replace(
            token=starts.token,
            position=starts.position,
            limit=starts.limit,
            done=jnp.zeros(A, bool),
            sampling=starts.sampling,
            history=slots.history._replace(prompt=in_prompt.set(True, mode="drop")),
            keys=jax.vmap(_sample_key, in_axes=(0, None, 0, 0))(
                starts.seed, step, starts.key, starts.sample
            ),
        )
        return DecodeState(
            jax.tree.map(
                lambda x: x.at[starts.target].set(x[starts.source]), state.cache
            ),
            _put(state.slots, starts.slot, slots),
        )

    def _decode(
        self,
        weights: Weights,
        state: DecodeState,
        table: Int[Array, "E B M"],
        active: Bool[Array, "E B"],
        max_steps,
        min_finished,
        stops: Stops,
    ) -> tuple[DecodeState, Int[Array, ""]]:
        """Decode active slots; also returns the number of steps.

        Ends when `max_steps` tokens have been generated in each slot, or `min_finished`
        sequences have finished (0: all).
        """
        slots = state.slots._replace(done=state.slots.done | ~active)
        target = jnp.sum(slots.done) + min_finished
        target = jnp.where(min_finished > 0, target, slots.done.size)
        target = jnp.minimum(target, slots.done.size)
        stages = Stages.needed(slots.sampling, ~slots.done)
        advance = model_parallel.map_engines(
            self._advance, self.mesh, (False, True, True, False, False)
        )

        def is_unfinished(carry):
            state, steps = carry
            return (steps < max_steps) & (jnp.sum(state.slots.done) < target)

        def decode_token(carry):
            state, steps = carry
            return advance(weights, state, table, stages, stops), steps + 1

        start = state._replace(slots=slots), jnp.int32(0)
        return jax.lax.while_loop(is_unfinished, decode_token, start)

    def _advance(
        self,
        weights: Weights,
        state: DecodeState,
        table: Int[Array, "B M"],
        stages: Stages,
        stops: Stops,
    ) -> DecodeState:
        """Decode a token in every slot; idle slots write to page 0, which is unused."""
        slots = state.slots
        positions = jnp.where(slots.done, 0, slots.position)
        logits, cache = decoding.decode(
            self.config,
            weights,
            slots.token,
            positions,
            state.cache,
            jnp.where(slots.done[:, None], 0, table),
            self.attend,
        )
        return DecodeState(cache, self._sample(slots, logits, stages, stops))

    def _sample(
        self, slots: Slots, logits: Float[Array, "B V"], stages: Stages, stops: Stops
    ) -> Slots:
        """Sample and record a token in every slot that is not done."""
        keys = jax.vmap(_fold)(slots.keys, slots.generated)
        token, log_prob, sampled = self.sample_tokens(
            logits, stages, keys, slots.sampling, slots.history
        )
        running, rows = ~slots.done, jnp.arange(slots.done.size)
        at = (rows, jnp.where(running, slots.generated, slots.tokens.shape[1]))
        put = lambda array, values: array.at[at].set(values, mode="drop")
        stopped = jnp.any(token[:, None] == stops.tokens[None], axis=-1)
        stop_state = stops.table[token, slots.stop_state]
        stopped |= stop_state == MATCHED
        stopped |= ~jnp.isfinite(log_prob)  # `Engine.sample` raises its error
        counts = slots.history.generated.at[rows, token].add(running)
        generated = slots.generated + running
        return slots._replace(
            token=jnp.where(running, token, slots.token),
            position=slots.position + running,
            generated=generated,
            done=slots.done | stopped | (generated >= slots.limit),
            stop_state=jnp.where(running, stop_state, slots.stop_state),
            history=slots.history._replace(generated=counts),
            tokens=put(slots.tokens, token),
            log_probs=put(slots.log_probs, log_prob),
            sampled_log_probs=put(slots.sampled_log_probs, sampled),
        )


def _take(arrays: Any, indices: Int[Array, "A"]) -> Any:
    """Return these slots or pages of a tree of arrays."""
    return jax.tree.map(lambda x: x[indices], arrays)


def _put(arrays: Any, slots: Int[Array, "A"], values: Any) -> Any:
    """Write trees of values to slots; slot -1 is dropped."""

    def put(array, values):
        there = jnp.where(slots < 0, len(array), slots)
        return array.at[there].set(values, mode="drop")

    return jax.tree.map(put, arrays, values)


def _swap_out(
    state: DecodeState, slot: Int[Array, "1"], pages: Int[Array, "1 M"]
) -> DecodeState:
    """Return a slot and its pages, as the state of an engine of one slot."""
    return DecodeState(_take(state.cache, pages[0]), _take(state.slots, slot))


def _swap_in(
    state: DecodeState,
    row: DecodeState,
    slot: Int[Array, "1"],
    pages: Int[Array, "1 M"],
) -> DecodeState:
    """Write the result of `_swap_out` to a slot, -1 for none, and other pages."""
    fill = lambda array, values: array.at[pages[0]].set(values)
    cache = jax.tree.map(fill, state.cache, row.cache)
    return DecodeState(cache, _put(state.slots, slot, row.slots))


def _fold(key: UInt32[Array, "2"], number) -> UInt32[Array, "2"]:
    folded = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.key_data(folded)


def _sample_key(seed, step, prompt, sample) -> UInt32[Array, "2"]:
    """Return the key of a sample: seed, then step, prompt and sample folded in."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    key = jax.random.fold_in(jax.random.fold_in(key, prompt.astype(jnp.uint32)), sample)
    return jax.random.key_data(key)


# Engines of a process with equal arguments share the compiled programs.
programs_for = functools.lru_cache(maxsize=8)(Programs)
