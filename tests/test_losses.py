"""The losses against the released trainer's own numbers and a slow restatement."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from reference import Batch, Result

from oreal_jax.losses import (
    BestOfNCloning,
    Count,
    Counts,
    Dapo,
    DrGrpo,
    FixedLength,
    Grpo,
    Oreal,
    OrealPaper,
    PolicyLoss,
    Reinforce,
    Scored,
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
    running_credit,
    sequence_mean,
    sequence_sum,
    terms,
    token_credit,
    token_mean,
    unweighted,
)

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "reference_losses.npz"


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


# The released trainer's own numbers.


class Case(NamedTuple):
    """One case of the oracle: its settings, its arrays, and where completions lie."""

    settings: dict[str, Any]
    its: dict[str, np.ndarray]
    inside: np.ndarray

    @property
    def loss(self) -> Oreal:
        """The loss with the settings of the case."""
        if self.settings.get("threshold_rescale"):
            right = ThresholdWeights(threshold=self.settings["correct_threshold"])
            wrong = ThresholdWeights(threshold=self.settings["incorrect_threshold"])
        elif self.settings.get("topk_rescale"):
            right = TopKWeights(ratio=self.settings["correct_topk_ratio"])
            wrong = TopKWeights(ratio=self.settings["incorrect_topk_ratio"])
        else:
            right = wrong = unweighted
        shaping = self.settings["reward_shaping_type"]
        return Oreal(
            advantage={"rloo": rloo, "grpo": group_normalised}[shaping],
            weight_right=right,
            weight_wrong=wrong,
            kl={"unbias": terms.kl_k3, "mse": terms.kl_k2}[self.settings["kl_type"]],
            clone_times_advantage=self.settings["pos_mult_adv"],
        )

    def scored(self, logits, token_scores) -> Scored:
        """What a loss sees of these logits; entry t - 1 of a row predicts token t."""

        def chosen(logits):
            log_probs = jax.nn.log_softmax(logits[:, :-1])
            tokens = self.its["tokens"][:, 1:, None]
            return jnp.take_along_axis(log_probs, tokens, -1)[..., 0]

        rewards = self.its["rewards"].reshape(-1, self.its["group_size"])
        advantage, log_probs = self.loss.advantage(rewards), chosen(logits)
        return Scored(
            log_probs=log_probs,
            old_log_probs=jax.lax.stop_gradient(log_probs),
            reference_log_probs=chosen(
                jnp.asarray(self.its["ref_logits"], logits.dtype)
            ),
            token_scores=token_scores[:, :-1],
            entropy=jnp.zeros_like(log_probs),
            completion=jnp.asarray(self.inside),
            correct=jnp.asarray(self.its["rewards"] > 0),
            advantage=jnp.asarray(advantage.reshape(-1), logits.dtype),
        )


def oracle_cases(wanted=lambda settings: True):
    if not ORACLE.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no oracle here"))]
    with np.load(ORACLE, allow_pickle=False) as data:
        cases = json.loads(str(data["cases"]))
    return [
        pytest.param(number, id=f"{number:02d}")
        for number, settings in enumerate(cases)
        if wanted(settings)
    ]


@pytest.fixture
def case(request) -> Case:
    prefix = f"{request.param:02d}/"
    with np.load(ORACLE, allow_pickle=False) as data:
        settings = json.loads(str(data["cases"]))[request.param]
        its = {
            name.removeprefix(prefix): data[name]
            for name in data.files
            if name.startswith(prefix)
        }
    column = np.arange(1, its["tokens"].shape[1])[None]
    first = its["prompt_lengths"][:, None]
    last = first + its["response_lengths"][:, None]
    return Case(settings, its, (column >= first) & (column < last))


def has_token_rewards(settings) -> bool:
    return settings["token_level_rm"] is not None


every_case = pytest.mark.parametrize("case", oracle_cases(), indirect=True)
every_case_with_token_rewards = pytest.mark.parametrize(
    "case", oracle_cases(has_token_rewards), indirect=True
)


def close(ours, theirs, rtol=1e-9, scale=0.0):
    """Equal up to a relative error, of each entry or of the array's scale."""
    atol = scale * float(np.max(np.abs(theirs))) or 1e-12
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def holds_against(case: Case, dtype, rtol: float, scale: float):
    """All that the oracle says of a case's policy loss, in one precision."""
    its, loss = case.its, case.loss
    logits = jnp.asarray(its["logits"], dtype)
    scores = jnp.asarray(its["token_scores"], dtype)
    counts = count(case.scored(logits, scores))
    policy = lambda logits: loss(case.scored(logits, scores), counts)
    (value, metrics), gradient = jax.value_and_grad(policy, has_aux=True)(logits)
    assert value.dtype == gradient.dtype == dtype
    scored = case.scored(logits, scores)
    near = partial(close, rtol=rtol, scale=scale)
    near(scored.advantage, its["advantages"])
    near(loss.positive_weight * metrics["actor/positive_loss"], its["positive_loss"])
    near(loss.negative_weight * metrics["actor/negative_loss"], its["negative_loss"])
    near(loss.kl_weight * metrics["actor/kl_loss"], its["kl_penalty_loss"])
    near(value, its["policy_loss"])
    near(gradient, its["grad_logits"])
    over_tokens = lambda values: token_mean(values, scored.completion, counts.all)
    near(over_tokens(terms.clone(scored.log_probs)), its["mean_negative_logprob"])
    k1 = terms.kl_k1(scored.log_probs, scored.reference_log_probs)
    near(over_tokens(k1), its["mean_ref_kl_k1"])


def token_reward_of(case: Case, dtype):
    """Our token reward loss of a case, and its gradient for the raw scores."""
    logits = jnp.asarray(case.its["logits"], dtype)

    def value(scores):
        scored = case.scored(logits, scores)
        return TokenReward()(scored, count(scored))[0]

    return jax.value_and_grad(value)(jnp.asarray(case.its["token_scores"], dtype))


def released_token_reward(case: Case, dtype: torch.dtype):
    """The release's token reward loss, each mean score cast to `dtype` on its way."""
    scores = torch.tensor(case.its["token_scores"], requires_grad=True)
    right = torch.tensor(case.its["rewards"] > 0)
    N = len(right)
    loss = torch.zeros((), dtype=dtype)
    for n in range(N):
        logit = scores[n, :-1][torch.tensor(case.inside[n])].mean().to(dtype)
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(
            logit, right[n].to(dtype), reduction="sum"
        ).div(N)
    loss.backward()
    assert scores.grad is not None
    return loss.item(), scores.grad.numpy()


@every_case
def test_the_released_objective_is_reproduced(case, double):
    holds_against(case, jnp.float64, rtol=1e-9, scale=0.0)


@every_case
def test_the_released_objective_is_reproduced_in_single_precision(case):
    holds_against(case, jnp.float32, rtol=1e-5, scale=1e-5)
    if has_token_rewards(case.settings):
        value, gradient = token_reward_of(case, jnp.float32)
        close(value, case.its["token_reward_loss"], 1e-5)
        close(gradient, case.its["grad_token_scores"], 1e-5, scale=1e-5)


@every_case_with_token_rewards
def test_the_released_token_reward_loss_is_reproduced_up_to_its_cast(case, double):
    its = case.its["token_reward_loss"], case.its["grad_token_scores"]
    ours = token_reward_of(case, jnp.float64)
    # The release casts the mean score to float32 whatever the inputs are ...
    close(ours[0], its[0], rtol=3e-7)
    close(ours[1], its[1], rtol=1e-6)
    # ... and differs in nothing else: with the cast, a restatement is the release;
    # without it, the same restatement is ours.
    with_cast = released_token_reward(case, torch.float32)
    close(with_cast[0], its[0])
    close(with_cast[1], its[1])
    without = released_token_reward(case, torch.float64)
    close(ours[0], without[0])
    close(ours[1], without[1])


# The slow restatement.

N, K, T = 2, 4, 7


def random_batch(seed: int = 0, rewards=None, lengths=None) -> Batch:
    """Completions of all lengths, a little off-policy, of two prompts."""
    draw = np.random.default_rng(seed)
    normal = lambda mean, spread: draw.normal(mean, spread, (N * K, T))
    log_probs = -np.abs(normal(2, 1))
    if lengths is None:
        lengths = [T, 1, 0, 4, 2, T, 3, 5]
    if rewards is None:
        rewards = [[1, -1, 1, -1], [-1, 1, -1, -1]]
    return Batch(
        log_probs=log_probs,
        old_log_probs=log_probs + normal(0, 0.6),
        reference_log_probs=log_probs + normal(0, 0.5),
        token_scores=normal(0, 2),
        entropy=np.abs(normal(1, 0.5)),
        completion=np.arange(T)[None] < np.array(lengths)[:, None],
        rewards=np.array(rewards, float),
    )


def batches() -> dict[str, Batch]:
    """The shapes that a batch may take."""
    mixed, draw = random_batch(), np.random.default_rng(1)
    ones = np.ones((N, K))
    far = draw.choice([-40.0, -21.0, -3.0, 3.0, 19.0, 21.0, 40.0], (2, N * K, T))
    return {
        "mixed": mixed,
        "another": random_batch(2),
        "with_holes": mixed._replace(completion=draw.random((N * K, T)) < 0.6),
        "on_policy": mixed._replace(old_log_probs=mixed.log_probs),
        "far_from_the_others": mixed._replace(
            old_log_probs=mixed.log_probs + far[0],
            reference_log_probs=mixed.log_probs + far[1],
        ),
        "no_scores": mixed._replace(token_scores=np.zeros((N * K, T))),
        "equal_scores": mixed._replace(token_scores=np.full((N * K, T), 0.7)),
        "all_right": random_batch(3, rewards=ones),
        "all_wrong": random_batch(4, rewards=-ones),
        "one_right_token": random_batch(5, lengths=[1] + [0] * 7),
        "one_wrong_token": random_batch(6, lengths=[0, 1] + [0] * 6),
        "empty": random_batch(7, lengths=[0] * 8),
    }


BATCHES = batches()

# Settings that no preset has, each beside its restatement.
VARIANTS: dict[str, tuple[PolicyLoss, Callable[[Batch], Result]]] = {
    "oreal_capped_k1_top_k": (
        Oreal(
            advantage=group_centred,
            positive_weight=0.7,
            negative_weight=1.3,
            kl_weight=0.3,
            credit=token_credit,
            weight_right=TopKWeights(ratio=0.5),
            weight_wrong=TopKWeights(ratio=0.25),
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
            weight_right=reference.top_k_weights(0.5),
            weight_wrong=reference.top_k_weights(0.25),
            kl=reference.kl_k1,
            importance_cap=1.2,
        ),
    ),
    "oreal_other_thresholds_k2": (
        Oreal(
            advantage=reshaped,
            weight_right=ThresholdWeights(threshold=0.3),
            weight_wrong=ThresholdWeights(threshold=0.7),
            kl=terms.kl_k2,
        ),
        partial(
            reference.oreal,
            advantage=reference.reshaped,
            weight_right=reference.threshold_weights(0.3),
            weight_wrong=reference.threshold_weights(0.7),
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


def count(scored: Scored) -> Counts:
    return Counts.of(scored.completion, scored.correct)


def as_scored(batch: Batch, advantage=outcome) -> Scored:
    """A batch as a loss sees it, with the advantages that the loss wants."""
    given = {
        name: jnp.asarray(values)
        for name, values in batch._asdict().items()
        if name != "rewards"
    }
    return Scored(
        **given,
        correct=jnp.asarray(batch.rewards.reshape(-1) > 0),
        advantage=jnp.asarray(advantage(batch.rewards).reshape(-1)),
    )


def evaluate(loss, scored: Scored, name: str = "log_probs"):
    """Loss, metrics, and the gradient with respect to one field."""
    value = lambda x: loss(scored._replace(**{name: x}), count(scored))
    (total, metrics), gradient = jax.value_and_grad(value, has_aux=True)(
        getattr(scored, name)
    )
    return total, metrics, gradient


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
def test_a_loss_is_its_formula_spelled_out(name, batch, double):
    loss, restated = RESTATED[name]
    scored = as_scored(BATCHES[batch], loss.advantage)
    agree(evaluate(loss, scored), restated(BATCHES[batch]))


@pytest.mark.parametrize("batch", BATCHES)
def test_the_token_reward_loss_is_its_formula_spelled_out(batch, double):
    ours = evaluate(TokenReward(), as_scored(BATCHES[batch]), "token_scores")
    agree(ours, reference.token_reward(BATCHES[batch]))


@pytest.mark.parametrize("kind", ["all_right", "all_wrong", "empty"])
@pytest.mark.parametrize("name", presets.NAMED)
def test_a_kind_of_completion_that_is_absent_adds_nothing(name, kind):
    loss = presets.NAMED[name]
    value, metrics, _ = evaluate(loss, as_scored(BATCHES[kind], loss.advantage))
    if kind != "all_wrong":
        assert metrics.get("actor/negative_loss", 0) == 0
    if kind != "all_right":
        assert metrics.get("actor/positive_loss", 0) == 0
    if kind == "empty":
        assert value == 0
        assert not any(metrics.values())


@every_case
def test_the_restatement_is_the_release_too(case, double):
    its, settings = case.its, case.settings
    weighting = lambda side: reference.unweighted
    if settings.get("threshold_rescale"):
        weighting = lambda side: reference.threshold_weights(
            settings[f"{side}_threshold"]
        )
    elif settings.get("topk_rescale"):
        weighting = lambda side: reference.top_k_weights(settings[f"{side}_topk_ratio"])
    scored = case.scored(jnp.asarray(its["logits"]), jnp.asarray(its["token_scores"]))
    seen = {
        name: np.asarray(value)
        for name, value in scored._asdict().items()
        if name in Batch._fields
    }
    batch = Batch(**seen, rewards=its["rewards"].reshape(-1, its["group_size"]))
    advantages = {"rloo": reference.rloo, "grpo": reference.group_normalised}
    result = reference.oreal(
        batch,
        advantage=advantages[settings["reward_shaping_type"]],
        kl={"unbias": reference.kl_k3, "mse": reference.kl_k2}[settings["kl_type"]],
        clone_times_advantage=settings["pos_mult_adv"],
        weight_right=weighting("correct"),
        weight_wrong=weighting("incorrect"),
    )
    close(result.metrics["actor/positive_loss"], its["positive_loss"])
    close(0.5 * result.metrics["actor/negative_loss"], its["negative_loss"])
    close(0.01 * result.metrics["actor/kl_loss"], its["kl_penalty_loss"])
    close(result.value, its["policy_loss"])


# Every setting of every loss does something.

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
    (Oreal, "weight_right"): ThresholdWeights(threshold=0.2),
    (Oreal, "weight_wrong"): TopKWeights(ratio=0.5),
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


def test_the_changed_settings_are_those_that_there_are():
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
def test_low_precision_inputs_are_the_same_numbers_in_float32(name):
    loss = presets.NAMED[name]
    cast = lambda scored, dtype: jax.tree.map(
        lambda x: x if x.dtype == bool else x.astype(dtype), scored
    )
    low = cast(as_scored(BATCHES["mixed"], loss.advantage), jnp.bfloat16)
    value, metrics = loss(low, count(low))
    expected, _ = loss(cast(low, jnp.float32), count(low))
    assert value.dtype == jnp.float32
    assert all(metric.dtype == jnp.float32 for metric in metrics.values())
    assert value == expected


# Advantages.

ADVANTAGES = {
    "outcome": (outcome, reference.outcome),
    "reshaped": (reshaped, reference.reshaped),
    "rloo": (rloo, reference.rloo),
    "group_centred": (group_centred, reference.group_centred),
    "group_normalised": (group_normalised, reference.group_normalised),
}


def groups(K: int, rights: list[int]) -> np.ndarray:
    """Rewards of K samples a prompt, of which so many are right, in any order."""
    draw = np.random.default_rng(K)
    rows = [draw.permutation([1.0] * n + [-1.0] * (K - n)) for n in rights]
    return np.stack(rows)


@pytest.mark.parametrize("K", [2, 3, 16])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_an_advantage_is_its_formula_spelled_out(name, K):
    ours, restated = ADVANTAGES[name]
    rewards = groups(K, list(range(K + 1)))
    close(ours(rewards), restated(rewards))
    halved = ZeroOne(ours)(rewards)
    close(halved, reference.zero_one(restated)(rewards))


@pytest.mark.parametrize("K", [2, 5, 16])
def test_the_table_of_advantages_holds(K):
    for number in range(1, K):
        p = number / K
        rewards = groups(K, [number])
        c = np.sqrt((K - 1) / K)
        table = {
            outcome: (1, -1),
            reshaped: (1, -(1 - p)),
            rloo: (2 * K / (K - 1) * (1 - p), -2 * K / (K - 1) * p),
            group_centred: (2 * (1 - p), -2 * p),
            group_normalised: (np.sqrt((1 - p) / p) * c, -np.sqrt(p / (1 - p)) * c),
        }
        for advantage, (right, wrong) in table.items():
            expected = np.where(rewards > 0, right, wrong)
            # group_normalised adds 1e-8 to its divisor.
            close(advantage(rewards), expected, rtol=1e-7)


def test_prompts_that_are_all_right_or_all_wrong_teach_nothing_beside_their_group():
    rewards = groups(6, [0, 6])
    for advantage in (rloo, group_centred, group_normalised):
        np.testing.assert_array_equal(advantage(rewards), np.zeros((2, 6)))


def test_rewards_of_one_and_zero_halve_some_advantages_and_leave_others():
    rewards = groups(8, list(range(1, 8)))
    close(ZeroOne(rloo)(rewards), rloo(rewards) / 2)
    close(ZeroOne(group_centred)(rewards), group_centred(rewards) / 2)
    close(ZeroOne(group_normalised)(rewards), group_normalised(rewards), rtol=1e-7)
    for advantage in (outcome, reshaped):
        close(ZeroOne(advantage)(rewards), np.where(rewards > 0, 1.0, 0.0))


@pytest.mark.parametrize("K", [2, 7, 16])
def test_rloo_is_the_centred_reward_times_a_constant(K):
    rewards = np.random.default_rng(0).normal(0, 1, (5, K))
    close(rloo(rewards), K / (K - 1) * group_centred(rewards))


# Aggregation.


def lengths_mask(*lengths: int):
    return jnp.asarray(np.arange(T)[None] < np.array(lengths)[:, None])


AGGREGATES = {
    "token_mean": (token_mean, reference.token_mean),
    "sequence_sum": (sequence_sum, reference.sequence_sum),
    "sequence_mean": (sequence_mean, reference.sequence_mean),
    "fixed_length": (FixedLength(11), reference.fixed_length(11)),
}


@pytest.mark.parametrize("name", AGGREGATES)
def test_an_aggregate_is_its_formula_spelled_out(name, double):
    aggregate, share = AGGREGATES[name]
    for batch in BATCHES.values():
        expected = 0.0
        for b, _, tokens in batch.rows():
            for t in tokens:
                expected += batch.entropy[b, t] * share(batch, len(tokens))
        where = jnp.asarray(batch.completion)
        close(aggregate(jnp.asarray(batch.entropy), where, Count.of(where)), expected)


@pytest.mark.parametrize("lengths", [(T, 1, 3), (2, 0, 5), (0, 0, 1), (4, 4, 4)])
def test_the_mean_of_a_constant_is_that_constant_whatever_the_lengths(lengths):
    where = lengths_mask(*lengths)
    for aggregate in (sequence_mean, token_mean):
        mean = aggregate(jnp.full(where.shape, 0.3), where, Count.of(where))
        np.testing.assert_allclose(mean, 0.3, rtol=1e-6)


def test_a_mean_over_tokens_weighs_completions_by_their_length():
    where = lengths_mask(6, 2)
    values = jnp.broadcast_to(jnp.asarray([[1.0], [5.0]]), where.shape)
    size = Count.of(where)
    assert token_mean(values, where, size) == (6 * 1 + 2 * 5) / 8
    assert sequence_mean(values, where, size) == (1 + 5) / 2
    assert sequence_sum(values, where, size) == (6 * 1 + 2 * 5) / 2
    assert FixedLength(8)(values, where, size) == (6 * 1 + 2 * 5) / 2 / 8


def test_all_means_agree_where_all_completions_are_as_long(double):
    where = lengths_mask(5, 5, 5)
    values = jnp.asarray(np.random.default_rng(0).normal(0, 1, where.shape))
    size = Count.of(where)
    expected = np.asarray(values)[:, :5].mean()
    for aggregate in (token_mean, sequence_mean, FixedLength(5)):
        close(aggregate(values, where, size), expected)
    close(sequence_sum(values, where, size), 5 * expected)


def test_counts_are_of_tokens_and_completions_and_at_least_one():
    where = lengths_mask(3, 0, 5, 1)
    right = jnp.asarray([True, True, False, False])
    whole = Counts.of(where, right)
    assert whole == Counts(Count(3, 1), Count(6, 2), Count(9, 3))  # pyright: ignore
    split = Counts.of(where.reshape(2, 2, T), right.reshape(2, 2))
    assert split == whole
    nothing = Counts.of(lengths_mask(0, 0), jnp.asarray([True, False]))
    assert nothing == Counts(*[Count(1, 1)] * 3)  # pyright: ignore


# Terms.


def test_the_policy_loss_trains_tokens_of_both_kinds_and_never_the_token_rewards():
    scored = as_scored(BATCHES["mixed"], rloo)
    _, _, gradient = evaluate(Oreal(kl_weight=0.0), scored)
    assert jnp.any(gradient < 0) and jnp.any(gradient > 0)
    _, _, gradient = evaluate(Oreal(kl_weight=0.0), scored, "token_scores")
    assert not jnp.any(gradient)


def test_a_zero_head_weighs_every_token_zero_and_leaves_only_kl():
    scored = as_scored(BATCHES["no_scores"], rloo)
    _, metrics, gradient = evaluate(Oreal(kl_weight=0.0), scored)
    assert metrics["oreal/omega_zero_share"] == 1
    assert not jnp.any(gradient)
    assert jnp.any(evaluate(Oreal(), scored)[2])


def test_cloning_times_the_advantage_is_reinforce_but_for_its_denominator(double):
    scored = as_scored(BATCHES["mixed"], rloo)
    unweighted_oreal = Oreal(
        negative_weight=1.0,
        kl_weight=0.0,
        weight_right=unweighted,
        weight_wrong=unweighted,
    )
    gradient = evaluate(unweighted_oreal, scored)[2]
    every = evaluate(Reinforce(advantage=rloo, kl_weight=0.0), scored)[2]
    counts = count(scored)
    for where, own in ((scored.right, counts.right), (scored.wrong, counts.wrong)):
        theirs = every * counts.all.tokens / own.tokens
        close(jnp.where(where, gradient, 0), jnp.where(where, theirs, 0))


def test_best_of_n_cloning_is_oreal_on_right_completions_without_its_kl(double):
    scored = as_scored(BATCHES["mixed"], outcome)
    half = Oreal(
        advantage=outcome,
        negative_weight=0.0,
        kl_weight=0.0,
        clone_times_advantage=False,
        weight_right=unweighted,
        weight_wrong=unweighted,
    )
    ours, theirs = evaluate(BestOfNCloning(), scored), evaluate(half, scored)
    close(ours[0], theirs[0])
    close(ours[2], theirs[2])


@pytest.mark.parametrize("loss", [Grpo(), DrGrpo(longest=T), Dapo(), XtunerOreal()])
def test_a_ratio_beyond_its_bound_has_no_gradient_and_within_it_has(loss):
    # A right token that became far likelier, a right one that did not, a wrong one
    # that became far less likely, a wrong one that did not.
    correct, moved = [True, True, False, False], jnp.asarray([1.0, -1.0, -1.0, 0.1])
    flat = jnp.full((4, 1), -2.0)
    if isinstance(loss, XtunerOreal):
        loss = dataclasses.replace(loss, clone_weight=0.0)
    if not isinstance(loss, DrGrpo | Dapo):
        loss = dataclasses.replace(loss, kl_weight=0.0)
    scored = Scored(
        log_probs=flat + moved[:, None],
        old_log_probs=flat,
        reference_log_probs=flat,
        token_scores=flat,
        entropy=flat,
        completion=jnp.ones((4, 1), bool),
        correct=jnp.asarray(correct),
        advantage=jnp.where(jnp.asarray(correct), 1.0, -1.0),
    )
    pulls = evaluate(loss, scored)[2][:, 0]
    np.testing.assert_array_equal(np.sign(pulls), [0, -1, 0, 1])


def test_the_dual_clip_bounds_a_wrong_token_that_became_far_likelier():
    one = lambda x: jnp.full((1, 1), x)
    surrogate = partial(
        terms.clipped_surrogate, advantage=jnp.asarray([-2.0]), low=0.2, high=0.2
    )
    far, near = one(2.0), one(0.5)
    assert surrogate(far, one(0.0), dual=3.0) == 6
    assert surrogate(far, one(0.0)) == 2 * jnp.exp(2.0)
    assert surrogate(near, one(0.0), dual=3.0) == surrogate(near, one(0.0))


@pytest.mark.parametrize("estimator", [terms.kl_k1, terms.kl_k2, terms.kl_k3])
def test_kl_estimators_grow_with_the_distance_that_the_policy_has_gained(estimator):
    reference = jnp.full((1, 1), -2.0)
    near, far = (estimator(reference + d, reference)[0, 0] for d in (0.1, 1.0))
    assert 0 < near < far


def test_k3_is_not_negative_and_vanishes_with_its_gradient_on_policy():
    scored = as_scored(BATCHES["mixed"])
    kl = terms.kl_k3(scored.log_probs, scored.reference_log_probs)
    assert jnp.all(kl >= 0) and jnp.any(kl > 0)
    same = lambda p: jnp.sum(terms.kl_k3(p, scored.log_probs))
    assert not jnp.any(jax.grad(same)(scored.log_probs))


def test_a_ratio_goes_on_as_a_straight_line_beyond_e_to_the_20(double):
    zero, steepest = jnp.zeros((1, 1)), np.exp(20)
    for beyond in (0.0, 1.0, 1e4):
        at = jnp.full((1, 1), 20 + beyond)
        close(terms.ratio(at, zero), [[steepest * (1 + beyond)]])
        slope = jax.grad(lambda x: jnp.sum(terms.ratio(x, zero)))(at)
        close(slope, [[steepest]])


# Token weights.


def test_equation_10_of_the_paper_is_the_threshold_weight_at_one_half():
    probability = jnp.linspace(0, 1, 11)[None]
    where = jnp.ones_like(probability, bool)
    np.testing.assert_allclose(
        ThresholdWeights()(probability, where),
        jnp.maximum(2 * probability - 1, 0),
        atol=1e-6,
    )


def test_top_k_keeps_at_least_one_token_and_ones_where_all_are_equal():
    where = jnp.asarray([[True, True, False]])
    weights = TopKWeights(ratio=0.1)(jnp.asarray([[0.2, 0.6, 0.9]]), where)
    np.testing.assert_allclose(weights, [[0, 1, 0]])
    equal = TopKWeights(ratio=1.0)(jnp.full((1, 3), 0.4), where)
    np.testing.assert_allclose(equal, [[1, 1, 0]])


def test_top_k_spreads_the_tokens_that_it_keeps_from_zero_to_one():
    where = jnp.asarray([[True, True, True, True, False]])
    weights = TopKWeights(ratio=0.8)(jnp.asarray([[0.2, 0.6, 0.9, 0.5, 1.0]]), where)
    np.testing.assert_allclose(weights, [[0, 0.25, 1, 0, 0]], atol=1e-6)


def test_a_running_credit_sees_the_past_and_a_token_credit_the_token():
    where = jnp.ones((1, 3), bool)
    scores = jnp.asarray([[2.0, -2.0, 3.0]])
    expected = jax.nn.sigmoid(jnp.asarray([[2.0, 0.0, 1.0]]))
    np.testing.assert_allclose(running_credit(scores, where), expected)
    np.testing.assert_allclose(token_credit(scores, where), jax.nn.sigmoid(scores))


# The table of docs/losses.md: (right, wrong) from the pass rate p, a = 2K/(K-1), c, n
# kept tokens (`right` of right ones, m of wrong ones), N completions, the completion's
# length T and the token's weight w.
COEFFICIENTS = {
    "released": lambda x: (-x.w * x.a * (1 - x.p) / x.right, x.w * x.a * x.p / 2 / x.m),
    "paper": lambda x: (-x.w / x.N, x.w * (1 - x.p) / 2 / x.N),
    "without_token_rewards": lambda x: (
        -x.a * (1 - x.p) / x.right,
        x.a * x.p / 2 / x.m,
    ),
    "reinforce": lambda x: (-1 / x.n, 1 / x.n),
    "reward_shaping": lambda x: (-x.a * (1 - x.p) / x.n, x.a * x.p / x.n),
    "behaviour_cloning": lambda x: (-1 / x.right, x.a * x.p / 2 / x.m),
    "token_weights": lambda x: (-x.w / x.right, x.w * x.a * x.p / 2 / x.m),
    "best_of_n": lambda x: (-1 / x.right, 0 * x.n),
    "grpo": lambda x: (
        -x.c * np.sqrt((1 - x.p) / x.p) / x.N / x.T,
        x.c * np.sqrt(x.p / (1 - x.p)) / x.N / x.T,
    ),
    "dr_grpo": lambda x: (-2 * (1 - x.p) / x.N / 14_000, 2 * x.p / x.N / 14_000),
    "dapo": lambda x: (
        -x.c * np.sqrt((1 - x.p) / x.p) / x.n,
        x.c * np.sqrt(x.p / (1 - x.p)) / x.n,
    ),
    "xtuner": lambda x: (-(1 + x.a * (1 - x.p)) / x.right, x.a * x.p / x.m),
}


@pytest.mark.parametrize("name", presets.NAMED)
def test_the_table_of_the_docs_holds(name, double):
    K, right, lengths = 8, 3, np.array([4, 6])
    rewards = np.array([1.0] * right + [-1.0] * (K - right))[None]
    inside = np.arange(6)[None] < lengths[:, None]
    score = {"right": 0.7, "wrong": -0.3}  # the same at all tokens: both credits agree
    log_probs = jnp.asarray(np.linspace(-2, -1, 12).reshape(2, 6))
    loss = presets.NAMED[name]
    advantages = loss.advantage(rewards)[0]
    scored = Scored(
        log_probs=log_probs,
        old_log_probs=log_probs,
        reference_log_probs=log_probs,
        token_scores=jnp.asarray([[score["right"]] * 6, [score["wrong"]] * 6]),
        entropy=jnp.zeros((2, 6)),
        completion=jnp.asarray(inside),
        correct=jnp.asarray([True, False]),
        advantage=jnp.asarray([advantages[0], advantages[-1]]),
    )
    counts = Counts.of(scored.completion, scored.correct)
    total = lambda x: loss(scored._replace(log_probs=x), counts)[0]
    found = jax.grad(total)(log_probs)
    values = SimpleNamespace(
        p=right / K, a=2 * K / (K - 1), c=np.sqrt((K - 1) / K), right=4, m=6, n=10, N=2
    )
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for row, (kind, weight) in enumerate(
        [
            ("right", 2 * sigmoid(score["right"]) - 1),
            ("wrong", 1 - 2 * sigmoid(score["wrong"])),
        ]
    ):
        values.T, values.w = lengths[row], weight
        expected = COEFFICIENTS[name](values)[("right", "wrong").index(kind)]
        np.testing.assert_allclose(
            found[row, : lengths[row]], expected, rtol=1e-6, atol=1e-12
        )
