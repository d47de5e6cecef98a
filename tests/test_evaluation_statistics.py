"""Estimators against enumeration, intervals by coverage, p-values against scipy."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from oreal_jax.evaluation.statistics import (
    bootstrap,
    majority,
    mean,
    paired,
    pass_at,
    sign_flip_p_value,
)

# pass@k


@pytest.mark.parametrize("samples", range(1, 7))
def test_pass_at_k_is_the_share_of_choices_of_k_with_a_correct_one(samples):
    for count, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        outcomes = np.arange(samples) < count
        choices = itertools.combinations(outcomes, k)
        expected = np.mean([any(choice) for choice in choices])
        assert pass_at(k, outcomes[None])[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Its mean over all outcomes of 5 samples is the chance itself."""
    rate, samples = 0.3, 5
    for k in (1, 2, 4):
        expected = sum(
            stats.binom.pmf(c, samples, rate)
            * pass_at(k, np.arange(samples)[None] < c)[0]
            for c in range(samples + 1)
        )
        assert expected == pytest.approx(1 - (1 - rate) ** k)


def test_pass_at_k_of_many_samples_does_not_overflow():
    correct = np.arange(4096)[None] < 1
    assert pass_at(2048, correct)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=rf"k={k} must be within 1\.\.3"):
        pass_at(k, np.ones((2, 3), bool))


# maj@k


@given(st.lists(st.sampled_from(["correct", "a", "b", None]), min_size=1, max_size=7))
def test_the_majority_is_counted_with_ties_broken_at_random(votes):
    counts = {vote: votes.count(vote) for vote in votes if vote is not None}
    winners = [v for v in counts if counts[v] == max(counts.values())]
    expected = np.mean([w == "correct" for w in winners]) if winners else 0.0
    is_correct = [vote == "correct" for vote in votes]
    assert majority(votes, is_correct) == pytest.approx(expected)


def test_correct_answers_share_their_votes():
    votes = ["1/2", "0.5", "2", "2"]
    assert majority(votes, [True, True, False, False]) == 0.5
    assert majority(["1/2", "0.5", "2"], [True, True, False]) == 1.0


# Intervals


def test_the_bootstrap_covers_the_truth_in_19_of_20_experiments():
    random = np.random.default_rng(0)
    rates = lambda: random.beta(0.8, 1.2, size=80)  # its mean is 0.4
    covered = []
    for seed in range(400):
        per_problem = random.binomial(8, rates()) / 8
        low, high = bootstrap(per_problem, seed)
        covered.append(low <= 0.4 <= high)
    # 0.95 of 400 within three standard errors, and the percentile method's small bias.
    assert 0.91 <= np.mean(covered) <= 0.98


def test_the_bootstrap_is_as_wide_as_the_normal_interval():
    per_problem = np.random.default_rng(1).binomial(1, 0.3, size=400).astype(float)
    low, high = bootstrap(per_problem, seed=0)
    expected = 2 * 1.96 * per_problem.std() / 20
    assert high - low == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("count", "value"), [(30, 0.0), (30, 1.0), (5, 1.0)])
def test_equal_problems_have_the_exact_binomial_interval(count, value):
    measure = mean(np.full(count, value))
    test = stats.binomtest(int(value * count), count)
    expected = test.proportion_ci(0.95, method="exact")
    assert (measure.low, measure.high) == pytest.approx(tuple(expected))


def test_the_bootstrap_depends_on_its_seed():
    per_problem = np.random.default_rng(1).random(20)
    assert bootstrap(per_problem, 1) == bootstrap(per_problem, 1)
    assert bootstrap(per_problem, 1) != bootstrap(per_problem, 2)


# The paired test


@given(st.integers(0, 30), st.integers(0, 30))
def test_one_sample_per_problem_gives_mcnemars_exact_test(better, worse):
    differences = np.array([1] * better + [-1] * worse + [0] * 5)
    expected = 1.0
    if better + worse:
        expected = stats.binomtest(better, better + worse).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(expected)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=9))
def test_the_p_value_counts_all_sign_patterns(differences):
    patterns = itertools.product([-1, 1], repeat=len(differences))
    sums = [abs(np.dot(signs, np.abs(differences))) for signs in patterns]
    expected = np.mean([total >= abs(sum(differences)) for total in sums])
    assert sign_flip_p_value(np.array(differences)) == pytest.approx(expected)


def test_the_p_value_agrees_with_scipys_permutation_test():
    random = np.random.default_rng(3)
    first, second = random.binomial(4, [[0.4], [0.6]], size=(2, 12))
    expected = stats.permutation_test(
        (second, first),
        lambda a, b: (a - b).sum(),
        permutation_type="samples",
        n_resamples=2**12,  # all of them
    )
    result = paired(first, second, (4, 4))
    assert result.p_value == pytest.approx(expected.pvalue)


def test_false_alarms_are_no_more_frequent_than_the_level():
    sizes = np.array([1, 1, 2, 3, 3, 4, 4, 4])
    patterns = itertools.product([-1, 1], repeat=len(sizes))
    p_values = np.array([sign_flip_p_value(sizes * signs) for signs in patterns])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert np.mean(p_values <= level) <= level


def test_different_numbers_of_samples_are_compared_as_shares():
    first, second = np.array([1, 0, 2]), np.array([4, 2, 3])
    pair = paired(first, second, (2, 4))
    assert pair.first == pytest.approx(np.mean([0.5, 0, 1]))
    assert pair.second == pytest.approx(np.mean([1, 0.5, 0.75]))
    assert pair.difference.value == pytest.approx(pair.second - pair.first)
    assert (pair.better, pair.worse, pair.problems) == (2, 1, 3)
    swapped = paired(second, first, (4, 2))
    assert swapped.p_value == pair.p_value
    assert (swapped.better, swapped.worse) == (1, 2)


def test_equal_models_have_no_difference():
    correct = np.array([1, 0, 1])
    pair = paired(correct, correct, (1, 1))
    assert pair.p_value == 1.0 and tuple(pair.difference) == (0, 0, 0)
