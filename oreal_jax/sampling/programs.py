"""What runs on the devices: prompts into pages, samples into slots, tokens into rows.

Every data shard of the mesh is an engine of its own; arrays have a leading axis of
engines, which the programs of one engine do not see. How tokens are chosen and when a
completion ends are arrays too, so requests of every kind share the compiled programs.
"""

import functools
import time
from collections.abc import Callable, Sequence
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
from oreal_jax.sampling.choice import Seen, Uses, choose
from oreal_jax.sampling.parameters import SlotSampling
from oreal_jax.sampling.stops import FOUND, START
from oreal_jax.shapes import bucket


class Size(NamedTuple):
    """Static shapes of a call, on each engine; powers of two, so that programs are few.

    `pages` is the size of the cache, `table_pages` that of the longest row;
    `new_tokens` and `biases` (of logits) are the maxima per row.
    """

    slots: int
    pages: int
    table_pages: int
    new_tokens: int
    biases: int


class Stops(NamedTuple):
    """Stop tokens (padded with -1), and the automaton of stop strings
    (`stops.token_table`)."""

    tokens: Int[Any, "T"]
    table: Int[Any, "V S"]

    @classmethod
    def of(
        cls, tokens: Sequence[int], table: Int[np.ndarray, "V S"] | None, vocab: int
    ) -> "Stops":
        """Stops padded to few shapes; without a table no stop string matches."""
        padded = np.full(bucket(len(tokens), 8), -1, np.int32)
        padded[: len(tokens)] = sorted(tokens)
        if table is None:
            return cls(padded, np.full((vocab, 1), START, np.int32))
        states = bucket(table.shape[1])
        table = np.pad(table, ((0, 0), (0, states - table.shape[1])))
        return cls(padded, table)


class Decoding(NamedTuple):
    """The slots of an engine: B rows, at most N new tokens each."""

    cache: Cache
    token: Int[Array, "B"]  # not yet fed to the model
    position: Int[Array, "B"]  # where that token stands
    drawn: Int[Array, "B"]  # tokens drawn so far
    limit: Int[Array, "B"]  # maximum of `drawn`
    done: Bool[Array, "B"]  # finished, or idle
    matched: Int[Array, "B"]  # how much of a stop string there is: a state of `stops`
    sampling: SlotSampling
    seen: Seen
    keys: UInt32[Array, "B 2"]
    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    sampled_log_probs: Float[Array, "B N"]


class Starts(NamedTuple):
    """Samples to start; slot -1 is none. Page `source` is copied to page `target`.
    `prompts` are tokens for the penalties, padded with one beyond the vocabulary."""

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
    """The jitted programs of a sampler; each compiled once per shape.

    `compile_seconds` is the longest compilation of a decoding program so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        meshes: EngineMeshes,
        *,
        page: int,
        dtype: Any,
        weights: Literal["full", "int8"],
        cache_dtype: Any,
    ):
        """`page` tokens a page; the others as in `Engine`. Only the weights' way from
        the trainer concerns the engines of other processes."""
        mesh = meshes.own
        self.mesh, self.page, self.cache_dtype = mesh, page, cache_dtype
        self.config = decoding.repeat_kv_heads(config, mesh.shape["tensor"])
        int8 = weights == "int8"
        is_float8 = cache_dtype.itemsize == 1
        fit = float8.fold_scales if is_float8 else lambda _, params: params
        heads = self.config.kv_heads // mesh.shape["tensor"]
        self.form = choose_pages(platform(mesh), heads, config.head_dim, cache_dtype)
        self.attend = model_parallel.shard_over_heads(self.form.attend, mesh)
        self.choose = model_parallel.shard_over_slots(choose, mesh)
        axes = decoding.axes(self.config, int8=int8)
        each = lambda work, *engines: model_parallel.map_engines(work, mesh, engines)
        self.execution = model_parallel.make_prompt_execution(mesh)
        self.reshard = jax.jit(
            lambda params: decoding.lay_out(
                self.config, fit(self.config, params), dtype, int8=int8
            ),
            out_shardings=sharding.decoding_shardings(axes, meshes.all),
        )
        self.own = sharding.decoding_shardings(axes, mesh)
        self.shardings = self._shardings()
        self.empty = jax.jit(
            self._empty, static_argnums=0, out_shardings=self.shardings
        )
        # A decoder compiled for a size must accept the state from all these programs.
        prefill = each(
            exact_matmuls(self._prefill, dtype), False, True, True, True, True
        )
        self.prefill = jax.jit(prefill, donate_argnums=1, out_shardings=self.shardings)
        admit = each(self._admit, True, True, False)
        self.admit = jax.jit(admit, donate_argnums=0, out_shardings=self.shardings)
        results = self.shardings, sharding.replicated(mesh)
        self.decode = jax.jit(
            exact_matmuls(self._decode, dtype), donate_argnums=1, out_shardings=results
        )
        rows = self.shardings._replace(cache=())
        self.shrink = jax.jit(each(self._shrink, True, True), out_shardings=rows)
        self.take = jax.jit(each(self._take, True, True))
        self.swap_out = jax.jit(each(self._swap_out, True, True, True))
        swap_in = each(self._swap_in, True, True, True, True)
        self.swap_in = jax.jit(swap_in, donate_argnums=0, out_shardings=self.shardings)
        self._decoders: dict[tuple, Callable] = {}
        self.compile_seconds = 0.0

    def weights(self, params: Params) -> Weights:
        """The trainer's parameters as decoding reads them, on engines of our own."""
        return jax.tree.map(sharding.local_part, self.reshard(params), self.own)

    def decoder(self, size: Size, *arguments) -> Callable:
        """`_decode` bound to these arguments, compiled once per size and shape of the
        stops."""
        key = size, *_shapes(arguments[-1])
        if key not in self._decoders:
            # A program that is loaded from disk counts with the seconds it once took.
            saved, start = compilations.saved_seconds, time.perf_counter()
            self._decoders[key] = self.decode.lower(*arguments).compile()
            seconds = time.perf_counter() - start + compilations.saved_seconds - saved
            self.compile_seconds = max(self.compile_seconds, seconds)
        return functools.partial(self._decoders[key], *arguments)

    def sizes(self, stops: Stops) -> list[Size]:
        """Sizes that decoding is compiled for, with stops of these shapes."""
        return [size for size, *shapes in self._decoders if shapes == _shapes(stops)]

    def abstract(self, size: Size) -> Decoding:
        """Shapes, types and shardings of `empty`."""
        shapes = jax.eval_shape(lambda: self._empty(size))
        return sharding.with_shardings(shapes, self.shardings)

    def _shardings(self) -> Decoding:
        """The shardings of `Decoding`, the same for all sizes."""
        shapes = jax.eval_shape(lambda: self._empty(Size(1, 1, 1, 1, 1)))
        rows = sharding.make_sharding(self.mesh, "rows")
        shardings = jax.tree.map(lambda _: rows, shapes)
        page = sharding.page_shardings(self.form, self.mesh)
        return shardings._replace(cache=(page,) * self.config.layers)

    def _empty(self, size: Size) -> Decoding:
        """Idle slots and an empty cache on every engine."""
        config, engines = self.config, sharding.count_row_shards(self.mesh)
        B, N, V = size.slots, size.new_tokens, config.vocab
        page = self.form.empty(
            size.pages, self.page, config.kv_heads, config.head_dim, self.cache_dtype
        )
        one = Decoding(
            cache=(page,) * config.layers,
            token=jnp.zeros(B, jnp.int32),
            position=jnp.zeros(B, jnp.int32),
            drawn=jnp.zeros(B, jnp.int32),
            limit=jnp.zeros(B, jnp.int32),
            done=jnp.ones(B, bool),
            matched=jnp.full(B, START),
            sampling=jax.tree.map(jnp.asarray, SlotSampling.off((B,), size.biases)),
            seen=Seen(jnp.zeros((B, V), bool), jnp.zeros((B, V), jnp.int32)),
            keys=jnp.zeros((B, 2), jnp.uint32),
            tokens=jnp.zeros((B, N), jnp.int32),
            log_probs=jnp.zeros((B, N)),
            sampled_log_probs=jnp.zeros((B, N)),
        )
        alike = lambda x: jnp.broadcast_to(x[None], (engines, *x.shape))
        return jax.tree.map(alike, one)

    def _prefill(
        self,
        weights: Weights,
        state: Decoding,
        prompts: Int[Array, "R S"],
        lengths: Int[Array, "R"],
        table: Int[Array, "R M"],
    ) -> Decoding:
        """Runs prompts and stores their keys and values in the pages of `table`."""
        cache = decoding.prefill(
            self.config, weights, prompts, lengths, state.cache, table, self.execution
        )
        return state._replace(cache=cache)

    def _admit(self, state: Decoding, starts: Starts, step) -> Decoding:
        """Starts samples in slots."""
        # Writes out of range are dropped.
        slot = jnp.where(starts.slot < 0, state.token.size, starts.slot)
        keys = jax.vmap(_row_key, in_axes=(0, None, 0, 0))(
            starts.seed, step, starts.key, starts.sample
        )
        put = lambda array, values: array.at[slot].set(values, mode="drop")
        prompt = put(state.seen.prompt, False)
        prompt = prompt.at[slot[:, None], starts.prompts].set(True, mode="drop")
        return state._replace(
            cache=jax.tree.map(
                lambda x: x.at[starts.target].set(x[starts.source]), state.cache
            ),
            token=put(state.token, starts.token),
            position=put(state.position, starts.position),
            drawn=put(state.drawn, 0),
            limit=put(state.limit, starts.limit),
            done=put(state.done, False),
            matched=put(state.matched, START),
            sampling=jax.tree.map(put, state.sampling, starts.sampling),
            seen=Seen(prompt, put(state.seen.drawn, 0)),
            keys=put(state.keys, keys),
        )

    def _decode(
        self,
        weights: Weights,
        state: Decoding,
        table: Int[Array, "E B M"],
        runs: Bool[Array, "E B"],
        most,
        enough,
        stops: Stops,
    ) -> tuple[Decoding, Int[Array, ""]]:
        """Decodes until `most` tokens are drawn in each slot or, `enough` above 0, so
        many rows have finished. Slots not in `runs` are idle. Also the steps taken."""
        state = state._replace(done=state.done | ~runs)
        wanted = jnp.sum(state.done) + enough
        wanted = jnp.where(enough > 0, wanted, state.done.size)
        wanted = jnp.minimum(wanted, state.done.size)
        uses = Uses.of(state.sampling, ~state.done)
        advance = model_parallel.map_engines(
            self._advance, self.mesh, (False, True, True, False, False)
        )

        def go_on(carry):
            state, steps = carry
            return (steps < most) & (jnp.sum(state.done) < wanted)

        def one(carry):
            state, steps = carry
            return advance(weights, state, table, uses, stops), steps + 1

        return jax.lax.while_loop(go_on, one, (state, jnp.int32(0)))

    def _advance(
        self,
        weights: Weights,
        state: Decoding,
        table: Int[Array, "B M"],
        uses: Uses,
        stops: Stops,
    ) -> Decoding:
        """One token in every slot; idle slots write to the page that is nobody's."""
        positions = jnp.where(state.done, 0, state.position)
        order = jnp.argsort(-positions)  # longest first
        logits, cache = decoding.decode(
            self.config,
            weights,
            state.token[order],
            positions[order],
            state.cache,
            jnp.where(state.done[:, None], 0, table)[order],
            self.attend,
        )
        logits = logits[jnp.argsort(order)]
        return self._draw(state._replace(cache=cache), logits, uses, stops)

    def _draw(
        self, state: Decoding, logits: Float[Array, "B V"], uses: Uses, stops: Stops
    ) -> Decoding:
        """Draws and records a token in every row that is not done."""
        keys = jax.vmap(_fold)(state.keys, state.drawn)
        chosen = self.choose(logits, uses, keys, state.sampling, state.seen)
        running, rows = ~state.done, jnp.arange(state.done.size)
        at = (rows, jnp.where(running, state.drawn, state.tokens.shape[1]))
        put = lambda array, values: array.at[at].set(values, mode="drop")
        stopped = jnp.any(chosen.token[:, None] == stops.tokens[None], axis=-1)
        matched = stops.table[chosen.token, state.matched]
        stopped |= matched == FOUND
        stopped |= ~jnp.isfinite(chosen.log_prob)  # `Engine.sample` raises its error
        seen = state.seen.drawn.at[rows, chosen.token].add(running)
        drawn = state.drawn + running
        return state._replace(
            token=jnp.where(running, chosen.token, state.token),
            position=state.position + running,
            drawn=drawn,
            done=state.done | stopped | (drawn >= state.limit),
            matched=jnp.where(running, matched, state.matched),
            seen=state.seen._replace(drawn=seen),
            tokens=put(state.tokens, chosen.token),
            log_probs=put(state.log_probs, chosen.log_prob),
            sampled_log_probs=put(state.sampled_log_probs, chosen.sampled),
        )

    def _shrink(self, state: Decoding, slots: Int[Array, "A"]) -> Decoding:
        """These slots alone, of a state without its cache."""
        return jax.tree.map(lambda x: x[slots], state)

    def _swap_out(
        self, state: Decoding, slot: Int[Array, "1"], pages: Int[Array, "M"]
    ) -> Decoding:
        """A row with its pages, as an engine of one slot."""
        row = self._shrink(state._replace(cache=()), slot)
        return row._replace(cache=jax.tree.map(lambda x: x[pages], state.cache))

    def _swap_in(
        self,
        state: Decoding,
        row: Decoding,
        slot: Int[Array, "1"],
        pages: Int[Array, "M"],
    ) -> Decoding:
        """Puts such a row into a slot, -1 for none, and other pages."""
        there = jnp.where(slot < 0, state.token.size, slot)  # out of range: dropped
        put = lambda array, values: array.at[there].set(values, mode="drop")
        fill = lambda array, values: array.at[pages].set(values)
        slots = jax.tree.map(put, state._replace(cache=()), row._replace(cache=()))
        return slots._replace(cache=jax.tree.map(fill, state.cache, row.cache))

    def _take(self, state: Decoding, slots: Int[Array, "A"]):
        """What has been drawn in these slots, and whether a stop string ended it."""
        drawn = (state.tokens, state.log_probs, state.sampled_log_probs)
        found = state.matched == FOUND
        return tuple(values[slots] for values in (*drawn, found))


def _shapes(stops: Stops) -> list[tuple[int, ...]]:
    return [x.shape for x in stops]


def _fold(key: UInt32[Array, "2"], number) -> UInt32[Array, "2"]:
    folded = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.key_data(folded)


def _row_key(seed, step, prompt, sample) -> UInt32[Array, "2"]:
    """The key of a sample: seed, then step, prompt and sample folded in."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    key = jax.random.fold_in(jax.random.fold_in(key, prompt.astype(jnp.uint32)), sample)
    return jax.random.key_data(key)


# The same `Programs` for the same arguments: engines of a process that differ in
# nothing else share the compiled programs.
programs_for = functools.lru_cache(maxsize=8)(Programs)
