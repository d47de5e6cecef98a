"""Every loss against a slow restatement; every setting; the index of equations."""

import dataclasses
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from batches import BATCHES, as_scored, close, count, evaluate
from reference import Batch, Result

from oreal_jax import losses
from oreal_jax.losses import (
    BestOfNCloning,
    Dapo,
    DrGrpo,
    Grpo,
    Oreal,
    OrealPaper,
    PolicyLoss,
    Reinforce,
    ThresholdWeights,
    TokenReward,
    TopKWeights,
    XtunerOreal,
    ZeroOne,
    baselines,
    group_centred,
    group_normalised,
    oreal,
    outcome,
    presets,
    reshaped,
    rloo,
    sequence_sum,
    terms,
    token_credit,
    token_mean,
)

# Settings that no preset has, each with its restatement.
VARIANTS: dict[str, tuple[PolicyLoss, Callable[[Batch], Result]]] = {
    "oreal_capped_k1_top_k": (
        Oreal(
            advantage=group_centred,
            positive_weight=0.7,
            negative_weight=1.3,
            kl_weight=0.3,
            credit=token_credit,
            weight_correct=TopKWeights(ratio=0.5),
            weight_incorrect=TopKWeights(ratio=0.25),
            kl=terms.kl_k1,
            importance_cap=1.2,
        ),
        partial(
            reference.oreal,
            advantage=reference.group_centred,
            positive_weight=0.7,
            negative_weight=1.3,
            kl_weight=0.3,
            credit=reference.token_credit,
            weight_correct=reference.top_k_weights(0.5),
            weight_incorrect=reference.top_k_weights(0.25),
            kl=reference.kl_k1,
            importance_cap=1.2,
        ),
    ),
    "oreal_other_thresholds_k2": (
        Oreal(
            advantage=reshaped,
            weight_correct=ThresholdWeights(threshold=0.3),
            weight_incorrect=ThresholdWeights(threshold=0.7),
            kl=terms.kl_k2,
        ),
        partial(
            reference.oreal,
            advantage=reference.reshaped,
            weight_correct=reference.threshold_weights(0.3),
            weight_incorrect=reference.threshold_weights(0.7),
            kl=reference.kl_k2,
        ),
    ),
    "paper_without_the_factor": (
        OrealPaper(advantage=outcome, eta=2.0, beta=0.7, kl=terms.kl_k2),
        partial(
            reference.oreal_paper,
            advantage=reference.outcome,
            eta=2.0,
            beta=0.7,
            kl=reference.kl_k2,
        ),
    ),
    "best_of_n_of_zero_one_rewards": (
        BestOfNCloning(advantage=ZeroOne(rloo)),
        partial(
            reference.best_of_n_cloning, advantage=reference.zero_one(reference.rloo)
        ),
    ),
    "reinforce_capped_with_entropy": (
        Reinforce(
            advantage=ZeroOne(group_normalised),
            kl_weight=0.2,
            entropy_weight=0.1,
            importance_cap=0.9,
        ),
        partial(
            reference.plain_reinforce,
            advantage=reference.zero_one(reference.group_normalised),
            kl_weight=0.2,
            entropy_weight=0.1,
            importance_cap=0.9,
        ),
    ),
    "grpo_of_sums": (
        Grpo(clip_low=0.1, clip_high=0.4, kl_weight=0.3, aggregate=sequence_sum),
        partial(
            reference.grpo,
            clip_low=0.1,
            clip_high=0.4,
            kl_weight=0.3,
            share=reference.sequence_sum,
        ),
    ),
    "dr_grpo_short": (
        DrGrpo(longest=9, clip_low=0.3, clip_high=0.1),
        partial(reference.dr_grpo, longest=9, clip_low=0.3, clip_high=0.1),
    ),
    "dapo_narrow": (
        Dapo(clip_low=0.05, clip_high=0.1),
        partial(reference.dapo, clip_low=0.05, clip_high=0.1),
    ),
    "xtuner_tight": (
        XtunerOreal(
            positive_weight=0.6,
            clone_weight=0.3,
            negative_weight=2.0,
            kl_weight=0.5,
            clip_low=0.1,
            clip_high=0.3,
            dual=1.4,
        ),
        partial(
            reference.xtuner_oreal,
            positive_weight=0.6,
            clone_weight=0.3,
            negative_weight=2.0,
            kl_weight=0.5,
            clip_low=0.1,
            clip_high=0.3,
            dual=1.4,
        ),
    ),
}
RESTATED = VARIANTS | {
    name: (loss, reference.NAMED[name])
    for name, loss in presets.NAMED.items()
    if name in reference.NAMED
}


def agree(ours, theirs: Result):
    value, metrics, gradient = ours
    close(value, theirs.value)
    close(gradient, theirs.gradient)
    assert metrics.keys() == theirs.metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(
            metrics[name], theirs.metrics[name], rtol=1e-9, atol=1e-12, err_msg=name
        )


def test_every_named_loss_is_restated():
    assert presets.NAMED.keys() == reference.NAMED.keys()
    assert set(presets.LADDER) <= presets.NAMED.keys()
    for loss in presets.NAMED.values():
        assert isinstance(loss, PolicyLoss)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", RESTATED)
def test_losses_equal_their_restatement(name, batch, double):
    loss, restated = RESTATED[name]
    scored = as_scored(BATCHES[batch], loss.advantage)
    agree(evaluate(loss, scored), restated(BATCHES[batch]))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_token_reward_loss_equals_its_restatement(batch, double):
    ours = evaluate(TokenReward(), as_scored(BATCHES[batch]), "token_scores")
    agree(ours, reference.token_reward(BATCHES[batch]))


@pytest.mark.parametrize("kind", ["all_correct", "all_incorrect", "empty"])
@pytest.mark.parametrize("name", presets.NAMED)
def test_an_absent_kind_of_completion_adds_zero(name, kind):
    loss = presets.NAMED[name]
    value, metrics, _ = evaluate(loss, as_scored(BATCHES[kind], loss.advantage))
    if kind != "all_incorrect":
        assert metrics.get("actor/negative_loss", 0) == 0
    if kind != "all_correct":
        assert metrics.get("actor/positive_loss", 0) == 0
    if kind == "empty":
        assert value == 0
        assert not any(metrics.values())


CLASSES: list[Any] = [
    kind
    for module in (oreal, baselines)
    for kind in vars(module).values()
    if dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
]
SETTINGS = [
    (kind, field.name) for kind in CLASSES for field in dataclasses.fields(kind)
]

CHANGED: dict[tuple[Any, str], Any] = {
    (Oreal, "advantage"): group_normalised,
    (Oreal, "positive_weight"): 2.0,
    (Oreal, "negative_weight"): 0.1,
    (Oreal, "kl_weight"): 1.0,
    (Oreal, "clone_times_advantage"): False,
    (Oreal, "credit"): token_credit,
    (Oreal, "weight_correct"): ThresholdWeights(threshold=0.2),
    (Oreal, "weight_incorrect"): TopKWeights(ratio=0.5),
    (Oreal, "kl"): terms.kl_k2,
    (Oreal, "importance_cap"): 1.5,
    (OrealPaper, "advantage"): outcome,
    (OrealPaper, "eta"): 1.0,
    (OrealPaper, "beta"): 1.0,
    (OrealPaper, "kl"): terms.kl_k2,
    (BestOfNCloning, "advantage"): rloo,
    (Reinforce, "advantage"): reshaped,
    (Reinforce, "kl_weight"): 0.5,
    (Reinforce, "entropy_weight"): 0.1,
    (Reinforce, "importance_cap"): 1.5,
    (Grpo, "advantage"): group_centred,
    (Grpo, "clip_low"): 0.1,
    (Grpo, "clip_high"): 0.3,
    (Grpo, "kl_weight"): 0.0,
    (Grpo, "aggregate"): token_mean,
    (DrGrpo, "longest"): 10,
    (DrGrpo, "advantage"): group_normalised,
    (DrGrpo, "clip_low"): 0.1,
    (DrGrpo, "clip_high"): 0.3,
    (Dapo, "advantage"): rloo,
    (Dapo, "clip_low"): 0.1,
    (Dapo, "clip_high"): 0.2,
    (XtunerOreal, "advantage"): outcome,
    (XtunerOreal, "positive_weight"): 0.5,
    (XtunerOreal, "clone_weight"): 0.5,
    (XtunerOreal, "negative_weight"): 0.5,
    (XtunerOreal, "kl_weight"): 0.1,
    (XtunerOreal, "clip_low"): 0.1,
    (XtunerOreal, "clip_high"): 0.3,
    (XtunerOreal, "dual"): 1.5,
}


def test_changed_settings_exist():
    assert CHANGED.keys() <= set(SETTINGS)
    assert {type(loss) for loss in presets.NAMED.values()} <= set(CLASSES)


@pytest.mark.parametrize(
    ("kind", "name"),
    SETTINGS,
    ids=[f"{kind.__name__}-{name}" for kind, name in SETTINGS],
)
def test_every_setting_of_a_loss_changes_it(kind, name, double):
    before = DrGrpo(longest=9) if kind is DrGrpo else kind()
    after = dataclasses.replace(before, **{name: CHANGED[kind, name]})

    def outputs(loss):
        value, _, gradient = evaluate(loss, as_scored(BATCHES["mixed"], loss.advantage))
        return np.append(np.asarray(gradient), value)

    assert not np.allclose(outputs(before), outputs(after), rtol=1e-6, atol=1e-9)


def test_an_entropy_bonus_raises_the_entropy_of_every_token(double):
    scored = as_scored(BATCHES["mixed"])
    _, _, gradient = evaluate(Reinforce(entropy_weight=0.3), scored, "entropy")
    tokens = float(count(scored).all.tokens)
    close(gradient, np.where(scored.completion, -0.3 / tokens, 0))


@pytest.mark.parametrize("name", presets.NAMED)
def test_bfloat16_inputs_are_computed_in_float32(name):
    loss = presets.NAMED[name]
    cast = lambda scored, dtype: jax.tree.map(
        lambda x: x if x.dtype == bool else x.astype(dtype), scored
    )
    low = cast(as_scored(BATCHES["mixed"], loss.advantage), jnp.bfloat16)
    value, metrics = loss(low.masked(), count(low))
    expected, _ = loss(cast(low, jnp.float32).masked(), count(low))
    assert value.dtype == jnp.float32
    assert all(metric.dtype == jnp.float32 for metric in metrics.values())
    assert value == expected


# The index of equations.

INDEX = [line for line in str(losses.__doc__).splitlines() if line.startswith("| ")]


def test_the_index_of_equations_is_that_of_the_docs():
    docs = Path(__file__).parents[1] / "docs" / "method.md"
    assert "\n".join(INDEX[1:]) in docs.read_text()


@pytest.mark.parametrize("row", INDEX[1:])
def test_a_function_of_the_index_cites_its_equation(row):
    equation, _, function = (cell.strip() for cell in row.strip("|").split("|"))
    assert equation in attrgetter(function.strip("`"))(losses).__doc__
