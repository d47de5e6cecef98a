"""Metrics of a step: agreement of sampler and trainer, AUC, tokens and FLOPs."""

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from oreal_jax import efficiency
from oreal_jax.config import TrainConfig
from oreal_jax.data.packing import Batch, BatchIndex
from oreal_jax.efficiency import PhaseTotals
from oreal_jax.errors import Diverged
from oreal_jax.train.step import Scores
from oreal_jax.train_state import TrainedModels
from oreal_jax.trajectory import Group, TokenScores, Trajectory


def check_finite(
    metrics: Mapping[str, Float[Array, ""]], step: int
) -> dict[str, float]:
    """Return the metrics of the update of step `step` as numbers.

    Raises:
        Diverged: a loss or a gradient norm is not finite.
    """
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        if name.endswith(("loss", "grad_norm")) and not math.isfinite(value):
            raise Diverged(f"step {step}: {name}={value}; it is not saved")
    return values


def with_scores(
    selected: Sequence[Trajectory],
    indices: Sequence[BatchIndex],
    batch: Batch,
    scores: Scores,
) -> list[Trajectory]:
    """Return the trajectories with their token scores.

    `indices` locate them in `batch`.
    """
    arrays = jax.device_get(
        (
            scores.log_probs,
            batch.reference_log_probs,
            scores.entropy,
            scores.token_scores,
            scores.full_log_probs,
        )
    )
    scored = []
    for trajectory, (micro_batch, row) in zip(selected, indices, strict=True):
        length = len(trajectory.completion.tokens)
        take = operator.itemgetter((micro_batch, row, slice(length)))
        token_scores = TokenScores(*jax.tree.map(take, arrays))
        scored.append(dataclasses.replace(trajectory, scores=token_scores))
    return scored


def check_agreement(
    selected: Sequence[Trajectory], config: TrainConfig, step: int
) -> dict[str, float]:
    """Return how well sampler and trainer agree, and the token reward model's AUC.

    The first as difference and correlation of token probabilities.

    Raises:
        Diverged: the mean difference exceeds `max_disagreement`.
    """
    scores = [t.scores for t in selected if t.scores]
    sampler = np.exp(np.concatenate([t.old_log_probs for t in selected]))
    trainer = np.exp(np.concatenate([each.log_probs for each in scores]))
    difference = np.abs(trainer - sampler)
    has_spread = sampler.std() and trainer.std()
    mean_scores = np.array([each.token_scores.mean() for each in scores])
    correct = np.array([t.correct for t in selected])
    if not (mean := float(difference.mean())) <= config.max_disagreement:
        advice = "".join(
            f"; {name}={getattr(config, name)!r} is lossy; try 'full'"
            for name in ("decode_weights", "decode_cache")
            if getattr(config, name) != "full"
        )
        raise Diverged(
            f"step {step}: the sampler's token probabilities differ from the trainer's "
            f"by {mean:.4g} on average, max_disagreement={config.max_disagreement}; "
            f"the step is not saved{advice}"
        )
    return {
        "training/rollout_probs_diff_mean": mean,
        "training/rollout_probs_diff_max": float(difference.max()),
        "training/rollout_probs_correlation": float(
            np.corrcoef(sampler, trainer)[0, 1] if has_spread else np.nan
        ),
        "token_reward/auc": roc_area(mean_scores, correct),
    }


def roc_area(scores: np.ndarray, correct: np.ndarray) -> float:
    """Return the probability that a correct completion scores above an incorrect one.

    Ties count half. NaN where one kind is absent.
    """
    high, low = scores[correct], scores[~correct]
    if not high.size or not low.size:
        return float("nan")
    gap = high[:, None] - low[None]
    return float(np.mean((gap > 0) + 0.5 * (gap == 0)))


def phase_totals(
    models: TrainedModels,
    groups: Sequence[Group],
    selected: Sequence[Trajectory],
    frozen: bool,
) -> dict[str, PhaseTotals]:
    """Return tokens and FLOPs of a step's phases.

    Every prompt is run once and its completions are generated; the reference model
    scores the selected trajectories; a frozen policy takes the forward pass alone.
    """
    policy, token_reward = models
    lengths = lambda trajectories: [
        (len(t.prompt_tokens), len(t.completion.tokens)) for t in trajectories
    ]
    prompts = efficiency.prefill(len(group[0].prompt_tokens) for group in groups)
    decoded = efficiency.decode(lengths(t for group in groups for t in group))
    forward = efficiency.forward_flops
    flops = forward(policy.config, prompts) + forward(policy.config, decoded)
    totals = {"gen": PhaseTotals(prompts.tokens + decoded.tokens, flops)}
    if not selected:
        return totals
    trained = efficiency.full_pass(lengths(selected))
    totals["ref"] = PhaseTotals(trained.tokens, forward(policy.config, trained))
    flops = (1 if frozen else 3) * forward(policy.config, trained)
    if token_reward:
        flops += efficiency.training_flops(token_reward.config, trained)
    return totals | {"update_actor": PhaseTotals(trained.tokens, flops)}


def screen_line(step: int, steps: int, metrics: Mapping[str, float]) -> str:
    """Return the log line of a step of OREAL or SFT; `steps` is the total.

    Steps are numbered from 0, as in metrics.jsonl; the number of finished steps
    follows. Labels are parts of the names of metrics.
    """
    width = len(str(steps))
    line = f"step {step:>{width}} {f'({step + 1}/{steps})':<{2 * width + 3}}"
    if "critic/score/mean" in metrics:
        line += (
            f"  correct {metrics['critic/score/mean']:6.1%}"
            f"  tokens {metrics['response_length/mean']:.0f}"
            f"  kept {metrics['oreal/kept']:.0f}"
        )
        if not metrics["oreal/kept"]:
            return line + "  no update: every prompt was all correct or all incorrect"
    name = "pg_loss" if "actor/pg_loss" in metrics else "loss"  # of a custom loss
    line += f"  {name} {metrics[f'actor/{name}']:+.4f}"
    if "actor/kl_loss" in metrics:
        line += f"  kl_loss {metrics['actor/kl_loss']:.4f}"
    if "token_reward/loss" in metrics:
        line += f"  token reward loss {metrics['token_reward/loss']:.3f}"
    return line
