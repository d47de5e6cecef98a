"""From samples and verdicts to the completions a step learns from.

Rewards are +1 for correct and -1 for anything else; advantages are taken over all K
samples of a prompt, and only then is anything left out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from oreal_jax.data.packing import Example
from oreal_jax.data.prompts import Prompt
from oreal_jax.sampling import Completion
from oreal_jax.verify import Verdict


class TokenScores(NamedTuple):
    """What the models said of a completion's T tokens when it was learned from."""

    log_probs: Float[np.ndarray, "T"]
    reference_log_probs: Float[np.ndarray, "T"]
    entropy: Float[np.ndarray, "T"]
    token_scores: Float[np.ndarray, "T"]
    full_log_probs: Float[np.ndarray, "T"] | None = None  # see `losses.Scored`


@dataclasses.dataclass(kw_only=True)
class Trajectory:
    """One completion of a prompt, judged.

    `group` numbers the prompts of a step: advantages are taken within a group. `kept`
    marks what is learned from, `scores` then are the models'. `old_log_probs` are the
    sampler's, of the distribution that the loss is about.
    """

    prompt: Prompt
    group: int
    sample: int
    prompt_tokens: Sequence[int]
    completion: Completion
    old_log_probs: Float[np.ndarray, "T"]
    text: str
    verdict: Verdict
    advantage: float
    kept: bool = False
    scores: TokenScores | None = None

    @property
    def correct(self) -> bool:
        """Undecided counts as incorrect here; the metrics tell them apart."""
        return self.verdict.outcome == "correct"

    def example(self) -> Example:
        """What the train step needs of it."""
        return Example(
            self.prompt_tokens,
            self.completion.tokens,
            self.correct,
            self.advantage,
            self.old_log_probs,
        )

    def as_json(
        self, step: int, pieces: Callable[[Sequence[int]], list[str]]
    ) -> dict[str, Any]:
        """One line of a trajectories file; `pieces` gives the text of each token.

        Selected completions have one entry per token in each of several lists, which
        `oreal losses` reads; those of numbers are arrays (float64, six decimals).
        """
        row = {
            "step": step,
            "id": self.prompt.id,
            "group": self.group,
            "sample": self.sample,
            "question": self.prompt.question,
            "gold_answer": self.prompt.gold_answer,
            "completion": self.text,
            "tokens": len(self.completion.tokens),
            "finish_reason": self.completion.finish_reason,
            "verdict": self.verdict.outcome,
            "reason": self.verdict.reason,
            "by": self.verdict.by,
            "advantage": self.advantage,
            "kept": self.kept,
            "mean_log_prob": float(self.completion.log_probs.mean()),
        }
        if self.scores:
            row["mean_token_score"] = float(self.scores.token_scores.mean())
            row["pieces"] = pieces(self.completion.tokens)
            per_token = {"old_log_probs": self.old_log_probs} | self.scores._asdict()
            row |= {
                name: _rounded(values)
                for name, values in per_token.items()
                if values is not None
            }
        return row


def _rounded(values: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """Six decimals: more would double the file and say nothing."""
    return np.round(values.astype(np.float64), 6)


Group = list[Trajectory]
Keep = Callable[[Group, np.random.Generator], Group]


def one_pair(group: Group, random: np.random.Generator) -> Group:
    """One correct and one incorrect completion at random; none if all are alike."""
    correct = [t for t in group if t.correct]
    incorrect = [t for t in group if not t.correct]
    if not correct or not incorrect:
        return []
    return [
        correct[random.integers(len(correct))],
        incorrect[random.integers(len(incorrect))],
    ]


def everything(group: Group, random: np.random.Generator) -> Group:
    """All completions, whatever their verdicts."""
    return group


def advantages(
    groups: Sequence[Sequence[Verdict]], of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Advantages of rewards, undecided counting as incorrect: [N, K]."""
    return of(rewards(groups))


def advantages_of_decided(
    groups: Sequence[Sequence[Verdict]], of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Advantages within the decided completions of a prompt, others 0: [N, K]."""
    found = np.zeros((len(groups), len(groups[0])))
    for row, group in zip(found, groups, strict=True):
        decided = [k for k, v in enumerate(group) if v.outcome != "undecided"]
        if len(decided) > 1:
            row[decided] = of(rewards([[group[k] for k in decided]]))[0]
    return found


def decided(group: Group) -> Group:
    """A group without what no judge could decide."""
    return [t for t in group if t.verdict.outcome != "undecided"]


def rewards(groups: Sequence[Sequence[Verdict]]) -> np.ndarray:
    """+1 for correct, -1 for incorrect and undecided: [N, K]."""
    sign = lambda verdict: 1.0 if verdict.outcome == "correct" else -1.0
    return np.array([[sign(verdict) for verdict in group] for group in groups])


def keep_some(
    groups: Sequence[Group], keep: Keep, seed: int, step: int
) -> list[Trajectory]:
    """The completions to learn from; marks them as kept.

    The draw depends on (seed, step, prompt) only, so a resumed run keeps the same.
    """
    kept = []
    for index, group in enumerate(groups):
        if not group:
            continue
        name = (seed, step, group[0].prompt.key, index)
        kept += keep(group, np.random.default_rng(name))
    for trajectory in kept:
        trajectory.kept = True
    return kept


def token_count(groups: Sequence[Group]) -> int:
    """Prompt and completion tokens of all samples."""
    return sum(
        len(t.prompt_tokens) + len(t.completion.tokens) for g in groups for t in g
    )


def metrics(groups: Sequence[Group], kept: Sequence[Trajectory]) -> dict[str, float]:
    """What a batch of completions looks like, in the field's names."""
    everyone = [t for group in groups for t in group]
    lengths = np.array([len(t.completion.tokens) for t in everyone])
    reward = np.array([[1.0 if t.correct else -1.0 for t in g] for g in groups])
    outcome = lambda name: sum(t.verdict.outcome == name for t in everyone)
    log_probs = np.concatenate([t.completion.log_probs for t in everyone])
    by = {t.verdict.by for t in everyone} | {"rule", "timeout", "truncated", "crash"}
    return {
        "critic/score/mean": float((reward > 0).mean()),
        "reward": float(reward.mean()),
        "reward_std": float(reward.std(axis=1).mean()),
        "frac_reward_zero_std": float((reward.std(axis=1) == 0).mean()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/clip_ratio": float(
            np.mean([t.completion.finish_reason == "length" for t in everyone])
        ),
        "rollout/negative_log_prob": float(-log_probs.mean()),
        "oreal/kept": float(len(kept)),
        "oreal/kept_correct": float(sum(t.correct for t in kept)),
        "verdict/correct": float(outcome("correct")),
        "verdict/incorrect": float(outcome("incorrect")),
        "verdict/undecided": float(outcome("undecided")),
    } | {
        f"verdict/by_{name}": float(sum(t.verdict.by == name for t in everyone))
        for name in sorted(by)
    }
