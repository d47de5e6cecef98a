"""The losses against the released trainer's own numbers."""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from batches import close, count
from reference import Batch

from oreal_jax.losses import (
    Oreal,
    Scored,
    ThresholdWeights,
    TokenReward,
    TopKWeights,
    group_normalised,
    rloo,
    terms,
    token_mean,
    unweighted,
)

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "reference_losses.npz"


class Case(NamedTuple):
    """One case of the oracle: settings, arrays, and the mask of completion tokens."""

    settings: dict[str, Any]
    arrays: dict[str, np.ndarray]
    inside: np.ndarray

    @property
    def loss(self) -> Oreal:
        """The loss with the settings of the case."""
        if self.settings.get("threshold_rescale"):
            correct = ThresholdWeights(threshold=self.settings["correct_threshold"])
            incorrect = ThresholdWeights(threshold=self.settings["incorrect_threshold"])
        elif self.settings.get("topk_rescale"):
            correct = TopKWeights(ratio=self.settings["correct_topk_ratio"])
            incorrect = TopKWeights(ratio=self.settings["incorrect_topk_ratio"])
        else:
            correct = incorrect = unweighted
        shaping = self.settings["reward_shaping_type"]
        return Oreal(
            advantage={"rloo": rloo, "grpo": group_normalised}[shaping],
            weight_correct=correct,
            weight_incorrect=incorrect,
            kl={"unbias": terms.kl_k3, "mse": terms.kl_k2}[self.settings["kl_type"]],
            clone_times_advantage=self.settings["pos_mult_adv"],
        )

    def scored(self, logits, token_scores) -> Scored:
        """Return the arrays for the loss; entry t - 1 of a row predicts token t."""

        def chosen(logits):
            log_probs = jax.nn.log_softmax(logits[:, :-1])
            tokens = self.arrays["tokens"][:, 1:, None]
            return jnp.take_along_axis(log_probs, tokens, -1)[..., 0]

        rewards = self.arrays["rewards"].reshape(-1, self.arrays["group_size"])
        advantage, log_probs = self.loss.advantage(rewards), chosen(logits)
        return Scored(
            log_probs=log_probs,
            old_log_probs=jax.lax.stop_gradient(log_probs),
            reference_log_probs=chosen(
                jnp.asarray(self.arrays["ref_logits"], logits.dtype)
            ),
            token_scores=token_scores[:, :-1],
            entropy=jnp.zeros_like(log_probs),
            completion=jnp.asarray(self.inside),
            correct=jnp.asarray(self.arrays["rewards"] > 0),
            advantage=jnp.asarray(advantage.reshape(-1), logits.dtype),
        ).masked()


def oracle_cases(condition=lambda settings: True):
    if not ORACLE.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no oracle here"))]
    with np.load(ORACLE, allow_pickle=False) as data:
        cases = json.loads(str(data["cases"]))
    return [
        pytest.param(number, id=f"{number:02d}")
        for number, settings in enumerate(cases)
        if condition(settings)
    ]


@pytest.fixture
def case(request) -> Case:
    prefix = f"{request.param:02d}/"
    with np.load(ORACLE, allow_pickle=False) as data:
        settings = json.loads(str(data["cases"]))[request.param]
        arrays = {
            name.removeprefix(prefix): data[name]
            for name in data.files
            if name.startswith(prefix)
        }
    column = np.arange(1, arrays["tokens"].shape[1])[None]
    first = arrays["prompt_lengths"][:, None]
    last = first + arrays["response_lengths"][:, None]
    return Case(settings, arrays, (column >= first) & (column < last))


def has_token_rewards(settings) -> bool:
    return settings["token_level_rm"] is not None


every_case = pytest.mark.parametrize("case", oracle_cases(), indirect=True)
every_case_with_token_rewards = pytest.mark.parametrize(
    "case", oracle_cases(has_token_rewards), indirect=True
)


def check(case: Case, dtype, rtol: float, scale: float):
    """Compare the policy loss of a case with the oracle, in one precision."""
    arrays, loss = case.arrays, case.loss
    logits = jnp.asarray(arrays["logits"], dtype)
    scores = jnp.asarray(arrays["token_scores"], dtype)
    counts = count(case.scored(logits, scores))
    policy = lambda logits: loss(case.scored(logits, scores), counts)
    (value, metrics), gradient = jax.value_and_grad(policy, has_aux=True)(logits)
    assert value.dtype == gradient.dtype == dtype
    scored = case.scored(logits, scores)
    near = partial(close, rtol=rtol, scale=scale)
    near(scored.advantage, arrays["advantages"])
    near(loss.positive_weight * metrics["actor/positive_loss"], arrays["positive_loss"])
    near(loss.negative_weight * metrics["actor/negative_loss"], arrays["negative_loss"])
    near(loss.kl_weight * metrics["actor/kl_loss"], arrays["kl_penalty_loss"])
    near(value, arrays["policy_loss"])
    near(gradient, arrays["grad_logits"])
    over_tokens = lambda values: token_mean(values, scored.completion, counts.all)
    near(over_tokens(terms.clone(scored.log_probs)), arrays["mean_negative_logprob"])
    k1 = terms.kl_k1(scored.log_probs, scored.reference_log_probs)
    near(over_tokens(k1), arrays["mean_ref_kl_k1"])


def token_reward(case: Case, dtype):
    """Our token reward loss of a case, and its gradient for the token scores."""
    logits = jnp.asarray(case.arrays["logits"], dtype)

    def value(scores):
        scored = case.scored(logits, scores)
        return TokenReward()(scored, count(scored))[0]

    return jax.value_and_grad(value)(jnp.asarray(case.arrays["token_scores"], dtype))


def released_token_reward(case: Case, dtype: torch.dtype):
    """Return the release's token reward loss, each mean score cast to `dtype`."""
    scores = torch.tensor(case.arrays["token_scores"], requires_grad=True)
    correct = torch.tensor(case.arrays["rewards"] > 0)
    N = len(correct)
    loss = torch.zeros((), dtype=dtype)
    for n in range(N):
        logit = scores[n, :-1][torch.tensor(case.inside[n])].mean().to(dtype)
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
            logit, correct[n].to(dtype), reduction="sum"
        ).div(N)
    loss.backward()
    assert scores.grad is not None
    return loss.item(), scores.grad.numpy()


@every_case
def test_the_released_objective_is_reproduced(case, double):
    check(case, jnp.float64, rtol=1e-9, scale=0.0)


@every_case
def test_the_released_objective_is_reproduced_in_single_precision(case):
    check(case, jnp.float32, rtol=1e-5, scale=1e-5)
    if has_token_rewards(case.settings):
        value, gradient = token_reward(case, jnp.float32)
        close(value, case.arrays["token_reward_loss"], 1e-5)
        close(gradient, case.arrays["grad_token_scores"], 1e-5, scale=1e-5)


@every_case_with_token_rewards
def test_the_released_token_reward_loss_is_reproduced_up_to_its_cast(case, double):
    released = case.arrays["token_reward_loss"], case.arrays["grad_token_scores"]
    ours = token_reward(case, jnp.float64)
    # The release casts the mean score to float32 whatever the inputs are ...
    close(ours[0], released[0], rtol=3e-7)
    close(ours[1], released[1], rtol=1e-6)
    # ... and differs in nothing else: with the cast, a restatement is the release;
    # without it, the same restatement is ours.
    with_cast = released_token_reward(case, torch.float32)
    close(with_cast[0], released[0])
    close(with_cast[1], released[1])
    without = released_token_reward(case, torch.float64)
    close(ours[0], without[0])
    close(ours[1], without[1])


@every_case
def test_the_restatement_is_the_release_too(case, double):
    arrays, settings = case.arrays, case.settings
    weighting = lambda side: reference.unweighted
    if settings.get("threshold_rescale"):
        weighting = lambda side: reference.threshold_weights(
            settings[f"{side}_threshold"]
        )
    elif settings.get("topk_rescale"):
        weighting = lambda side: reference.top_k_weights(settings[f"{side}_topk_ratio"])
    scored = case.scored(
        jnp.asarray(arrays["logits"]), jnp.asarray(arrays["token_scores"])
    )
    seen = {
        name: np.asarray(value)
        for name, value in scored._asdict().items()
        if name in Batch._fields
    }
    batch = Batch(**seen, rewards=arrays["rewards"].reshape(-1, arrays["group_size"]))
    advantages = {"rloo": reference.rloo, "grpo": reference.group_normalised}
    result = reference.oreal(
        batch,
        advantage=advantages[settings["reward_shaping_type"]],
        kl={"unbias": reference.kl_k3, "mse": reference.kl_k2}[settings["kl_type"]],
        clone_times_advantage=settings["pos_mult_adv"],
        weight_correct=weighting("correct"),
        weight_incorrect=weighting("incorrect"),
    )
    close(result.metrics["actor/positive_loss"], arrays["positive_loss"])
    close(0.5 * result.metrics["actor/negative_loss"], arrays["negative_loss"])
    close(0.01 * result.metrics["actor/kl_loss"], arrays["kl_penalty_loss"])
    close(result.value, arrays["policy_loss"])
