"""What runs on the devices: prompts into pages, samples into slots, tokens into rows.

Every data shard of the mesh is an engine of its own; arrays have a leading axis of
engines, which the programs of one engine do not see.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from oreal_jax import sharding
from oreal_jax.model import ModelConfig, Params, decoding
from oreal_jax.model.decoding import Cache, Store, Weights
from oreal_jax.model.kernels import pages_for
from oreal_jax.sampling.choice import Sampling, Seen, choose
from oreal_jax.sampling.stops import FOUND, START
from oreal_jax.sharding import EngineMeshes


class Decoding(NamedTuple):
    """The slots of an engine: B rows, at most N new tokens each."""

    cache: Cache
    token: Int[Array, "B"]  # not yet fed to the model
    position: Int[Array, "B"]  # where that token stands
    drawn: Int[Array, "B"]  # tokens drawn so far
    done: Bool[Array, "B"]  # finished, or idle
    matched: Int[Array, "B"]  # how much of a stop string there is: a state of `stops`
    seen: Seen | None  # where penalties ask for it
    keys: UInt32[Array, "B 2"]
    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    sampled_log_probs: Float[Array, "B N"]


class Programs:
    """The jitted programs of a sampler; each compiled once per shape."""

    def __init__(
        self,
        config: ModelConfig,
        meshes: EngineMeshes,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        stop_table: Int[np.ndarray, "V S"] | None,
        page: int,
        renormalise: bool,
        store: Store,
        cache_dtype,
    ):
        """`page` tokens a page; the others as in `Engine`. Only the weights' way from
        the trainer concerns the engines of other processes."""
        mesh = meshes.own
        self.mesh, self.sampling, self.page = mesh, sampling, page
        self.config = decoding.split_heads(config, mesh.shape["tensor"])
        self.stop_tokens = jnp.asarray(sorted(stop_tokens))
        self.stop_table = None if stop_table is None else jnp.asarray(stop_table)
        self.renormalise, self.cache_dtype = renormalise, cache_dtype
        heads = self.config.kv_heads // mesh.shape["tensor"]
        self.form = pages_for(
            sharding.platform(mesh), heads, config.head_dim, cache_dtype
        )
        self.attend = sharding.per_head(self.form.attend, mesh)
        self.choose = sharding.per_slot(
            lambda logits, keys, seen: choose(
                logits, keys, sampling, seen, renormalise=renormalise
            ),
            mesh,
        )
        axes = decoding.axes(self.config, store)
        each = lambda work, *engines: sharding.per_engine(work, mesh, engines)
        self.execution = sharding.of_prompts(mesh)
        self.reshard = jax.jit(
            lambda params: decoding.weights(self.config, params, store),
            out_shardings=sharding.of_weights(axes, meshes.all),
        )
        self.own = sharding.of_weights(axes, mesh)
        self.prefill = jax.jit(
            each(self._prefill, False, True, True, True, True), donate_argnums=1
        )
        self.admit = jax.jit(
            each(self._admit, True, True, True, False, False), donate_argnums=0
        )
        self.decode = jax.jit(self._decode, donate_argnums=1)
        self.shrink = jax.jit(each(self._shrink, True, True))
        self.take = jax.jit(each(self._take, True, True))
        self.swap_out = jax.jit(each(self._swap_out, True, True, True))
        self.swap_in = jax.jit(
            each(self._swap_in, True, True, True, True), donate_argnums=0
        )

    def weights(self, params: Params) -> Weights:
        """The trainer's parameters as decoding reads them, on engines of our own."""
        return jax.tree.map(sharding.own_part, self.reshard(params), self.own)

    def empty(self, slots: int, pages: int) -> Decoding:
        """Idle slots and an empty cache on every engine."""
        lies = jax.tree.map(lambda x: x.sharding, self.abstract(slots, pages))
        return jax.jit(lambda: self._idle(slots, pages), out_shardings=lies)()

    def abstract(self, slots: int, pages: int) -> Decoding:
        """Shapes, types and shardings of `empty`."""
        shapes = jax.eval_shape(lambda: self._idle(slots, pages))
        rows = sharding.of_rows(self.mesh)
        lies = jax.tree.map(lambda _: rows, shapes)
        page = sharding.of_pages(self.form, self.mesh)
        lies = lies._replace(cache=(page,) * self.config.layers)
        return sharding.placed(shapes, lies)

    def _idle(self, slots: int, pages: int) -> Decoding:
        config, engines = self.config, sharding.row_ways(self.mesh)
        B, N, V = slots, self.sampling.max_tokens, config.vocab
        page = self.form.empty(
            pages, self.page, config.kv_heads, config.head_dim, self.cache_dtype
        )
        one = Decoding(
            cache=(page,) * config.layers,
            token=jnp.zeros(B, jnp.int32),
            position=jnp.zeros(B, jnp.int32),
            drawn=jnp.zeros(B, jnp.int32),
            done=jnp.ones(B, bool),
            matched=jnp.full(B, START),
            seen=Seen(jnp.zeros((B, V), bool), jnp.zeros((B, V), jnp.int32))
            if self.sampling.penalises
            else None,
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

    def _admit(
        self,
        state: Decoding,
        starts: Int[Array, "A 7"],
        prompts: Int[Array, "A S"],
        seed,
        step,
    ) -> Decoding:
        """Starts samples in slots. A start is (slot, last prompt token, its position,
        prompt key, sample, page to copy, page to copy to); slot -1 is none. `prompts`
        are the tokens that penalties look at; V is none."""
        slot, token, position, prompt, sample, source, target = starts.T
        there = jnp.where(slot < 0, state.token.size, slot)  # out of range: dropped
        keys = jax.vmap(functools.partial(_row_key, seed, step))(prompt, sample)
        put = lambda array, values: array.at[there].set(values, mode="drop")
        return state._replace(
            cache=tuple(pages.copy(source, target) for pages in state.cache),
            token=put(state.token, token),
            position=put(state.position, position),
            drawn=put(state.drawn, 0),
            done=put(state.done, False),
            keys=put(state.keys, keys),
            matched=put(state.matched, START),
            seen=state.seen
            and Seen(
                put(state.seen.prompt, False)
                .at[there[:, None], prompts]
                .set(True, mode="drop"),
                put(state.seen.drawn, 0),
            ),
        )

    def _decode(
        self,
        weights: Weights,
        state: Decoding,
        table: Int[Array, "E B M"],
        runs: Bool[Array, "E B"],
        most,
        enough,
    ) -> tuple[Decoding, Int[Array, ""]]:
        """Decodes until `most` tokens are drawn in each slot or, `enough` above 0, so
        many rows have finished. Slots not in `runs` are idle. Also the steps taken."""
        state = state._replace(done=state.done | ~runs)
        wanted = jnp.sum(state.done) + enough
        wanted = jnp.where(enough > 0, wanted, state.done.size)
        wanted = jnp.minimum(wanted, state.done.size)
        advance = sharding.per_engine(self._advance, self.mesh, (False, True, True))

        def go_on(carry):
            state, steps = carry
            return (steps < most) & (jnp.sum(state.done) < wanted)

        def one(carry):
            state, steps = carry
            return advance(weights, state, table), steps + 1

        return jax.lax.while_loop(go_on, one, (state, jnp.int32(0)))

    def _advance(
        self, weights: Weights, state: Decoding, table: Int[Array, "B M"]
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
        return self._draw(state._replace(cache=cache), logits)

    def _draw(self, state: Decoding, logits: Float[Array, "B V"]) -> Decoding:
        """Draws and records a token in every row that is not done."""
        keys = jax.vmap(_fold)(state.keys, state.drawn)
        chosen = self.choose(logits, keys, state.seen)
        going = ~state.done
        limit = self.sampling.max_tokens
        at = (jnp.arange(going.size), jnp.where(going, state.drawn, limit))
        put = lambda array, values: array.at[at].set(values, mode="drop")
        stopped = jnp.any(chosen.token[:, None] == self.stop_tokens[None], axis=-1)
        matched, seen = state.matched, state.seen
        if self.stop_table is not None:
            matched = self.stop_table[chosen.token, matched]
            stopped |= matched == FOUND
        if seen:
            rows = jnp.arange(going.size)
            seen = seen._replace(drawn=seen.drawn.at[rows, chosen.token].add(going))
        drawn = state.drawn + going
        return state._replace(
            token=jnp.where(going, chosen.token, state.token),
            position=state.position + going,
            drawn=drawn,
            done=state.done | stopped | (drawn >= limit),
            matched=jnp.where(going, matched, state.matched),
            seen=seen,
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


def _fold(key: UInt32[Array, "2"], number) -> UInt32[Array, "2"]:
    folded = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.key_data(folded)


def _row_key(seed, step, prompt, sample) -> UInt32[Array, "2"]:
    """The key of a sample: seed, then step, prompt and sample folded in."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    key = jax.random.fold_in(jax.random.fold_in(key, prompt.astype(jnp.uint32)), sample)
    return jax.random.key_data(key)
