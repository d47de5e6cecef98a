"""The engine: K completions of each prompt, from the trainer's own weights.

The devices of a process make one or more engines (copies of the model) with a fixed
number of slots each; processes do not wait for each other. A prompt is prefilled once
and its pages are shared by its samples. The devices decode many tokens per dispatch and
return when sequences have finished, whose slots are refilled at once. A completion
depends on its request and the step (its random numbers on seed, step, prompt, sample
and position) and on nothing else: not on its slot, its neighbours or the devices.

Requests of one call may differ in all parameters; they share the compiled programs.
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
from oreal_jax.sampling.completion import Completion, Request, Statistics
from oreal_jax.sampling.parameters import Sampling
from oreal_jax.sampling.programs import Size, programs_for
from oreal_jax.sampling.runner import PAGE, Runner
from oreal_jax.sampling.stops import Stops
from oreal_jax.shapes import bucket


class Engine:
    """Generates completions; compiled once per bucket of prompts and block tables."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        stop_tokens: Sequence[int],
        *,
        stop_table: Int[np.ndarray, "V S"] | None = None,
        real_tokens: int = 0,
        rows: int = 64,
        cache_tokens: int = 0,
        dtype=jnp.float32,
        weights: Literal["full", "int8"] = "full",
        cache: Literal["full", "float8"] = "full",
        tensor: int = 0,
        devices: Sequence | None = None,
        longest: tuple[int, int] | None = None,
    ):
        """Make the engines of a process; nothing is compiled or allocated yet.

        stop_table: result of `make_stop_table` for stop strings.
        real_tokens: number of tokens of the tokenizer, the first rows of the
            vocabulary; other rows are never sampled (0: all are tokens).
        rows: decoding slots, over all devices of the trainer's `mesh`.
        cache_tokens: of each engine's cache (0: the longest completion in every slot).
        weights, cache: "int8" and "float8" (e4m3) take half the memory of bfloat16, and
            halve the bytes read per token; prefill uses them too.
        tensor: devices per engine (0: as in the mesh).
        devices: of this process (None: those of `mesh`).
        longest: maximum tokens of a prompt and of a completion, for runs that resume
            bit for bit: programs then follow from these and the requests, not from the
            clock or what is compiled, as the number of slots affects rounding.

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
        self.real_tokens = min(real_tokens or config.vocab, config.vocab)
        self.stops = Stops.padded(stop_tokens, stop_table, config.vocab)
        self.programs = programs_for(
            config,
            meshes,
            page_size=PAGE,
            dtype=jnp.dtype(dtype),
            weights=weights,
            cache_dtype=jnp.dtype(jnp.float8_e4m3fn if cache == "float8" else dtype),
            real_tokens=self.real_tokens,
        )
        self.formats = f"in {jnp.dtype(dtype)}, weights={weights!r}, cache={cache!r}"
        self.statistics = Statistics()

    def weights(self, params: Params) -> Weights:
        """Return the trainer's parameters as decoding reads them, for `sample`.

        If they are on the devices of several processes, all of them must call this
        together; each then samples by itself.
        """
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
        """Return `samples` completions of each request, in order.

        `renormalise` also requests `Completion.sampled_log_probs`: the mass of a
        nucleus takes a few passes over the vocabulary that sampling alone avoids.
        `on_progress(tokens, finished)` receives the tokens generated and completions
        finished since its last call; `on_finished(request, sample, completion)` each
        completion once it is finished, in any order.

        Raises:
            InputError: an empty prompt, a prompt or logit bias with a token outside the
                vocabulary, or a prompt and completion longer than the model or the
                cache allows.
            Diverged: a token without a probability, from weights that are not finite.
            Failure: the same though they are finite: decoding overflows.
        """
        completions: list[list[Completion]] = [[None] * samples for _ in requests]  # pyright: ignore
        self.statistics = Statistics()
        if samples == 0 or not requests:
            return completions
        for sampling in {request.sampling for request in requests}:
            self.check_sampling(sampling)
        for request in requests:
            self.check_prompt(request)
        runner = Runner(
            self.programs,
            weights,
            self.stops,
            dict(enumerate(requests)),
            samples,
            self._size(requests, samples),
            step,
            renormalise,
            resumable=self.longest is not None,
        )
        reported = 0
        for finished in runner.rounds():
            for request, sample, completion in finished:
                if not _has_probabilities(completion):
                    raise self._no_probability(weights)
                completions[request][sample] = completion
                on_finished(request, sample, completion)
            on_progress(runner.new_tokens - reported, len(finished))
            reported = runner.new_tokens
        self.statistics = runner.statistics()
        return completions

    def size(
        self, completions: int, prompt_tokens: int, new_tokens: int, biases: int = 0
    ) -> Size:
        """Return the shapes of a call for this number of completions.

        `prompt_tokens`, `new_tokens` and `biases` are the maxima per completion.
        """
        slots = min(self.slots, bucket(-(-completions // self.engines)))
        table_pages = bucket(-(-(prompt_tokens + new_tokens) // PAGE))
        pages = slots * (table_pages + 1) + table_pages + 1
        if self.cache_tokens:
            pages = min(pages, self.cache_tokens // PAGE + 1)
        new_tokens, biases = bucket(new_tokens, PAGE), bucket(biases, 16)
        return Size(slots, pages, table_pages, new_tokens, biases)

    def _size(self, requests: Sequence[Request], samples: int) -> Size:
        maximum = lambda count: max(map(count, requests))
        length = maximum(lambda r: len(r.prompt) + r.sampling.max_tokens)
        new_tokens = maximum(lambda r: r.sampling.max_tokens)
        biases = maximum(lambda r: len(r.sampling.logit_bias))
        if self.longest:
            length = max(length, sum(self.longest))
            new_tokens = max(new_tokens, self.longest[1])
        completions = len(requests) * samples
        size = self.size(completions, length - new_tokens, new_tokens, biases)
        if self.longest:
            return size
        # A larger size that is already compiled costs memory, but no compilation.
        max_pages = self.cache_tokens // PAGE + 1 if self.cache_tokens else math.inf
        reusable = [
            known
            for known in self.programs.compiled_sizes(self.stops)
            if known.slots == size.slots
            and known.pages <= max_pages
            and all(has >= need for has, need in zip(known, size, strict=True))
        ]
        return min(reusable, key=lambda known: known.pages, default=size)

    def check_prompt(self, request: Request) -> None:
        """Check the length and the tokens of a prompt.

        Raises:
            InputError: see `check_length`; or a token is outside the vocabulary.
        """
        self.check_length(len(request.prompt), request.sampling.max_tokens)
        self.config.check_tokens(request.prompt, "prompt")

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Check that prompt and completion fit the model and the cache.

        Raises:
            InputError: the prompt is empty, or the two exceed the model or the cache.
        """
        text = f"prompt of {prompt_tokens} tokens + max_tokens={new_tokens}"
        if not prompt_tokens or prompt_tokens + new_tokens > self.config.max_length:
            fits_alone = 0 < prompt_tokens < self.config.max_length
            raise InputError(
                f"{text} must lie within 1..{self.config.max_length}, the model's "
                f"max_length{'; set a lower max_tokens' if fits_alone else ''}"
            )
        needed = prompt_tokens + new_tokens + 2 * PAGE
        if self.cache_tokens and needed > self.cache_tokens:
            raise InputError(f"{text} does not fit cache_tokens={self.cache_tokens}")

    def check_sampling(self, sampling: Sampling) -> None:
        """Check the tokens of `logit_bias`.

        Raises:
            InputError: one is outside the vocabulary, or all of it is banned.
        """
        biased = (token for token, _ in sampling.logit_bias)
        self.config.check_tokens(biased, "sampling: logit_bias")
        bans = {token for token, bias in sampling.logit_bias if bias == -math.inf}
        if all(token in bans for token in range(self.real_tokens)):
            raise InputError(
                f"sampling: logit_bias: bans all {self.real_tokens} tokens of the "
                "vocabulary"
            )

    def _no_probability(self, weights: Weights) -> Failure:
        """Return the error for a token without a probability, with its cause."""
        message = "sampled a token with a non-finite log-probability"
        names = [
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, weight in jax.tree.leaves_with_path(weights)
            if not jnp.isfinite(weight).all()
        ]
        if names:
            return Diverged(
                f"{message}: {len(names)} weight arrays are not finite; the first is "
                f"{names[0]}"
            )
        return Failure(
            f"{message} although all weights are finite: decoding {self.formats} "
            "overflowed; try float32 with weights and cache 'full'"
        )


def _has_probabilities(completion: Completion) -> bool:
    lists = (completion.log_probs, completion.sampled_log_probs)
    return all(np.isfinite(x).all() for x in lists if x is not None)
