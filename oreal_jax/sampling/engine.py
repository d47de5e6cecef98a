"""The engine: K completions of each prompt, drawn from the trainer's own weights.

A process makes engines of its devices and waits for no other process. Each has a fixed
number of slots. A prompt is prefilled once and its pages shared by its samples; the
devices decode many tokens per dispatch and hand back when rows have finished, whose
slots are filled again at once. A completion's random numbers depend on (seed, step,
prompt, sample, position) and on nothing else: not on its slot, its neighbours or the
devices.

work.py is one call of it.
"""

from collections.abc import Callable, Sequence
from typing import Literal

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
from oreal_jax.sampling.completion import NOTHING_DRAWN, Completion, Request
from oreal_jax.sampling.programs import Programs
from oreal_jax.sampling.scheduler import Job
from oreal_jax.sampling.work import PAGE, Size, Work


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
        are an engine (0: as in the mesh); `devices` are this process's (None: as JAX
        says). Each engine has `cache_tokens` of cache (0: enough for the longest
        completion in every slot) and decodes in `dtype`. `stop_table` is
        `stops.token_table` of stop strings. `renormalise` asks for
        `Completion.sampled_log_probs` too: finding all of the nucleus costs some passes
        over the vocabulary that drawing from it does without. `weights` "int8" and
        `cache` "float8" (e4m3) take half the memory of bfloat16, and of what decoding a
        token reads; prompts are then run in these numbers too."""
        if not stop_tokens:
            raise BadInput("no stop token: completions would never end")
        biased = (token for token, _ in sampling.logit_bias)
        config.require_tokens(biased, "sampling: logit_bias")
        config.require_tokens(stop_tokens, "stop tokens")
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
            BadInput: an empty prompt, one with a token that the model does not have, or
                prompt and completion exceed the model or the cache.
        """
        drawn: list[list[Completion]] = [[None] * samples for _ in requests]  # pyright: ignore
        if samples == 0 or not requests:
            self.statistics = NOTHING_DRAWN
            return drawn
        jobs = self._jobs(requests, samples)
        size = self.size(len(requests) * samples, max(job.length for job in jobs))
        work = Work(self.programs, weights, requests, jobs, size, (seed, step))
        seen = 0
        for finished in work.rounds():
            for request, sample, completion in finished:
                drawn[request][sample] = completion
                on_finished(request, sample, completion)
            on_progress(work.drawn_tokens - seen, len(finished))
            seen = work.drawn_tokens
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

    def require_room(self, prompt: int) -> None:
        """Checks that a prompt of so many tokens can be completed.

        Raises:
            BadInput: it is empty, or with `max_tokens` exceeds the model or the cache.
        """
        limit = self.sampling.max_tokens
        said = f"prompt of {prompt} tokens + max_tokens={limit}"
        if not prompt or prompt + limit > self.config.max_length:
            raise BadInput(
                f"{said} must lie within 1..{self.config.max_length}, the model's "
                "max_length"
            )
        if self.cache_tokens and prompt + limit + 2 * PAGE > self.cache_tokens:
            raise BadInput(f"{said} does not fit cache_tokens={self.cache_tokens}")

    def _jobs(self, requests: Sequence[Request], samples: int) -> list[Job]:
        limit = self.sampling.max_tokens
        for request in requests:
            self.require_room(len(request.prompt))
            self.config.require_tokens(request.prompt, "prompt")
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
