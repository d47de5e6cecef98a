"""How many held-out problems a model solves: pass@1, greedy or averaged over k samples.

A completion without its stop token is wrong, as in training. The interval is a 95%
percentile bootstrap over problems.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.data import Chat, Prompt
from oreal_jax.model import Params
from oreal_jax.rollout import judged
from oreal_jax.sampling import Engine, Request
from oreal_jax.verify import Pool

RESAMPLES = 2000


class Report(NamedTuple):
    """Accuracy in [0, 1] with its interval, and every judged item."""

    accuracy: float
    low: float
    high: float
    problems: int
    samples: int
    undecided: int
    truncated: float
    items: list[dict[str, Any]]

    def as_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return self._asdict()

    def __str__(self) -> str:
        name = "pass@1" if self.samples == 1 else f"avg@{self.samples}"
        return (
            f"{name} {self.accuracy:.1%} (95% interval {self.low:.1%} to "
            f"{self.high:.1%}) on {self.problems} problems; {self.truncated:.1%} "
            f"without stop token, {self.undecided} undecided"
        )


def evaluate(
    engine: Engine,
    params: Params,
    chat: Chat,
    prompts: Sequence[Prompt],
    pool: Pool,
    *,
    samples: int = 1,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda tokens, finished: None,
) -> Report:
    """Completes and judges every prompt `samples` times."""
    requests = [Request(chat.encode(p.question), p.key) for p in prompts]
    completions = engine.sample(
        params, requests, samples, seed=seed, on_progress=on_progress
    )
    flat = [c for group in completions for c in group]
    texts = [chat.decode(c.tokens) for c in flat]
    golds = [prompt.gold_answer for prompt in prompts for _ in range(samples)]
    verdicts = judged(pool, flat, list(zip(texts, golds, strict=True)))
    right = np.array([v.outcome == "right" for v in verdicts], float)
    per_problem = right.reshape(len(prompts), samples).mean(axis=1)
    low, high = interval(per_problem, seed)
    return Report(
        accuracy=float(per_problem.mean()),
        low=low,
        high=high,
        problems=len(prompts),
        samples=samples,
        undecided=sum(v.outcome == "undecided" for v in verdicts),
        truncated=float(np.mean([c.finish_reason == "length" for c in flat])),
        items=[
            {
                "id": prompts[i // samples].id,
                "sample": i % samples,
                "question": prompts[i // samples].question,
                "gold_answer": golds[i],
                "completion": texts[i],
                "tokens": len(flat[i].tokens),
                "verdict": verdict.outcome,
                "reason": verdict.reason,
                "by": verdict.by,
            }
            for i, verdict in enumerate(verdicts)
        ],
    )


def interval(per_problem: np.ndarray, seed: int) -> tuple[float, float]:
    """95% percentile bootstrap of the mean over problems."""
    random = np.random.default_rng(seed)
    draws = random.integers(len(per_problem), size=(RESAMPLES, len(per_problem)))
    low, high = np.quantile(per_problem[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
