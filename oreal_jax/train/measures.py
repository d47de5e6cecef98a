"""What a step's scores say: does the sampler agree with the trainer, does the token
reward model tell correct from incorrect; and what the step has computed."""

import operator
from collections.abc import Sequence

import jax
import numpy as np

from oreal_jax import efficiency
from oreal_jax.config import TrainConfig
from oreal_jax.data.packing import Batch, BatchIndex
from oreal_jax.efficiency import PhaseTotals
from oreal_jax.errors import Diverged
from oreal_jax.rollout import Group, TokenScores, Trajectory
from oreal_jax.train.state import Learners
from oreal_jax.train.step import Scores


def agreement(
    kept: Sequence[Trajectory],
    slots: Sequence[BatchIndex],
    scores: Scores,
    batch: Batch,
) -> dict[str, float]:
    """Difference and correlation of token probabilities between sampler and trainer,
    and the area under the token reward model's ROC curve. Attaches the scores to the
    trajectories."""
    arrays = jax.device_get(
        (
            scores.log_probs,
            batch.reference_log_probs,
            scores.entropy,
            scores.token_scores,
            scores.full_log_probs,
        )
    )
    pairs, means = [], []
    for trajectory, (micro, place) in zip(kept, slots, strict=True):
        size = len(trajectory.completion.tokens)
        take = operator.itemgetter((micro, place, slice(size)))
        said = jax.tree.map(take, TokenScores(*arrays))
        trajectory.scores = said
        pairs.append(np.exp([trajectory.old_log_probs, said.log_probs]))
        means.append(said.token_scores.mean())
    sampler, trainer = np.concatenate(pairs, axis=1)
    difference = np.abs(trainer - sampler)
    varied = sampler.std() and trainer.std()
    correct = np.array([t.correct for t in kept])
    return {
        "training/rollout_probs_diff_mean": float(difference.mean()),
        "training/rollout_probs_diff_max": float(difference.max()),
        "training/rollout_probs_correlation": float(
            np.corrcoef(sampler, trainer)[0, 1] if varied else np.nan
        ),
        "token_reward/auc": roc_area(np.array(means), correct),
    }


def work(
    learners: Learners,
    groups: Sequence[Group],
    kept: Sequence[Trajectory],
    frozen: bool,
) -> dict[str, PhaseTotals]:
    """What the phases of a step have computed: every prompt run once and its samples
    drawn, the reference model on what was kept, and training, of which a frozen policy
    takes the forward pass alone."""
    policy, rewarder = learners
    lengths = lambda some: [
        (len(t.prompt_tokens), len(t.completion.tokens)) for t in some
    ]
    prompts = efficiency.prefill(len(group[0].prompt_tokens) for group in groups)
    drawn = efficiency.decode(lengths(t for group in groups for t in group))
    forward = efficiency.forward_flops
    flops = forward(policy.config, prompts) + forward(policy.config, drawn)
    done = {"gen": PhaseTotals(prompts.tokens + drawn.tokens, flops)}
    if not kept:
        return done
    learned = efficiency.full_pass(lengths(kept))
    done["ref"] = PhaseTotals(learned.tokens, forward(policy.config, learned))
    flops = (1 if frozen else 3) * forward(policy.config, learned)
    if rewarder:
        flops += efficiency.training_flops(rewarder.config, learned)
    return done | {"update_actor": PhaseTotals(learned.tokens, flops)}


def require_agreement(values: dict[str, float], config: TrainConfig, step: int) -> None:
    """Raises `Diverged` where sampler and trainer differ by more than
    `max_disagreement`."""
    difference = values["training/rollout_probs_diff_mean"]
    if not difference <= config.max_disagreement:
        narrow = "".join(
            f"; {name}={getattr(config, name)!r} is lossy; try 'full'"
            for name in ("decode_weights", "decode_cache")
            if getattr(config, name) != "full"
        )
        raise Diverged(
            f"step {step}: the sampler's token probabilities differ from the trainer's "
            f"by {difference:.4g} on average, max_disagreement="
            f"{config.max_disagreement}; the step is not saved{narrow}"
        )


def roc_area(scores: np.ndarray, correct: np.ndarray) -> float:
    """Probability that a correct completion scores above an incorrect one (ties count
    half).

    NaN where one kind is absent.
    """
    correct, incorrect = scores[correct], scores[~correct]
    if not correct.size or not incorrect.size:
        return float("nan")
    gap = correct[:, None] - incorrect[None]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))
