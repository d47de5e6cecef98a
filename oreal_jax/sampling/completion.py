"""What an engine is asked for, what it gives, and how it went."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from oreal_jax.sampling.parameters import Sampling


class Request(NamedTuple):
    """One prompt and how to complete it.

    `seed` and `key`, which identifies the prompt, determine its random numbers. Its
    samples are numbered from `first_sample`: two copies of a prompt in a batch get
    different completions.
    """

    prompt: Sequence[int]
    sampling: Sampling
    key: int
    first_sample: int = 0
    seed: int = 0


class Completion(NamedTuple):
    """Sampled tokens, with the stop token or those that end in a stop string.

    `log_probs` are those of the full distribution at temperature 1, `sampled_log_probs`
    those of the distribution that the tokens were sampled from (None unless requested).
    `finish_reason` is "stop", or "length" if the limit came first. The engine knows no
    tokenizer and leaves `text` empty.
    """

    tokens: list[int]
    log_probs: np.ndarray
    sampled_log_probs: np.ndarray | None
    finish_reason: str
    text: str = ""


class Statistics(NamedTuple):
    """Of a call of `Engine.sample`: what was decoded, and how well slots were used.

    `swapped_rows` left the cache for a while because it had no room for them; a row
    counts as often as it left. `occupancy` is the share of slots that drew a token,
    over all decoding steps while samples were still waiting (1 if there were none).
    """

    prompt_tokens: int
    new_tokens: int
    swapped_rows: int
    prefill_seconds: float
    decode_seconds: float
    occupancy: float

    @classmethod
    def together(cls, parts: "Sequence[Statistics]") -> "Statistics":
        """Of engines that worked side by side: until the slowest was done."""
        prompt, new, swapped, prefill, decode, occupancy = zip(*parts, strict=True)
        return cls(
            sum(prompt),
            sum(new),
            sum(swapped),
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
            "rollout/swapped_rows": float(self.swapped_rows),
        }


NOTHING_DRAWN = Statistics(0, 0, 0, 0.0, 0.0, 1.0)
