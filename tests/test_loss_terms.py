"""What losses are made of: advantages, aggregation, terms, token weights."""

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


def groups(K: int, rights: list[int]) -> np.ndarray:
    """Rewards of K samples a prompt, of which so many are correct, in any order."""
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
        for advantage, (correct, incorrect) in table.items():
            expected = np.where(rewards > 0, correct, incorrect)
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
    correct = jnp.asarray([True, True, False, False])
    whole = Counts.of(where, correct)
    assert whole == Counts(Count(3, 1), Count(6, 2), Count(9, 3))  # pyright: ignore
    split = Counts.of(where.reshape(2, 2, T), correct.reshape(2, 2))
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


def test_best_of_n_cloning_is_oreal_on_right_completions_without_its_kl(double):
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
def test_a_ratio_beyond_its_bound_has_no_gradient_and_within_it_has(loss):
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


# The table of docs/losses.md: (correct, incorrect) from the pass rate p, a = 2K/(K-1),
# c, n kept tokens (`correct` of correct ones, m of incorrect ones), N completions, the
# completion's length T and the token's weight w.
COEFFICIENTS = {
    "released": lambda x: (
        -x.w * x.a * (1 - x.p) / x.correct,
        x.w * x.a * x.p / 2 / x.m,
    ),
    "paper": lambda x: (-x.w / x.N, x.w * (1 - x.p) / 2 / x.N),
    "without_token_rewards": lambda x: (
        -x.a * (1 - x.p) / x.correct,
        x.a * x.p / 2 / x.m,
    ),
    "reinforce": lambda x: (-1 / x.n, 1 / x.n),
    "reward_shaping": lambda x: (-x.a * (1 - x.p) / x.n, x.a * x.p / x.n),
    "behaviour_cloning": lambda x: (-1 / x.correct, x.a * x.p / 2 / x.m),
    "token_weights": lambda x: (-x.w / x.correct, x.w * x.a * x.p / 2 / x.m),
    "best_of_n": lambda x: (-1 / x.correct, 0 * x.n),
    "grpo": lambda x: (
        -x.c * np.sqrt((1 - x.p) / x.p) / x.N / x.T,
        x.c * np.sqrt(x.p / (1 - x.p)) / x.N / x.T,
    ),
    "dr_grpo": lambda x: (-2 * (1 - x.p) / x.N / 14_000, 2 * x.p / x.N / 14_000),
    "dapo": lambda x: (
        -x.c * np.sqrt((1 - x.p) / x.p) / x.n,
        x.c * np.sqrt(x.p / (1 - x.p)) / x.n,
    ),
    "xtuner": lambda x: (-(1 + x.a * (1 - x.p)) / x.correct, x.a * x.p / x.m),
}


@pytest.mark.parametrize("name", presets.NAMED)
def test_the_table_of_the_docs_holds(name, double):
    K, correct, lengths = 8, 3, np.array([4, 6])
    rewards = np.array([1.0] * correct + [-1.0] * (K - correct))[None]
    inside = np.arange(6)[None] < lengths[:, None]
    score = {
        "correct": 0.7,
        "incorrect": -0.3,
    }  # the same at all tokens: both credits agree
    log_probs = jnp.asarray(np.linspace(-2, -1, 12).reshape(2, 6))
    loss = presets.NAMED[name]
    advantages = loss.advantage(rewards)[0]
    scored = Scored(
        log_probs=log_probs,
        old_log_probs=log_probs,
        reference_log_probs=log_probs,
        token_scores=jnp.asarray([[score["correct"]] * 6, [score["incorrect"]] * 6]),
        entropy=jnp.zeros((2, 6)),
        completion=jnp.asarray(inside),
        correct=jnp.asarray([True, False]),
        advantage=jnp.asarray([advantages[0], advantages[-1]]),
    )
    counts = Counts.of(scored.completion, scored.correct)
    total = lambda x: loss(scored._replace(log_probs=x), counts)[0]
    found = jax.grad(total)(log_probs)
    values = SimpleNamespace(
        p=correct / K,
        a=2 * K / (K - 1),
        c=np.sqrt((K - 1) / K),
        correct=4,
        m=6,
        n=10,
        N=2,
    )
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    for row, (kind, weight) in enumerate(
        [
            ("correct", 2 * sigmoid(score["correct"]) - 1),
            ("incorrect", 1 - 2 * sigmoid(score["incorrect"])),
        ]
    ):
        values.T, values.w = lengths[row], weight
        expected = COEFFICIENTS[name](values)[("correct", "incorrect").index(kind)]
        np.testing.assert_allclose(
            found[row, : lengths[row]], expected, rtol=1e-6, atol=1e-12
        )
