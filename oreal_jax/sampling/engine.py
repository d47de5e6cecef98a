"""The engine: K completions of each prompt, drawn from the trainer's own weights.

Every data shard of the mesh is an engine of its own with a fixed number of slots. A
prompt is prefilled once and its pages shared by its samples; a jitted loop decodes many
tokens per dispatch on the device and hands back when rows have finished, whose slots
are filled again at once. A completion's random numbers depend on (seed, step, prompt,
sample, position) and on nothing else: not on its slot, its neighbours or the devices.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt32

from oreal_jax import model, sharding
from oreal_jax.data.packing import bucket
from oreal_jax.errors import BadInput
from oreal_jax.model import Cache, ModelConfig, Params
from oreal_jax.sampling.choice import Sampling, choose
from oreal_jax.sampling.scheduler import Admission, Job, Prefill, Scheduler

DISPATCH = 64  # tokens decoded per row between two looks of the host, at most
PAGE = 32  # tokens a page
PREFILL = 2048  # prompt tokens a shard runs at a time, or one prompt


class Request(NamedTuple):
    """One prompt to complete.

    `key` names the prompt in random numbers. `first_sample` numbers its samples from
    there on: two copies of a prompt in a batch draw different completions.
    """

    prompt: Sequence[int]
    key: int
    first_sample: int = 0


class Completion(NamedTuple):
    """Tokens drawn, the stop token included; "length" if none came in time.

    `log_probs` are those of the full distribution at temperature 1, `sampled_log_probs`
    those of the distribution that the tokens were drawn from (None where the engine was
    not asked for them).
    """

    tokens: list[int]
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray | None
    finish_reason: str


class Decoding(NamedTuple):
    """The slots of all engines on the device; B slots, at most N new tokens each."""

    cache: Cache
    token: Int[Array, "B"]  # not yet fed to the model
    position: Int[Array, "B"]  # where that token stands
    drawn: Int[Array, "B"]  # tokens drawn so far
    done: Bool[Array, "B"]  # finished, or idle
    keys: UInt32[Array, "B 2"]
    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    sampled_log_probs: Float[Array, "B N"]


class Statistics(NamedTuple):
    """Of a call of `Engine.sample`: what was decoded, and how well slots were used.

    `occupancy` is the share of slots that drew a token, over all decoding steps while
    samples were still waiting (1 if there were none).
    """

    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    decode_seconds: float
    occupancy: float

    def metrics(self) -> dict[str, float]:
        """For the record of a run; rates in tokens a second."""
        rate = lambda tokens, seconds: tokens / seconds if seconds else 0.0
        return {
            "perf/prefill_throughput": rate(self.prompt_tokens, self.prefill_seconds),
            "perf/decode_throughput": rate(self.new_tokens, self.decode_seconds),
            "rollout/occupancy": self.occupancy,
        }


class Engine:
    """Draws completions; compiled once per (prompt bucket, table bucket)."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        rows: int = 64,
        cache_tokens: int = 0,
        renormalise: bool = False,
        dtype=jnp.float32,
    ):
        """`rows` slots in all, decoded in `dtype`; `cache_tokens` of cache on each data
        shard (0: enough for the longest completion in every slot). `renormalise` asks
        for `Completion.sampled_log_probs` too: finding all of the nucleus costs some
        passes over the vocabulary that drawing from it does without."""
        if not stop_tokens:
            raise BadInput("no stop token: completions would never end")
        self.config, self.mesh, self.sampling = config, mesh, sampling
        self.stop_tokens = jnp.asarray(sorted(stop_tokens))
        self.ways = sharding.row_ways(mesh)
        self.slots = -(-rows // self.ways)
        self.cache_tokens, self.dtype = cache_tokens, dtype
        self.renormalise = renormalise
        self.statistics = Statistics(0, 0, 0.0, 0.0, 1.0)
        weights = sharding.of_params(model.axes(config), mesh, sharding.DECODING)
        self._cast = jax.jit(
            lambda params: model.cast(params, dtype), out_shardings=weights
        )
        self._run_prompts = jax.jit(
            self._each(self._prefill, False, True, True, True, True), donate_argnums=1
        )
        self._start = jax.jit(
            self._each(self._admit, True, True, False, False), donate_argnums=0
        )
        self._decode_some = jax.jit(self._decode, donate_argnums=1)
        self._take = jax.jit(
            lambda state, slots: (
                state.tokens[slots],
                state.log_probs[slots],
                state.sampled_log_probs[slots],
            )
        )

    def sample(
        self,
        params: Params,
        requests: Sequence[Request],
        samples: int,
        *,
        seed: int,
        step: int = 0,
        on_progress: Callable[[int, int], None] = lambda tokens, finished: None,
        on_finished: Callable[[int, int, Completion], None] = lambda *_: None,
    ) -> list[list[Completion]]:
        """`samples` completions of each request, in order.

        `on_progress(tokens, finished)` hears of tokens drawn and rows finished since
        its last call; `on_finished(request, sample, completion)` of each completion as
        it comes, in any order.

        Raises:
            BadInput: an empty prompt, or prompt and completion exceed the model or the
                cache.
        """
        drawn: list[list[Completion]] = [[None] * samples for _ in requests]  # pyright: ignore
        if samples == 0 or not requests:
            return drawn
        jobs = self._jobs(requests, samples)
        run = _Run(self, params, requests, jobs, (seed, step))
        seen = 0
        while run.scheduler.waiting or run.scheduler.running:
            run.fill()
            finished = run.decode()
            for request, sample, completion in finished:
                drawn[request][sample] = completion
                on_finished(request, sample, completion)
            on_progress(run.new_tokens - seen, len(finished))
            seen = run.new_tokens
        self.statistics = run.statistics()
        return drawn

    def _each(self, work: Callable, *rows: bool) -> Callable:
        return sharding.per_engine(work, self.mesh, rows)

    def _jobs(self, requests: Sequence[Request], samples: int) -> list[Job]:
        limit = self.sampling.max_tokens
        for request in requests:
            longest = len(request.prompt) + limit
            if not request.prompt or longest > self.config.max_length:
                raise BadInput(
                    f"prompt of {len(request.prompt)} tokens + max_tokens={limit} must "
                    f"lie within 1..{self.config.max_length}, the model's max_length"
                )
            if self.cache_tokens and longest + 2 * PAGE > self.cache_tokens:
                raise BadInput(
                    f"prompt of {len(request.prompt)} tokens + max_tokens={limit} does "
                    f"not fit cache_tokens={self.cache_tokens}"
                )
        # Prompts of like length are prefilled together.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        return [
            Job(
                i,
                len(requests[i].prompt),
                len(requests[i].prompt) + limit,
                tuple(range(samples)),
            )
            for i in order
        ]

    def _prefill(
        self,
        params: Params,
        state: Decoding,
        prompts: Int[Array, "R S"],
        lengths: Int[Array, "R"],
        table: Int[Array, "R M"],
    ) -> Decoding:
        """Runs prompts and stores their keys and values in the pages of `table`."""
        filled = model.prompt_cache(self.config, params, prompts, lengths)
        return state._replace(cache=state.cache.write_prompts(table, filled))

    def _admit(
        self, state: Decoding, starts: Int[Array, "A 7"], seed, step
    ) -> Decoding:
        """Starts samples in slots. A start is (slot, last prompt token, its position,
        prompt key, sample, page to copy, page to copy to); slot -1 is none."""
        slot, token, position, prompt, sample, source, target = starts.T
        there = jnp.where(slot < 0, state.token.size, slot)  # out of range: dropped
        keys = jax.vmap(functools.partial(_row_key, seed, step))(prompt, sample)
        put = lambda array, values: array.at[there].set(values, mode="drop")
        return state._replace(
            cache=state.cache.copy(self.config.layers, source, target),
            token=put(state.token, token),
            position=put(state.position, position),
            drawn=put(state.drawn, 0),
            done=put(state.done, False),
            keys=put(state.keys, keys),
        )

    def _decode(
        self, params, state: Decoding, table, runs, most, enough
    ) -> tuple[Decoding, Int[Array, ""]]:
        """Decodes until `most` tokens are drawn in each slot or, `enough` above 0, so
        many rows have finished. Slots not in `runs` are idle. Also the steps taken."""
        state = state._replace(done=state.done | ~runs)
        wanted = jnp.sum(state.done) + enough
        wanted = jnp.where(enough > 0, wanted, state.done.size)
        wanted = jnp.minimum(wanted, state.done.size)
        advance = self._each(self._advance, False, True, True, False)

        def go_on(carry):
            state, steps = carry
            return (steps < most) & (jnp.sum(state.done) < wanted)

        def one(carry):
            state, steps = carry
            longest = jnp.max(jnp.where(state.done, 0, state.position)) + 1
            return advance(params, state, table, -(-longest // PAGE)), steps + 1

        return jax.lax.while_loop(go_on, one, (state, jnp.int32(0)))

    def _advance(self, params, state: Decoding, table, count) -> Decoding:
        """One token in every slot; idle slots write to the page that is nobody's."""
        states, cache = model.decode(
            self.config,
            params,
            state.token,
            jnp.where(state.done, 0, state.position),
            state.cache,
            jnp.where(state.done[:, None], 0, table),
            count,
        )
        logits = model.logits(self.config, params, states[:, None])[:, 0]
        return self._draw(state._replace(cache=cache), logits)

    def _draw(self, state: Decoding, logits: Float[Array, "B V"]) -> Decoding:
        """Draws and records a token in every row that is not done."""
        keys = jax.vmap(_fold)(state.keys, state.drawn)
        chosen = choose(logits, keys, self.sampling, renormalise=self.renormalise)
        going = ~state.done
        limit = self.sampling.max_tokens
        at = (jnp.arange(going.size), jnp.where(going, state.drawn, limit))
        put = lambda array, values: array.at[at].set(values, mode="drop")
        stopped = jnp.any(chosen.token[:, None] == self.stop_tokens[None], axis=-1)
        drawn = state.drawn + going
        return state._replace(
            token=jnp.where(going, chosen.token, state.token),
            position=state.position + going,
            drawn=drawn,
            done=state.done | stopped | (drawn >= limit),
            tokens=put(state.tokens, chosen.token),
            log_probs=put(state.log_probs, chosen.log_prob),
            sampled_log_probs=put(state.sampled_log_probs, chosen.sampled),
        )


class _Run:
    """One call of `Engine.sample`: its weights, its scheduler, its device state."""

    def __init__(self, engine: Engine, params, requests, jobs, seed_and_step):
        self.engine, self.requests = engine, requests
        self.seed_and_step = seed_and_step
        self.limit = engine.sampling.max_tokens
        self.weights = engine._cast(params)
        total = sum(len(job.samples) for job in jobs)
        slots = min(engine.slots, bucket(-(-total // engine.ways)))
        # Static shapes come in powers of two: few programs.
        self.table_pages = bucket(-(-max(job.longest for job in jobs) // PAGE))
        pages = slots * (self.table_pages + 1) + self.table_pages + 1
        if engine.cache_tokens:
            pages = min(pages, engine.cache_tokens // PAGE + 1)
        self.slots = slots
        self.scheduler = Scheduler(
            jobs, shards=engine.ways, slots=slots, pages=pages, size=PAGE
        )
        self.place = lambda x: jax.device_put(x, sharding.of_rows(engine.mesh))
        self.state = self._empty(pages)
        self.new_tokens = self.prompt_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.slot_steps = self.busy_steps = 0

    def _empty(self, pages: int) -> Decoding:
        engine, ways = self.engine, self.engine.ways
        rows, pages_over = (
            sharding.of_rows(engine.mesh),
            sharding.of_cache(engine.mesh),
        )
        B, N = ways * self.slots, self.limit

        def make() -> Decoding:
            cache = Cache.empty(engine.config, ways * pages, PAGE, engine.dtype)
            return Decoding(
                cache=cache,
                token=jnp.zeros(B, jnp.int32),
                position=jnp.zeros(B, jnp.int32),
                drawn=jnp.zeros(B, jnp.int32),
                done=jnp.ones(B, bool),
                keys=jnp.zeros((B, 2), jnp.uint32),
                tokens=jnp.zeros((B, N), jnp.int32),
                log_probs=jnp.zeros((B, N)),
                sampled_log_probs=jnp.zeros((B, N)),
            )

        where = jax.tree.map(lambda _: rows, jax.eval_shape(make))
        where = where._replace(cache=jax.tree.map(lambda _: pages_over, where.cache))
        return jax.jit(make, out_shardings=where)()

    def fill(self) -> None:
        """Gives free slots to samples that wait."""
        start = time.perf_counter()
        prefills, admissions = self.scheduler.place()
        if prefills:
            self._run_prompts(prefills)
        if admissions:
            self._start(admissions)
        jax.block_until_ready(self.state.done)
        self.prefill_seconds += time.perf_counter() - start

    def _run_prompts(self, prefills: list[Prefill]) -> None:
        waiting: list[list[Prefill]] = [[] for _ in range(self.engine.ways)]
        for prefill in prefills:
            waiting[prefill.shard].append(prefill)
        while any(waiting):
            heads = [prefill.request for queue in waiting for prefill in queue[:1]]
            stored = max(len(self.requests[i].prompt) - 1 for i in heads)
            length = bucket(stored, PAGE)
            count = max(1, PREFILL // length)
            taken = [[] for _ in waiting]
            for shard, queue in enumerate(waiting):
                while queue and len(taken[shard]) < count:
                    if len(self.requests[queue[0].request].prompt) - 1 > length:
                        break
                    taken[shard].append(queue.pop(0))
            self._run_batch(taken, count, length)

    def _run_batch(self, taken: list[list[Prefill]], count: int, length: int) -> None:
        size = bucket(max(map(len, taken)))
        prompts = np.zeros((len(taken), size, length), np.int32)
        lengths = np.ones((len(taken), size), np.int32)
        table = np.zeros((len(taken), size, length // PAGE), np.int32)
        for shard, queue in enumerate(taken):
            for row, prefill in enumerate(queue):
                tokens = self.requests[prefill.request].prompt[:-1]
                prompts[shard, row, : len(tokens)] = tokens
                lengths[shard, row] = len(tokens)
                table[shard, row, : len(prefill.pages)] = prefill.pages
                self.prompt_tokens += len(tokens)
        flat = lambda x: self.place(x.reshape(-1, *x.shape[2:]))
        self.state = self.engine._run_prompts(
            self.weights, self.state, flat(prompts), flat(lengths), flat(table)
        )

    def _start(self, admissions: list[Admission]) -> None:
        starts = np.zeros((self.engine.ways, self.slots, 7), np.int64)
        starts[:, :, 0] = -1
        count = [0] * self.engine.ways
        for a in admissions:
            request = self.requests[a.request]
            starts[a.shard, count[a.shard]] = (
                a.slot,
                request.prompt[-1],
                len(request.prompt) - 1,
                np.uint32(request.key).view(np.int32),
                request.first_sample + a.sample,
                a.source,
                a.target,
            )
            count[a.shard] += 1
        flat = self.place(starts.reshape(-1, 7).astype(np.int32))
        self.state = self.engine._start(self.state, flat, *self.seed_and_step)

    def decode(self) -> list[tuple[int, int, Completion]]:
        """Decodes for a while; what has finished."""
        start = time.perf_counter()
        runs, tables = self.scheduler.grow(DISPATCH)
        table = np.zeros((len(runs), self.table_pages), np.int32)
        for slot, pages in enumerate(tables):
            table[slot, : len(pages)] = pages
        waiting = self.scheduler.waiting
        enough = max(1, len(runs) // 32) if waiting else 0
        before = np.asarray(jax.device_get(self.state.drawn))
        self.state, steps = self.engine._decode_some(
            self.weights,
            self.state,
            self.place(table),
            self.place(runs),
            DISPATCH,
            enough,
        )
        done, drawn, steps = jax.device_get((self.state.done, self.state.drawn, steps))
        new = int((drawn - before)[runs].sum())
        self.new_tokens += new
        if waiting:
            self.busy_steps += new
            self.slot_steps += int(steps) * len(runs)
        finished = self._collect(self.scheduler.advance(done, drawn))
        self.decode_seconds += time.perf_counter() - start
        return finished

    def _collect(self, finished) -> list[tuple[int, int, Completion]]:
        if not finished:
            return []
        slots = np.zeros(bucket(len(finished)), np.int32)
        slots[: len(finished)] = [place for place, *_ in finished]
        arrays = jax.device_get(self.engine._take(self.state, slots))
        stops = np.asarray(self.engine.stop_tokens)
        completions = []
        for row, (_, request, sample, size) in enumerate(finished):
            tokens, log_probs, sampled = (array[row, :size] for array in arrays)
            reason = "stop" if tokens[-1] in stops else "length"
            completion = Completion(
                tokens.tolist(),
                log_probs.copy(),
                sampled.copy() if self.engine.renormalise else None,
                reason,
            )
            completions.append((request, sample, completion))
        return completions

    def statistics(self) -> Statistics:
        """What this call came to."""
        return Statistics(
            self.prompt_tokens,
            self.new_tokens,
            self.prefill_seconds,
            self.decode_seconds,
            self.busy_steps / self.slot_steps if self.slot_steps else 1.0,
        )


def _fold(key: UInt32[Array, "2"], number) -> UInt32[Array, "2"]:
    folded = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.key_data(folded)


def _row_key(seed, step, prompt, sample) -> UInt32[Array, "2"]:
    """The key of a sample: seed, then step, prompt and sample folded in."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    key = jax.random.fold_in(jax.random.fold_in(key, prompt.astype(jnp.uint32)), sample)
    return jax.random.key_data(key)
