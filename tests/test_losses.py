"""The objective against the released trainer's own numbers, and its invariances."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oreal_jax.losses import (
    BestOfNCloning,
    Counts,
    Oreal,
    Reinforce,
    Scored,
    ThresholdWeights,
    TokenReward,
    TopKWeights,
    group_normalised,
    rloo,
    terms,
    unweighted,
)

ORACLE = Path(__file__).parents[2] / "shared" / "oracle" / "reference_losses.npz"


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def oracle_cases():
    if not ORACLE.exists():
        return [pytest.param(None, marks=pytest.mark.skip(reason="no oracle here"))]
    with np.load(ORACLE, allow_pickle=False) as data:
        cases = json.loads(str(data["cases"]))
    return [
        pytest.param((f"{i:02d}/", case), id=f"{i:02d}") for i, case in enumerate(cases)
    ]


def preset(case) -> Oreal:
    """The loss with a case's settings."""
    if case.get("threshold_rescale"):
        right = ThresholdWeights(threshold=case["correct_threshold"])
        wrong = ThresholdWeights(threshold=case["incorrect_threshold"])
    elif case.get("topk_rescale"):
        right = TopKWeights(ratio=case["correct_topk_ratio"])
        wrong = TopKWeights(ratio=case["incorrect_topk_ratio"])
    else:
        right = wrong = unweighted
    return Oreal(
        weight_right=right,
        weight_wrong=wrong,
        kl={"unbias": terms.kl_k3, "mse": terms.kl_k2}[case["kl_type"]],
        clone_times_advantage=case["pos_mult_adv"],
    )


@pytest.mark.parametrize("numbered", oracle_cases())
def test_the_released_objective_is_reproduced(numbered, double):
    prefix, case = numbered
    with np.load(ORACLE, allow_pickle=False) as data:
        its = {
            k.removeprefix(prefix): data[k] for k in data.files if k.startswith(prefix)
        }
    T = its["tokens"].shape[1]
    advantages = {"rloo": rloo, "grpo": group_normalised}[case["reward_shaping_type"]]
    advantage = advantages(its["rewards"].reshape(-1, its["group_size"])).reshape(-1)
    right = jnp.asarray(its["rewards"] > 0)
    # Entry t - 1 of a row predicts token t.
    column = np.arange(1, T)[None]
    first = its["prompt_lengths"][:, None]
    inside = (column >= first) & (column < first + its["response_lengths"][:, None])
    counts = Counts.of(jnp.asarray(inside), right)
    loss = preset(case)

    def chosen(logits):
        log_probs = jax.nn.log_softmax(logits[:, :-1])
        return jnp.take_along_axis(log_probs, its["tokens"][:, 1:, None], -1)[..., 0]

    def scored(logits, token_scores):
        return Scored(
            chosen(logits),
            chosen(jnp.asarray(its["ref_logits"])),
            token_scores[:, :-1],
            jnp.asarray(inside),
            right,
            jnp.asarray(advantage),
        )

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)

    logits, scores = jnp.asarray(its["logits"]), jnp.asarray(its["token_scores"])
    policy = lambda logits: loss(scored(logits, scores), counts)
    (value, metrics), gradient = jax.value_and_grad(policy, has_aux=True)(logits)
    close(advantage, its["advantages"])
    close(loss.positive_weight * metrics["actor/positive_loss"], its["positive_loss"])
    close(loss.negative_weight * metrics["actor/negative_loss"], its["negative_loss"])
    close(loss.kl_weight * metrics["actor/kl_loss"], its["kl_penalty_loss"])
    close(value, its["policy_loss"])
    close(gradient, its["grad_logits"])
    if case["token_level_rm"]:
        reward = lambda scores: TokenReward()(scored(logits, scores), counts)[0]
        value, gradient = jax.value_and_grad(reward)(scores)
        # The release casts the mean score to float32 whatever the inputs are.
        np.testing.assert_allclose(value, its["token_reward_loss"], rtol=3e-7)
        np.testing.assert_allclose(
            gradient, its["grad_token_scores"], rtol=1e-6, atol=1e-9
        )


def random_scored(seed=0, B=6, T=9):
    draw = np.random.default_rng(seed)
    length = draw.integers(0, T + 1, B)
    length[:3] = [T, 1, 0]
    log_probs = draw.normal(-2, 1, (B, T)).astype(np.float32)
    return Scored(
        jnp.asarray(log_probs),
        jnp.asarray(log_probs + draw.normal(0, 0.3, (B, T)).astype(np.float32)),
        jnp.asarray(draw.normal(0, 2, (B, T)).astype(np.float32)),
        jnp.asarray(np.arange(T)[None] < length[:, None]),
        jnp.asarray(np.arange(B) % 2 == 0),
        jnp.asarray(np.where(np.arange(B) % 2 == 0, 0.7, -0.4).astype(np.float32)),
    )


def count(scored):
    return Counts.of(scored.completion, scored.correct)


def policy_gradient(loss, scored):
    value = lambda p: loss(scored._replace(log_probs=p), count(scored))[0]
    return jax.grad(value)(scored.log_probs)


LOSSES = [
    Oreal(),
    Oreal(weight_right=TopKWeights(ratio=0.5)),
    BestOfNCloning(),
    Reinforce(),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_what_lies_behind_a_completion_has_no_influence_even_as_nan(loss):
    scored = random_scored()
    spoil = lambda x: jnp.where(scored.completion, x, jnp.nan)
    spoiled = scored._replace(
        log_probs=spoil(scored.log_probs),
        reference_log_probs=spoil(scored.reference_log_probs),
        token_scores=spoil(scored.token_scores),
    )
    np.testing.assert_allclose(
        loss(spoiled, count(scored))[0], loss(scored, count(scored))[0], rtol=1e-6
    )
    gradient = policy_gradient(loss, spoiled)
    np.testing.assert_allclose(gradient, policy_gradient(loss, scored), rtol=1e-6)


@pytest.mark.parametrize(
    "loss", [*LOSSES, TokenReward()], ids=lambda x: type(x).__name__
)
def test_parts_of_a_batch_add_up_in_any_order(loss):
    scored = random_scored()
    order = np.array([3, 0, 5, 1, 4, 2])
    parts = [
        jax.tree.map(lambda x, i=i: x[order[i : i + 2]], scored) for i in (0, 2, 4)
    ]
    whole, metrics = loss(scored, count(scored))
    pieces = [loss(part, count(scored)) for part in parts]
    np.testing.assert_allclose(sum(p[0] for p in pieces), whole, rtol=1e-5)
    for name, value in metrics.items():
        added = sum(p[1][name] for p in pieces)
        np.testing.assert_allclose(added, value, rtol=1e-5, err_msg=name)


def test_the_policy_loss_never_trains_the_token_reward_model():
    scored = random_scored()
    value = lambda s: Oreal()(scored._replace(token_scores=s), count(scored))[0]
    assert not jnp.any(jax.grad(value)(scored.token_scores))


def test_right_tokens_are_pulled_and_wrong_ones_pushed():
    scored = random_scored()
    gradient = policy_gradient(Oreal(kl_weight=0.0), scored)
    right = scored.completion & scored.correct[:, None]
    wrong = scored.completion & ~scored.correct[:, None]
    assert jnp.all(jnp.where(right, gradient, 0) <= 0)
    assert jnp.all(jnp.where(wrong, gradient, 0) >= 0)
    assert jnp.any(gradient < 0) and jnp.any(gradient > 0)


def test_a_zero_head_weighs_every_token_zero_and_leaves_only_kl():
    scored = random_scored()
    scored = scored._replace(token_scores=jnp.zeros_like(scored.token_scores))
    _, metrics = Oreal()(scored, count(scored))
    assert metrics["oreal/omega_zero_share"] == 1
    assert not jnp.any(policy_gradient(Oreal(kl_weight=0.0), scored))


def test_k3_is_not_negative_and_vanishes_with_its_gradient_on_policy():
    scored = random_scored()
    kl = terms.kl_k3(scored.log_probs, scored.reference_log_probs)
    assert jnp.all(kl >= 0) and jnp.any(kl > 0)
    same = lambda p: jnp.sum(terms.kl_k3(p, scored.log_probs))
    assert not jnp.any(jax.grad(same)(scored.log_probs))


@pytest.mark.parametrize("estimator", [terms.kl_k1, terms.kl_k2, terms.kl_k3])
def test_kl_estimators_grow_with_the_distance_that_the_policy_has_gained(estimator):
    reference = jnp.full((1, 1), -2.0)
    near, far = (estimator(reference + d, reference)[0, 0] for d in (0.1, 1.0))
    assert 0 < near < far


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


def test_rloo_with_signed_rewards_is_the_reshaped_reward():
    K, right = 16, 5
    rewards = np.array([[1.0] * right + [-1.0] * (K - right)])
    p = right / K
    np.testing.assert_allclose(rloo(rewards)[0, 0], 2 * K / (K - 1) * (1 - p))
    np.testing.assert_allclose(rloo(rewards)[0, -1], -2 * K / (K - 1) * p)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("positive_weight", 2.0),
        ("negative_weight", 0.1),
        ("kl_weight", 1.0),
        ("clone_times_advantage", False),
        ("weight_right", unweighted),
        ("weight_wrong", ThresholdWeights(threshold=0.8)),
        ("kl", terms.kl_k2),
    ],
)
def test_every_setting_of_the_loss_changes_it(field, value):
    scored = random_scored()
    changed = dataclasses.replace(Oreal(), **{field: value})
    before, after = (loss(scored, count(scored))[0] for loss in (Oreal(), changed))
    assert before != after
