"""The parts of losses: advantages, aggregation, terms, token weights."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from batches import BATCHES, T, as_scored, close, count, evaluate

from oreal_jax.losses import (
    BestOfNCloning,
    Count,
    Counts,
    Dapo,
    DrGrpo,
    FixedLength,
    Grpo,
    Oreal,
    Reinforce,
    Scored,
    ThresholdWeights,
    TopKWeights,
    XtunerOreal,
    ZeroOne,
    group_centred,
    group_normalised,
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

# Advantages.

ADVANTAGES = {
    "outcome": (outcome, reference.outcome),
    "reshaped": (reshaped, reference.reshaped),
    "rloo": (rloo, reference.rloo),
    "group_centred": (group_centred, reference.group_centred),
    "group_normalised": (group_normalised, reference.group_normalised),
}


def groups(K: int, correct: list[int]) -> np.ndarray:
    """Rewards of K samples per prompt, with `correct[n]` correct ones in any order."""
    draw = np.random.default_rng(K)
    rows = [draw.permutation([1.0] * n + [-1.0] * (K - n)) for n in correct]
    return np.stack(rows)


@pytest.mark.parametrize("K", [2, 3, 16])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_equal_their_restatement(name, K):
    ours, restated = ADVANTAGES[name]
    rewards = groups(K, list(range(K + 1)))
    close(ours(rewards), restated(rewards))
    halved = ZeroOne(ours)(rewards)
    close(halved, reference.zero_one(restated)(rewards))


@pytest.mark.parametrize("K", [2, 5, 16])
def test_advantages_have_the_values_of_their_table(K):
    for n in range(1, K):
        p = n / K
        rewards = groups(K, [n])
        c = np.sqrt((K - 1) / K)
        table = {
            outcome: (1, -1),
            reshaped: (1, -(1 - p)),
            rloo: (2 * K / (K - 1) * (1 - p), -2 * K / (K - 1) * p),
            group_centred: (2 * (1 - p), -2 * p),
            group_normalised: (np.sqrt((1 - p) / p) * c, -np.sqrt(p / (1 - p)) * c),
        }
        for advantage, (correct, incorrect) in table.items():
            expected = np.where(rewards > 0, correct, incorrect)
            # group_normalised adds 1e-8 to its divisor.
            close(advantage(rewards), expected, rtol=1e-7)


def test_relative_advantages_are_zero_where_all_verdicts_are_equal():
    rewards = groups(6, [0, 6])
    for advantage in (rloo, group_centred, group_normalised):
        np.testing.assert_array_equal(advantage(rewards), np.zeros((2, 6)))


def test_rewards_of_one_and_zero_halve_or_keep_advantages():
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
def test_aggregates_equal_their_restatement(name, double):
    aggregate, share = AGGREGATES[name]
    for batch in BATCHES.values():
        expected = 0.0
        for b, _, tokens in batch.rows():
            for t in tokens:
                expected += batch.entropy[b, t] * share(batch, len(tokens))
        where = jnp.asarray(batch.completion)
        close(aggregate(jnp.asarray(batch.entropy), where, Count.of(where)), expected)


@pytest.mark.parametrize("lengths", [(T, 1, 3), (2, 0, 5), (0, 0, 1), (4, 4, 4)])
def test_the_mean_of_a_constant_is_that_constant(lengths):
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


def test_counts_are_at_least_one():
    where = lengths_mask(3, 0, 5, 1)
    correct = jnp.asarray([True, True, False, False])
    total = Counts.of(where, correct)
    assert total == Counts(Count(3, 1), Count(6, 2), Count(9, 3))  # pyright: ignore
    split = Counts.of(where.reshape(2, 2, T), correct.reshape(2, 2))
    assert split == total
    nothing = Counts.of(lengths_mask(0, 0), jnp.asarray([True, False]))
    assert nothing == Counts(*[Count(1, 1)] * 3)  # pyright: ignore


# Terms.


def test_token_scores_of_zero_leave_only_the_kl_term():
    scored = as_scored(BATCHES["no_scores"], rloo)
    _, metrics, gradient = evaluate(Oreal(kl_weight=0.0), scored)
    assert metrics["oreal/omega_zero_share"] == 1
    assert not jnp.any(gradient)
    assert jnp.any(evaluate(Oreal(), scored)[2])


def test_cloning_times_the_advantage_is_reinforce_with_another_denominator(double):
    scored = as_scored(BATCHES["mixed"], rloo)
    unweighted_oreal = Oreal(
        negative_weight=1.0,
        kl_weight=0.0,
        weight_correct=unweighted,
        weight_incorrect=unweighted,
    )
    gradient = evaluate(unweighted_oreal, scored)[2]
    every = evaluate(Reinforce(advantage=rloo, kl_weight=0.0), scored)[2]
    counts = count(scored)
    for where, own in (
        (scored.correct_tokens, counts.correct),
        (scored.incorrect_tokens, counts.incorrect),
    ):
        theirs = every * counts.all.tokens / own.tokens
        close(jnp.where(where, gradient, 0), jnp.where(where, theirs, 0))


def test_best_of_n_cloning_is_oreal_on_correct_completions_without_kl(double):
    scored = as_scored(BATCHES["mixed"], outcome)
    half = Oreal(
        advantage=outcome,
        negative_weight=0.0,
        kl_weight=0.0,
        clone_times_advantage=False,
        weight_correct=unweighted,
        weight_incorrect=unweighted,
    )
    ours, theirs = evaluate(BestOfNCloning(), scored), evaluate(half, scored)
    close(ours[0], theirs[0])
    close(ours[2], theirs[2])


@pytest.mark.parametrize("loss", [Grpo(), DrGrpo(longest=T), Dapo(), XtunerOreal()])
def test_only_clipped_ratios_have_no_gradient(loss):
    # A correct token that became far likelier, a correct one that did not, an incorrect
    # one that became far less likely, an incorrect one that did not.
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


def test_the_dual_clip_bounds_an_incorrect_token_that_became_likelier():
    one = lambda x: jnp.full((1, 1), x)
    surrogate = partial(
        terms.clipped_surrogate, advantage=jnp.asarray([-2.0]), low=0.2, high=0.2
    )
    far, near = one(2.0), one(0.5)
    assert surrogate(far, one(0.0), dual=3.0) == 6
    assert surrogate(far, one(0.0)) == 2 * jnp.exp(2.0)
    assert surrogate(near, one(0.0), dual=3.0) == surrogate(near, one(0.0))


@pytest.mark.parametrize("estimator", [terms.kl_k1, terms.kl_k2, terms.kl_k3])
def test_kl_estimators_grow_with_the_distance(estimator):
    reference = jnp.full((1, 1), -2.0)
    near, far = (estimator(reference + d, reference)[0, 0] for d in (0.1, 1.0))
    assert 0 < near < far


def test_a_ratio_is_linear_above_exp_20(double):
    zero, limit = jnp.zeros((1, 1)), np.exp(20)
    for excess in (0.0, 1.0, 1e4):
        at = jnp.full((1, 1), 20 + excess)
        close(terms.ratio(at, zero), [[limit * (1 + excess)]])
        slope = jax.grad(lambda x: jnp.sum(terms.ratio(x, zero)))(at)
        close(slope, [[limit]])


# Token weights.


def test_equation_10_is_the_threshold_weight_at_one_half():
    credit = jnp.linspace(0, 1, 11)[None]
    where = jnp.ones_like(credit, bool)
    np.testing.assert_allclose(
        ThresholdWeights()(credit, where),
        jnp.maximum(2 * credit - 1, 0),
        atol=1e-6,
    )


def test_top_k_weights_are_one_for_a_single_token_and_for_equal_credits():
    where = jnp.asarray([[True, True, False]])
    weights = TopKWeights(ratio=0.1)(jnp.asarray([[0.2, 0.6, 0.9]]), where)
    np.testing.assert_allclose(weights, [[0, 1, 0]])
    equal = TopKWeights(ratio=1.0)(jnp.full((1, 3), 0.4), where)
    np.testing.assert_allclose(equal, [[1, 1, 0]])


def test_top_k_weights_are_scaled_from_zero_to_one():
    where = jnp.asarray([[True, True, True, True, False]])
    weights = TopKWeights(ratio=0.8)(jnp.asarray([[0.2, 0.6, 0.9, 0.5, 1.0]]), where)
    np.testing.assert_allclose(weights, [[0, 0.25, 1, 0, 0]], atol=1e-6)


def test_a_running_credit_is_of_the_mean_score_and_a_token_credit_of_one():
    where = jnp.ones((1, 3), bool)
    scores = jnp.asarray([[2.0, -2.0, 3.0]])
    expected = jax.nn.sigmoid(jnp.asarray([[2.0, 0.0, 1.0]]))
    np.testing.assert_allclose(running_credit(scores, where), expected)
    np.testing.assert_allclose(token_credit(scores, where), jax.nn.sigmoid(scores))


# The table of docs/losses.md: coefficients of a correct and an incorrect token. p is
# the pass rate, a = 2K/(K-1), c = sqrt((K-1)/K), n the selected tokens (`plus` of
# correct completions, `minus` of incorrect ones), N the completions, T the completion's
# length, w the token's weight.
COEFFICIENTS = {
    "released": lambda x: (
        -x.w * x.a * (1 - x.p) / x.plus,
        x.w * x.a * x.p / 2 / x.minus,
    ),
    "paper": lambda x: (-x.w / x.N, x.w * (1 - x.p) / 2 / x.N),
    "without_token_rewards": lambda x: (
        -x.a * (1 - x.p) / x.plus,
        x.a * x.p / 2 / x.minus,
    ),
    "reinforce": lambda x: (-1 / x.n, 1 / x.n),
    "reward_shaping": lambda x: (-x.a * (1 - x.p) / x.n, x.a * x.p / x.n),
    "behaviour_cloning": lambda x: (-1 / x.plus, x.a * x.p / 2 / x.minus),
    "token_weights": lambda x: (-x.w / x.plus, x.w * x.a * x.p / 2 / x.minus),
    "best_of_n": lambda x: (-1 / x.plus, 0 * x.n),
    "grpo": lambda x: (
        -x.c * np.sqrt((1 - x.p) / x.p) / x.N / x.T,
        x.c * np.sqrt(x.p / (1 - x.p)) / x.N / x.T,
    ),
    "dr_grpo": lambda x: (-2 * (1 - x.p) / x.N / 14_000, 2 * x.p / x.N / 14_000),
    "dapo": lambda x: (
        -x.c * np.sqrt((1 - x.p) / x.p) / x.n,
        x.c * np.sqrt(x.p / (1 - x.p)) / x.n,
    ),
    "xtuner": lambda x: (-(1 + x.a * (1 - x.p)) / x.plus, x.a * x.p / x.minus),
}


@pytest.mark.parametrize("name", presets.NAMED)
def test_coefficients_have_the_values_of_the_table_in_the_docs(name, double):
    K, correct, lengths = 8, 3, np.array([4, 6])
    rewards = np.array([1.0] * correct + [-1.0] * (K - correct))[None]
    scores = 0.7, -0.3  # equal for all tokens of a completion: both credits agree
    log_probs = jnp.asarray(np.linspace(-2, -1, 12).reshape(2, 6))
    loss = presets.NAMED[name]
    scored = Scored(
        log_probs=log_probs,
        old_log_probs=log_probs,
        reference_log_probs=log_probs,
        token_scores=jnp.asarray([[score] * 6 for score in scores]),
        entropy=jnp.zeros((2, 6)),
        completion=jnp.asarray(np.arange(6)[None] < lengths[:, None]),
        correct=jnp.asarray([True, False]),
        advantage=jnp.asarray(loss.advantage(rewards)[0, [0, -1]]),
    )
    gradient = evaluate(loss, scored)[2]
    sizes = SimpleNamespace(
        p=correct / K, a=2 * K / (K - 1), c=np.sqrt((K - 1) / K), plus=4, minus=6
    )
    sizes.n, sizes.N = 10, 2
    q = 1 / (1 + np.exp(-np.array(scores)))
    for row, weight in enumerate([2 * q[0] - 1, 1 - 2 * q[1]]):
        sizes.T, sizes.w = lengths[row], weight
        expected = COEFFICIENTS[name](sizes)[row]
        np.testing.assert_allclose(
            gradient[row, : lengths[row]], expected, rtol=1e-6, atol=1e-12
        )
