"""The engine: K completions of each prompt, drawn from the trainer's own weights.

A process makes engines of its devices and waits for no other process. Each has a fixed
number of slots. A prompt is prefilled once and its pages shared by its samples; the
devices decode many tokens per dispatch and hand back when rows have finished, whose
slots are refilled at once. A completion depends on its request and the step (its
random numbers on seed, step, prompt, sample and position) and on nothing else: not on
its slot, its neighbours or the devices.

Requests of one call may differ in all parameters; they share the compiled programs.
work.py runs one call.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from oreal_jax import sharding
from oreal_jax.errors import Diverged, Failure, InputError
from oreal_jax.mesh import make_engine_meshes
from oreal_jax.model import ModelConfig, Params
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.completion import NOTHING_DRAWN, Completion, Request
from oreal_jax.sampling.parameters import Sampling
from oreal_jax.sampling.programs import Size, Stops, programs_for
from oreal_jax.sampling.scheduler import Job
from oreal_jax.sampling.work import PAGE, Work
from oreal_jax.shapes import bucket


class Engine:
    """Draws completions; compiled once per bucket of prompts and of table lengths."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        stop_tokens: Sequence[int],
        *,
        stop_table: Int[np.ndarray, "V S"] | None = None,
        rows: int = 64,
        cache_tokens: int = 0,
        dtype=jnp.float32,
        weights: Literal["full", "int8"] = "full",
        cache: Literal["full", "float8"] = "full",
        tensor: int = 0,
        devices: Sequence | None = None,
        longest: tuple[int, int] | None = None,
    ):
        """`rows` slots on all devices of the trainer's `mesh`, of which every `tensor`
        are an engine (0: as in the mesh); `devices` are this process's (None: as JAX
        says). Each engine has `cache_tokens` of cache (0: enough for the longest
        completion in every slot) and decodes in `dtype`. `stop_table` is
        `stops.token_table` of stop strings. `weights` "int8" and `cache` "float8"
        (e4m3) take half the memory of bfloat16, and of what decoding a token reads;
        prompts are then prefilled in these formats too. `longest` (tokens of a prompt,
        of a completion) is for a run that must resume bit for bit: its programs follow
        from these numbers and the requests, not from the clock or from what is compiled
        already, because another number of slots changes the last bit of a logit.

        Raises:
            InputError: no stop token, a stop token outside the vocabulary, or a number
                of devices that does not divide into engines.
        """
        if not stop_tokens:
            raise InputError("no stop token: completions would never end")
        config.check_tokens(stop_tokens, "stop tokens")
        meshes = make_engine_meshes(mesh, config, tensor, devices)
        self.config, self.mesh = config, meshes.own
        self.engines = sharding.count_row_shards(meshes.own)
        self.slots = -(-rows // sharding.count_row_shards(meshes.all))
        self.cache_tokens, self.longest = cache_tokens, longest
        self.stops = Stops.of(stop_tokens, stop_table, config.vocab)
        self.programs = programs_for(
            config,
            meshes,
            page=PAGE,
            dtype=jnp.dtype(dtype),
            weights=weights,
            cache_dtype=jnp.dtype(jnp.float8_e4m3fn if cache == "float8" else dtype),
        )
        self.formats = f"in {jnp.dtype(dtype)}, weights={weights!r}, cache={cache!r}"
        self.statistics = NOTHING_DRAWN

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
        step: int = 0,
        renormalise: bool = False,
        on_progress: Callable[[int, int], None] = lambda tokens, finished: None,
        on_finished: Callable[[int, int, Completion], None] = lambda *_: None,
    ) -> list[list[Completion]]:
        """`samples` completions of each request, in order.

        `renormalise` also requests `Completion.sampled_log_probs`: finding all of a
        nucleus costs a few passes over the vocabulary that sampling alone avoids.
        `on_progress(tokens, finished)` receives the tokens generated and rows finished
        since its last call; `on_finished(request, sample, completion)` each completion
        once it is finished, in any order.

        Raises:
            InputError: an empty prompt, a prompt or logit bias with a token outside the
                vocabulary, or a prompt and completion longer than the model or the
                cache allows.
            Diverged: a token without a probability, of weights that are not finite.
            Failure: the same though they are finite: decoding overflows.
        """
        completions: list[list[Completion]] = [[None] * samples for _ in requests]  # pyright: ignore
        if samples == 0 or not requests:
            self.statistics = NOTHING_DRAWN
            return completions
        jobs = self._jobs(requests, samples)
        work = Work(
            self.programs,
            weights,
            self.stops,
            requests,
            jobs,
            self._size(requests, samples),
            step,
            renormalise,
            self.longest is not None,
        )
        seen = 0
        for finished in work.rounds():
            for request, sample, completion in finished:
                if not _has_probabilities(completion):
                    raise self._no_probability(weights)
                completions[request][sample] = completion
                on_finished(request, sample, completion)
            on_progress(work.drawn_tokens - seen, len(finished))
            seen = work.drawn_tokens
        self.statistics = work.statistics()
        return completions

    def size(
        self, completions: int, prompt_tokens: int, new_tokens: int, biases: int = 0
    ) -> Size:
        """The shapes of a call for `completions` completions of at most `new_tokens`
        tokens each, with prompts of at most `prompt_tokens`."""
        slots = min(self.slots, bucket(-(-completions // self.engines)))
        table_pages = bucket(-(-(prompt_tokens + new_tokens) // PAGE))
        pages = slots * (table_pages + 1) + table_pages + 1
        if self.cache_tokens:
            pages = min(pages, self.cache_tokens // PAGE + 1)
        return Size(
            slots, pages, table_pages, bucket(new_tokens, PAGE), bucket(biases, 16)
        )

    def _size(self, requests: Sequence[Request], samples: int) -> Size:
        maximum = lambda count: max(map(count, requests))
        longest = maximum(lambda r: len(r.prompt) + r.sampling.max_tokens)
        new_tokens = maximum(lambda r: r.sampling.max_tokens)
        biases = maximum(lambda r: len(r.sampling.logit_bias))
        if self.longest:
            longest = max(longest, sum(self.longest))
            new_tokens = max(new_tokens, self.longest[1])
        size = self.size(
            len(requests) * samples, longest - new_tokens, new_tokens, biases
        )
        if self.longest:
            return size
        # A larger size that is already compiled costs memory, but no compilation.
        limit = self.cache_tokens // PAGE + 1 if self.cache_tokens else math.inf
        reusable = [
            known
            for known in self.programs.sizes(self.stops)
            if known.slots == size.slots
            and known.pages <= limit
            and all(has >= need for has, need in zip(known, size, strict=True))
        ]
        return min(reusable, key=lambda known: known.pages, default=size)

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Checks that prompt and completion fit the model and the cache.

        Raises:
            InputError: the prompt is empty, or the two exceed the model or the cache.
        """
        text = f"prompt of {prompt_tokens} tokens + max_tokens={new_tokens}"
        if not prompt_tokens or prompt_tokens + new_tokens > self.config.max_length:
            raise InputError(
                f"{text} must lie within 1..{self.config.max_length}, the model's "
                "max_length"
            )
        needed = prompt_tokens + new_tokens + 2 * PAGE
        if self.cache_tokens and needed > self.cache_tokens:
            raise InputError(f"{text} does not fit cache_tokens={self.cache_tokens}")

    def check_sampling(self, sampling: Sampling) -> None:
        """Checks the tokens of `logit_bias`.

        Raises:
            InputError: one is outside the vocabulary, or all of it is banned.
        """
        biased = (token for token, _ in sampling.logit_bias)
        self.config.check_tokens(biased, "sampling: logit_bias")
        banned = {token for token, bias in sampling.logit_bias if bias == -math.inf}
        if len(banned) == self.config.vocab:
            raise InputError(
                f"sampling: logit_bias: bans all {len(banned)} tokens of the vocabulary"
            )

    def _no_probability(self, weights: Weights) -> Failure:
        """Why a token has no probability: its weights, or else decoding."""
        names = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, weight in jax.tree.leaves_with_path(weights)
            if not jnp.isfinite(weight).all()
        ]
        if names:
            return Diverged(
                "sampled a token with a non-finite log-probability: "
                f"{len(names)} weight arrays are not finite; the first is {names[0]}"
            )
        return Failure(
            "sampled a token with a non-finite log-probability although all weights "
            f"are finite: decoding {self.formats} overflowed; try float32 with weights "
            "and cache 'full'"
        )

    def _jobs(self, requests: Sequence[Request], samples: int) -> list[Job]:
        for sampling in {request.sampling for request in requests}:
            self.check_sampling(sampling)
        for request in requests:
            self.check_length(len(request.prompt), request.sampling.max_tokens)
            self.config.check_tokens(request.prompt, "prompt")
        # Prompts of like length are prefilled together.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        return [
            Job(
                i,
                len(requests[i].prompt),
                len(requests[i].prompt) + requests[i].sampling.max_tokens,
                tuple(range(samples)),
            )
            for i in order
        ]


def _has_probabilities(completion: Completion) -> bool:
    lists = (completion.log_probs, completion.sampled_log_probs)
    return all(np.isfinite(x).all() for x in lists if x is not None)
