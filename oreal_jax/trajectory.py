"""From verified completions to the trajectories that a step trains on.

Rewards are +1 for a correct completion and -1 otherwise. Advantages are computed over
all K samples of a prompt, before `select` chooses the ones to train on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from oreal_jax.data.packing import Example
from oreal_jax.data.prompts import Prompt
from oreal_jax.sampling import Completion
from oreal_jax.verify import Verdict, Verifier, by_rule

Rewards = Float[np.ndarray, "N K"]


class TokenScores(NamedTuple):
    """Model outputs for the T tokens of a completion in the step that trained on it."""

    log_probs: Float[np.ndarray, "T"]
    reference_log_probs: Float[np.ndarray, "T"]
    entropy: Float[np.ndarray, "T"]
    token_scores: Float[np.ndarray, "T"]
    full_log_probs: Float[np.ndarray, "T"] | None = None  # see `losses.Scored`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory:
    """A completion of a prompt with its verdict.

    `group` is the index of the prompt in the step; `sample` counts the completions of a
    prompt over the whole run. Advantages are computed within a group. `scores` holds
    the model outputs and is set for selected trajectories only.
    """

    prompt: Prompt
    group: int
    sample: int
    prompt_tokens: Sequence[int]
    completion: Completion
    verdict: Verdict
    advantage: float = 0.0
    selected: bool = False
    scores: TokenScores | None = None

    @property
    def correct(self) -> bool:
        """Whether the verdict is correct; undecided counts as incorrect."""
        return self.verdict.outcome == "correct"

    @property
    def old_log_probs(self) -> Float[np.ndarray, "T"]:
        """The sampler's log-probabilities under the distribution the loss uses."""
        sampled = self.completion.sampled_log_probs
        return self.completion.log_probs if sampled is None else sampled

    def example(self) -> Example:
        """Return this trajectory as a packing example."""
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
        """Return one line of a trajectories file; `pieces` gives the text per token.

        Selected trajectories also have per-token lists, which `oreal losses` reads;
        numeric ones are float64 arrays rounded to six decimals.
        """
        row = {
            "step": step,
            "id": self.prompt.id,
            "group": self.group,
            "sample": self.sample,
            "question": self.prompt.question,
            "gold_answer": self.prompt.gold_answer,
            "completion": self.completion.text,
            "tokens": len(self.completion.tokens),
            "finish_reason": self.completion.finish_reason,
            "verdict": self.verdict.outcome,
            "reason": self.verdict.reason,
            "by": self.verdict.by,
            "advantage": self.advantage,
            "kept": self.selected,
            "mean_log_prob": float(self.completion.log_probs.mean()),
        }
        if self.scores:
            row["mean_token_score"] = float(self.scores.token_scores.mean())
            row["pieces"] = pieces(self.completion.tokens)
            per_token = {"old_log_probs": self.old_log_probs} | self.scores._asdict()
            # More decimals would double the size of the file.
            row |= {
                name: np.round(values.astype(np.float64), 6)
                for name, values in per_token.items()
                if values is not None
            }
        return row


Group = list[Trajectory]
Selector = Callable[[Group, np.random.Generator], Group]


def select_pair(group: Group, random: np.random.Generator) -> Group:
    """Select one correct and one incorrect trajectory at random; none if all agree."""
    correct = [t for t in group if t.correct]
    incorrect = [t for t in group if not t.correct]
    if not correct or not incorrect:
        return []
    return [
        correct[random.integers(len(correct))],
        incorrect[random.integers(len(incorrect))],
    ]


def select_all(group: Group, random: np.random.Generator) -> Group:
    """Select all trajectories, whatever their verdicts."""
    return group


# Former names, still accepted in config files.
one_pair, everything = select_pair, select_all


def with_advantages(
    groups: Sequence[Group],
    advantage: Callable[[Rewards], Rewards],
    undecided: str = "incorrect",
) -> list[Group]:
    """Return the trajectories with their advantages within each group.

    If `undecided` is "incorrect", undecided trajectories count as incorrect; if "drop",
    they are left out of the baseline of the others and get advantage 0.
    """
    if undecided == "drop":
        values = [_advantages_of_decided(group, advantage) for group in groups]
    else:
        values = advantage(np.array([_rewards(group) for group in groups]))
    return [
        [
            dataclasses.replace(trajectory, advantage=float(value))
            for trajectory, value in zip(group, row, strict=True)
        ]
        for group, row in zip(groups, values, strict=True)
    ]


def _rewards(group: Group) -> list[float]:
    return [1.0 if trajectory.correct else -1.0 for trajectory in group]


def _advantages_of_decided(group: Group, advantage) -> Float[np.ndarray, "K"]:
    advantages = np.zeros(len(group))
    is_decided = np.array([t.verdict.outcome != "undecided" for t in group])
    if is_decided.sum() > 1:  # a single sample has no baseline
        rewards = np.array(_rewards(group))[is_decided]
        advantages[is_decided] = advantage(rewards[None])[0]
    return advantages


def select(
    groups: Sequence[Group],
    selector: Selector,
    seed: int,
    step: int,
    undecided: str = "incorrect",
) -> list[Trajectory]:
    """Return the trajectories to train on, marked as selected.

    The choice depends on (seed, step, prompt) only, so a resumed run selects the same.
    With `undecided` "drop" no undecided trajectory is selected.
    """
    selected = []
    for index, group in enumerate(groups):
        if undecided == "drop":
            group = [t for t in group if t.verdict.outcome != "undecided"]
        if group:
            random = np.random.default_rng((seed, step, group[0].prompt.key, index))
            selected += selector(group, random)
    return [dataclasses.replace(each, selected=True) for each in selected]


def merge(groups: Sequence[Group], selected: Sequence[Trajectory]) -> list[Group]:
    """Return the groups with the selected trajectories in place of their originals."""
    by_sample = {(t.group, t.sample): t for t in selected}
    return [[by_sample.get((t.group, t.sample), t) for t in group] for group in groups]


def token_count(groups: Sequence[Group]) -> int:
    """Return the number of prompt and completion tokens of all trajectories."""
    return sum(
        len(t.prompt_tokens) + len(t.completion.tokens) for g in groups for t in g
    )


def trajectory_metrics(
    groups: Sequence[Group],
    selected: Sequence[Trajectory],
    verifiers: Sequence[Verifier] = (),
) -> dict[str, float]:
    """Return reward, length and verdict metrics of a step, named as in verl and TRL.

    Every one of the `verifiers` has a metric, also if it decided nothing.
    """
    trajectories = [t for group in groups for t in group]
    lengths = np.array([len(t.completion.tokens) for t in trajectories])
    reward = np.array([_rewards(group) for group in groups])
    log_probs = np.concatenate([t.completion.log_probs for t in trajectories])
    outcomes = [t.verdict.outcome for t in trajectories]
    by = [t.verdict.by for t in trajectories]
    values = {
        "critic/score/mean": (reward > 0).mean(),
        "reward": reward.mean(),
        "reward_std": reward.std(axis=1).mean(),
        "frac_reward_zero_std": (reward.std(axis=1) == 0).mean(),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/clip_ratio": np.mean(
            [t.completion.finish_reason == "length" for t in trajectories]
        ),
        "rollout/negative_log_prob": -log_probs.mean(),
        "oreal/kept": len(selected),
        "oreal/kept_correct": sum(t.correct for t in selected),
        "verdict/correct": outcomes.count("correct"),
        "verdict/incorrect": outcomes.count("incorrect"),
        "verdict/undecided": outcomes.count("undecided"),
    }
    own = {verifier.__name__ for verifier in verifiers if verifier is not by_rule}
    for name in sorted({*by, *own, "rule", "timeout", "truncated", "crash"}):
        values[f"verdict/by_{name}"] = by.count(name)
    return {name: float(value) for name, value in values.items()}
