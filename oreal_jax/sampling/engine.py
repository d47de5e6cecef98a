"""The engine: K completions of each prompt, drawn from the trainer's own weights.

Prompts are prefilled once and their cache rows repeated for the K samples; a jitted
loop then decodes on the device, many tokens per dispatch, until every row has stopped.
Between dispatches the host reports progress and widens the window that attention
reads. A completion's random numbers depend on (seed, step, prompt, sample, position)
and on nothing else: not on its row, its batch or the devices.
"""

import functools
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

DISPATCH = 64  # tokens decoded per row between two looks of the host


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
    those of the distribution that the tokens were drawn from.
    """

    tokens: list[int]
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray
    finish_reason: str


class Decoding(NamedTuple):
    """The state of one batch on the device; B rows, at most N new tokens."""

    cache: Cache
    token: Int[Array, "B"]  # drawn, not yet fed to the model
    position: Int[Array, "B"]  # where that token stands
    drawn: Int[Array, ""]  # tokens drawn so far in rows that go on
    done: Bool[Array, "B"]
    keys: UInt32[Array, "B 2"]
    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    sampled_log_probs: Float[Array, "B N"]
    lengths: Int[Array, "B"]


class Engine:
    """Draws completions; compiled once per (prompt bucket, window bucket)."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        rows: int = 64,
        dtype=jnp.float32,
    ):
        """`rows` completions are decoded at a time, in `dtype`."""
        if not stop_tokens:
            raise BadInput("no stop token: completions would never end")
        self.config, self.mesh, self.sampling = config, mesh, sampling
        self.stop_tokens = jnp.asarray(sorted(stop_tokens))
        self.rows, self.dtype = rows, dtype
        self._start = jax.jit(self._prefill, static_argnames=("samples", "window"))
        self._continue = jax.jit(
            self._decode, static_argnames="window", donate_argnums=1
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
    ) -> list[list[Completion]]:
        """`samples` completions of each request, in order.

        `on_progress(tokens, finished)` hears of tokens drawn and rows finished since
        its last call.

        Raises:
            BadInput: an empty prompt, or prompt and completion exceed the model.
        """
        for request in requests:
            longest = len(request.prompt) + self.sampling.max_tokens
            if not request.prompt or longest > self.config.max_length:
                raise BadInput(
                    f"prompt of {len(request.prompt)} tokens + "
                    f"max_tokens={self.sampling.max_tokens} must lie within 1.."
                    f"{self.config.max_length}, the model's max_length"
                )
        at_once = max(1, self.rows // max(1, samples))
        completions: list[list[Completion]] = [[] for _ in requests]
        # Prompts of like length share a batch.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for start in range(0, len(order), at_once):
            indices = order[start : start + at_once]
            drawn = self._batch(
                params,
                [requests[i] for i in indices],
                at_once,
                samples,
                (seed, step),
                on_progress,
            )
            for index, group in zip(indices, drawn, strict=True):
                completions[index] = group
        return completions

    def _batch(self, params, requests, at_once, samples, seed_and_step, on_progress):
        if samples == 0:
            return [[] for _ in requests]
        real = len(requests) * samples
        # Fill up to one shape, and to whole rows on every device.
        ways = sharding.row_ways(self.mesh)
        at_once = -(-at_once // ways) * ways
        length = bucket(max(len(r.prompt) for r in requests), 16)
        prompts = np.zeros((at_once, length), np.int32)
        lengths = np.ones(at_once, np.int32)
        names = np.zeros((at_once, 2), np.uint32)
        for row, request in enumerate(requests):
            prompts[row, : len(request.prompt)] = request.prompt
            lengths[row] = len(request.prompt)
            names[row] = request.key, request.first_sample
        limit = self.sampling.max_tokens
        place = lambda x: jax.device_put(x, sharding.of_rows(self.mesh))
        state = self._start(
            params,
            place(prompts),
            place(lengths),
            place(names),
            np.arange(at_once) < len(requests),
            *seed_and_step,
            samples=samples,
            window=bucket(length + limit, 64),
        )
        seen, finished = 0, 0
        while True:
            done, sizes, count = jax.device_get(
                (state.done, state.lengths, state.drawn)
            )
            on_progress(
                int(sizes[:real].sum()) - seen, int(done[:real].sum()) - finished
            )
            seen, finished = int(sizes[:real].sum()), int(done[:real].sum())
            if done.all():
                break
            until = min(limit, int(count) + DISPATCH)
            window = min(bucket(length + until, 64), state.cache.keys.shape[2])
            state = self._continue(params, state, until, window=window)
        tokens, log_probs, sampled = jax.device_get(
            (state.tokens, state.log_probs, state.sampled_log_probs)
        )
        stops = np.asarray(self.stop_tokens)
        rows = [
            Completion(
                tokens[row, :size].tolist(),
                log_probs[row, :size],
                sampled[row, :size],
                "stop" if tokens[row, size - 1] in stops else "length",
            )
            for row, size in enumerate(sizes[:real])
        ]
        return [rows[i : i + samples] for i in range(0, real, samples)]

    def _prefill(
        self, params, prompts, lengths, names, real, seed, step, *, samples, window
    ) -> Decoding:
        """Runs the prompts, and draws the first token of every sample."""
        params = model.cast(params, self.dtype)
        P, S = prompts.shape
        positions = jnp.broadcast_to(jnp.arange(S)[None], (P, S))
        cache = Cache.empty(self.config, P, S, self.dtype)
        states, cache = model.hidden_cached(
            self.config, params, prompts, positions, cache
        )
        last = jnp.take_along_axis(states, (lengths - 1)[:, None, None], axis=1)
        logits = model.logits(self.config, params, last)[:, 0]
        each = lambda x: jnp.repeat(x, samples, axis=0)
        keys = jax.vmap(functools.partial(_row_keys, seed, step, samples))(names)
        B, limit = P * samples, self.sampling.max_tokens
        cache = jax.lax.with_sharding_constraint(
            cache.repeat(samples).widen(window), sharding.of_cache(self.mesh)
        )
        state = Decoding(
            cache=cache,
            token=jnp.zeros(B, jnp.int32),
            position=each(lengths) - 1,
            drawn=jnp.zeros((), jnp.int32),
            done=each(~real),
            keys=keys.reshape(B, 2),
            tokens=jnp.zeros((B, limit), jnp.int32),
            log_probs=jnp.zeros((B, limit)),
            sampled_log_probs=jnp.zeros((B, limit)),
            lengths=jnp.zeros(B, jnp.int32),
        )
        return self._draw(state, each(logits))

    def _decode(self, params, state: Decoding, until, *, window: int) -> Decoding:
        """Decodes until `until` tokens are drawn or every row is done."""
        params = model.cast(params, self.dtype)

        def go_on(state: Decoding):
            return (state.drawn < until) & ~jnp.all(state.done)

        def advance(state: Decoding):
            states, cache = model.hidden_cached(
                self.config,
                params,
                state.token[:, None],
                state.position[:, None],
                state.cache,
                window,
            )
            logits = model.logits(self.config, params, states)[:, 0]
            return self._draw(state._replace(cache=cache), logits)

        return jax.lax.while_loop(go_on, advance, state)

    def _draw(self, state: Decoding, logits: Float[Array, "B V"]) -> Decoding:
        """Draws and records a token in every row that is not done."""
        keys = jax.vmap(_fold, in_axes=(0, None))(state.keys, state.drawn)
        token, log_prob, sampled = choose(logits, keys, self.sampling)
        going = ~state.done
        at = (jnp.arange(going.size), state.drawn)
        stopped = jnp.any(token[:, None] == self.stop_tokens[None], axis=-1)
        drawn = state.drawn + 1
        return state._replace(
            token=token,
            position=state.position + going,
            drawn=drawn,
            done=state.done | stopped | (drawn >= self.sampling.max_tokens),
            tokens=state.tokens.at[at].set(jnp.where(going, token, 0)),
            log_probs=state.log_probs.at[at].set(jnp.where(going, log_prob, 0)),
            sampled_log_probs=state.sampled_log_probs.at[at].set(
                jnp.where(going, sampled, 0)
            ),
            lengths=state.lengths + going,
        )


def _fold(key: UInt32[Array, "2"], number) -> UInt32[Array, "2"]:
    folded = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.key_data(folded)


def _row_keys(seed, step, samples: int, name: UInt32[Array, "2"]):
    """Keys of one prompt's samples: seed, then step, prompt and sample folded in."""
    prompt, first = name
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), prompt)
    numbers = first + jnp.arange(samples, dtype=jnp.uint32)
    return jax.vmap(lambda n: jax.random.key_data(jax.random.fold_in(key, n)))(numbers)
