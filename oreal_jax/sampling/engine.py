"""The engine: K completions of each prompt, drawn from the trainer's own weights.

A process makes engines of its devices and waits for no other process. Each has a fixed
number of slots. A prompt is prefilled once and its pages shared by its samples; the
devices decode many tokens per dispatch and hand back when rows have finished, whose
slots are filled again at once. A completion's random numbers depend on (seed, step,
prompt, sample, position) and on nothing else: not on its slot, its neighbours or the
devices.

The scheduler decides who goes where, programs.py is what runs on the devices; here they
meet.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from oreal_jax import sharding
from oreal_jax.data.packing import bucket
from oreal_jax.errors import BadInput
from oreal_jax.model import ModelConfig, Params, decoding
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.choice import Sampling
from oreal_jax.sampling.programs import Programs
from oreal_jax.sampling.scheduler import Admission, Job, Prefill, Scheduler

DISPATCH = 64  # tokens decoded per row between two looks of the host, at most
PAGE = 64  # tokens a page
PREFILL = 2048  # prompt tokens an engine runs at a time, or one prompt


class Request(NamedTuple):
    """One prompt to complete.

    `key` names the prompt in random numbers. `first_sample` numbers its samples from
    there on: two copies of a prompt in a batch draw different completions.
    """

    prompt: Sequence[int]
    key: int
    first_sample: int = 0


class Completion(NamedTuple):
    """Tokens drawn, with the stop token or those that end in a stop string; "length" if
    neither came in time.

    `log_probs` are those of the full distribution at temperature 1, `sampled_log_probs`
    those of the distribution that the tokens were drawn from (None where the engine was
    not asked for them).
    """

    tokens: list[int]
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray | None
    finish_reason: str


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

    @classmethod
    def together(cls, parts: "Sequence[Statistics]") -> "Statistics":
        """Of engines that worked side by side: until the slowest was done."""
        prompt_tokens, new_tokens, prefill, decode, occupancy = zip(*parts, strict=True)
        return cls(
            sum(prompt_tokens),
            sum(new_tokens),
            max(prefill),
            max(decode),
            sum(occupancy) / len(parts),
        )

    def metrics(self) -> dict[str, float]:
        """For the record of a run; rates in tokens a second."""
        rate = lambda tokens, seconds: tokens / seconds if seconds else 0.0
        return {
            "perf/prefill_throughput": rate(self.prompt_tokens, self.prefill_seconds),
            "perf/decode_throughput": rate(self.new_tokens, self.decode_seconds),
            "rollout/occupancy": self.occupancy,
        }


class Size(NamedTuple):
    """Static shapes of a call, on each engine; powers of two, so that programs are few.

    `table_pages` is the longest row's, `pages` the cache's.
    """

    slots: int
    longest_prompt: int
    table_pages: int
    pages: int


class Engine:
    """Draws completions; compiled once per bucket of prompts and of table lengths."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        stop_table: Int[np.ndarray, "V S"] | None = None,
        rows: int = 64,
        cache_tokens: int = 0,
        renormalise: bool = False,
        dtype=jnp.float32,
        weights: Literal["full", "int8"] = "full",
        cache: Literal["full", "float8"] = "full",
        tensor: int = 0,
        devices: Sequence | None = None,
    ):
        """`rows` slots on all devices of the trainer's `mesh`, of which every `tensor`
        are an engine (0: as in the mesh) and `devices` this engine's (None: those of
        this process), decoded in `dtype`; `cache_tokens` of cache
        in each (0: enough for the longest completion in every slot). `stop_table` is
        `stops.token_table` of stop strings. `renormalise` asks for
        `Completion.sampled_log_probs` too: finding all of the nucleus costs some passes
        over the vocabulary that drawing from it does without. `weights` "int8" and
        `cache` "float8" (e4m3) take half the memory of bfloat16, and of what decoding a
        token reads; prompts are then run in these numbers too."""
        if not stop_tokens:
            raise BadInput("no stop token: completions would never end")
        for token, _ in sampling.logit_bias:
            if token >= config.vocab:
                raise BadInput(
                    f"sampling: logit_bias: no token {token}, the model has "
                    f"{config.vocab}"
                )
        meshes = sharding.engine_meshes(mesh, config, tensor, devices)
        self.config, self.mesh, self.sampling = config, meshes.own, sampling
        self.engines = sharding.row_ways(meshes.own)
        self.slots = -(-rows // sharding.row_ways(meshes.all))
        self.cache_tokens, self.renormalise = cache_tokens, renormalise
        self.programs = Programs(
            config,
            meshes,
            sampling,
            stop_tokens,
            stop_table=stop_table,
            page=PAGE,
            renormalise=renormalise,
            store=(decoding.in_int8 if weights == "int8" else decoding.in_dtype)(dtype),
            cache_dtype=jnp.float8_e4m3fn if cache == "float8" else dtype,
        )
        self.statistics = Statistics(0, 0, 0.0, 0.0, 1.0)

    def weights(self, params: Params) -> Weights:
        """The trainer's parameters as decoding reads them, for `sample`. Where they lie
        on the devices of several processes, all of them must ask for it together; each
        then samples by itself."""
        return self.programs.weights(params)

    def sample(
        self,
        weights: Weights,
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
            self.statistics = Statistics(0, 0, 0.0, 0.0, 1.0)
            return drawn
        jobs = self._jobs(requests, samples)
        work = _Work(self, weights, requests, jobs, (seed, step))
        seen = 0
        for finished in work.rounds():
            for request, sample, completion in finished:
                drawn[request][sample] = completion
                on_finished(request, sample, completion)
            on_progress(work.new_tokens - seen, len(finished))
            seen = work.new_tokens
        self.statistics = work.statistics()
        return drawn

    def size(self, completions: int, prompt: int) -> Size:
        """What a call needs that draws so many, after prompts of at most so many
        tokens."""
        slots = min(self.slots, bucket(-(-completions // self.engines)))
        table_pages = bucket(-(-(prompt + self.sampling.max_tokens) // PAGE))
        pages = slots * (table_pages + 1) + table_pages + 1
        if self.cache_tokens:
            pages = min(pages, self.cache_tokens // PAGE + 1)
        return Size(slots, bucket(prompt), table_pages, pages)

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


class _Work:
    """One call of `Engine.sample`: its weights, its scheduler, its device state."""

    def __init__(self, engine: Engine, weights, requests, jobs, seed_and_step):
        self.engine, self.programs, self.requests = engine, engine.programs, requests
        self.seed_and_step = seed_and_step
        self.weights = weights
        total = sum(len(job.samples) for job in jobs)
        size = engine.size(total, max(job.length for job in jobs))
        self.slots, self.longest_prompt, self.table_pages, pages = size
        self.scheduler = Scheduler(
            jobs, shards=engine.engines, slots=self.slots, pages=pages, size=PAGE
        )
        self.state = self.programs.empty(self.slots, pages)
        self.new_tokens = self.prompt_tokens = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.slot_steps = self.busy_steps = 0

    def rounds(self) -> Iterator[list[tuple[int, int, Completion]]]:
        """Fills slots and decodes, again and again; what has finished each time."""
        while self.scheduler.waiting or self.scheduler.running:
            start = time.perf_counter()
            prefills, admissions = self.scheduler.place()
            self._prefill(prefills)
            self._admit(admissions)
            jax.block_until_ready(self.state.done)
            between = time.perf_counter()
            finished = self._decode()
            self.prefill_seconds += between - start
            self.decode_seconds += time.perf_counter() - between
            yield finished

    def _place(self, values: np.ndarray) -> jax.Array:
        """Puts [engines, ...] where the engines are."""
        return jax.device_put(values, sharding.of_rows(self.engine.mesh))

    def _prefill(self, prefills: list[Prefill]) -> None:
        """Runs prompts, those of like length together."""
        waiting: list[list[Prefill]] = [[] for _ in range(self.engine.engines)]
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
            self._prefill_batch(taken, length)

    def _prefill_batch(self, taken: list[list[Prefill]], length: int) -> None:
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
        self.state = self.programs.prefill(
            self.weights, self.state, *map(self._place, (prompts, lengths, table))
        )

    def _admit(self, admissions: list[Admission]) -> None:
        if not admissions:
            return
        count = [0] * self.engine.engines
        most = max(np.bincount([a.shard for a in admissions]))
        starts = np.zeros((len(count), bucket(int(most)), 7), np.int32)
        starts[:, :, 0] = -1
        longest = self.longest_prompt if self.engine.sampling.penalises else 0
        prompts = np.full((*starts.shape[:2], longest), self.engine.config.vocab)
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
            if longest:
                prompts[a.shard, count[a.shard], : len(request.prompt)] = request.prompt
            count[a.shard] += 1
        arrays = self._place(starts), self._place(prompts.astype(np.int32))
        self.state = self.programs.admit(self.state, *arrays, *self.seed_and_step)

    def _decode(self) -> list[tuple[int, int, Completion]]:
        """Decodes for a while; what has finished."""
        self._shrink()
        runs, tables = self.scheduler.grow(DISPATCH)
        table = np.zeros((len(runs), self.table_pages), np.int32)
        for slot, pages in enumerate(tables):
            table[slot, : len(pages)] = pages
        waiting = self.scheduler.waiting
        before = np.asarray(jax.device_get(self.state.drawn)).reshape(-1)
        each = lambda x: self._place(x.reshape(-1, self.slots, *x.shape[1:]))
        self.state, steps = self.programs.decode(
            self.weights,
            self.state,
            each(table),
            each(runs),
            DISPATCH,
            self.scheduler.enough,
        )
        done, drawn, steps = jax.device_get((self.state.done, self.state.drawn, steps))
        done, drawn = done.reshape(-1), drawn.reshape(-1)
        new = int((drawn - before)[runs].sum())
        self.new_tokens += new
        if waiting:
            self.busy_steps += new
            self.slot_steps += int(steps) * len(runs)
        return self._collect(self.scheduler.advance(done, drawn))

    def _shrink(self) -> None:
        """Goes on in a smaller engine where the scheduler says so; pages stay."""
        kept = self.scheduler.shrink()
        if kept is not None:
            self.slots = kept.shape[1]
            rows = self.state._replace(cache=())
            rows = self.programs.shrink(rows, self._place(kept))
            self.state = rows._replace(cache=self.state.cache)

    def _collect(self, finished) -> list[tuple[int, int, Completion]]:
        if not finished:
            return []
        taken: list[list] = [[] for _ in range(self.engine.engines)]
        for place, *rest in finished:
            taken[place // self.slots].append((place % self.slots, *rest))
        slots = np.zeros((len(taken), bucket(max(map(len, taken)))), np.int32)
        for shard, rows in enumerate(taken):
            slots[shard, : len(rows)] = [slot for slot, *_ in rows]
        taken_out = self.programs.take(self.state, self._place(slots))
        *arrays, found = jax.device_get(taken_out)
        stops = np.asarray(self.programs.stop_tokens)
        completions = []
        for shard, rows in enumerate(taken):
            for row, (_, request, sample, size) in enumerate(rows):
                tokens, log_probs, sampled = (x[shard, row, :size] for x in arrays)
                ended = tokens[-1] in stops or found[shard, row]
                completion = Completion(
                    tokens.tolist(),
                    log_probs.copy(),
                    sampled.copy() if self.engine.renormalise else None,
                    "stop" if ended else "length",
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
