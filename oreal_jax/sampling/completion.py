"""Requests to an engine, their completions, and statistics of a call."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from oreal_jax.sampling.parameters import Sampling


class Request(NamedTuple):
    """A prompt and its sampling parameters.

    Random numbers are functions of `seed`, the step, `key` (which identifies the
    prompt) and the sample's index, counted from `first_sample`: two copies of a prompt
    in a batch get different completions.
    """

    prompt: Sequence[int]
    sampling: Sampling
    key: int
    first_sample: int = 0
    seed: int = 0


class Completion(NamedTuple):
    """Generated tokens, including the stop token or the tokens of a stop string.

    `log_probs` are those of the full distribution at temperature 1, `sampled_log_probs`
    those of the distribution that tokens were sampled from (None unless requested).
    `finish_reason` is "stop", or "length" if the limit came first. The engine has no
    tokenizer and leaves `text` empty.
    """

    tokens: list[int]
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray | None
    finish_reason: str
    text: str = ""


class Statistics(NamedTuple):
    """Tokens, seconds and use of slots of a call of `Engine.sample`.

    `swap_outs` counts sequences that were swapped out for lack of cache pages, once for
    each time. `occupancy` is the share of slots that generated a token, over all
    decoding steps while samples were waiting (1 if there were none).
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    swap_outs: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    occupancy: float = 1.0

    @classmethod
    def combine(cls, parts: "Sequence[Statistics]") -> "Statistics":
        """Combine the statistics of processes that sampled at the same time."""
        prompt, new, swap_outs, prefill, decode, occupancy = zip(*parts, strict=True)
        counts = sum(prompt), sum(new), sum(swap_outs)
        mean = sum(occupancy) / len(parts)
        return cls(*counts, max(prefill), max(decode), mean)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a run; throughputs in tokens per second."""
        rate = lambda tokens, seconds: tokens / seconds if seconds else 0.0
        return {
            "perf/prefill_throughput": rate(self.prompt_tokens, self.prefill_seconds),
            "perf/decode_throughput": rate(self.new_tokens, self.decode_seconds),
            "rollout/occupancy": self.occupancy,
            "rollout/swapped_rows": float(self.swap_outs),
        }
