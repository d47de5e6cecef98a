"""What losses depend on, against their definitions."""

import dataclasses

import pytest

from oreal_jax.losses import (
    Grpo,
    Oreal,
    Reinforce,
    fields_read,
    has_gradient,
    presets,
    unweighted,
)

# The fields of every preset besides the policy's own log-probabilities, by its formula
# where all completions are correct with advantage 1.
READ = {
    "released": {"reference_log_probs", "token_scores"},
    "paper": {"old_log_probs", "token_scores"},
    "without_token_rewards": {"reference_log_probs"},
    "reinforce": {"reference_log_probs"},
    "reward_shaping": {"reference_log_probs"},
    "behaviour_cloning": {"reference_log_probs"},
    "token_weights": {"reference_log_probs", "token_scores"},
    "best_of_n": set(),
    "grpo": {"reference_log_probs", "old_log_probs"},
    "dr_grpo": {"old_log_probs"},
    "dapo": {"old_log_probs"},
    "xtuner": {"reference_log_probs", "old_log_probs"},
}
FIELDS = ("reference_log_probs", "old_log_probs", "token_scores")


@pytest.mark.parametrize("name", presets.NAMED)
def test_a_loss_reads_the_fields_of_its_formula(name):
    loss = presets.NAMED[name]
    assert set(fields_read(loss, *FIELDS)) == READ[name]
    assert fields_read(loss, "entropy") == []


def test_a_term_of_weight_zero_reads_nothing():
    assert fields_read(Reinforce(kl_weight=0.0), *FIELDS) == []
    assert fields_read(Grpo(kl_weight=0.0), *FIELDS) == ["old_log_probs"]
    plain = Oreal(weight_correct=unweighted, weight_incorrect=unweighted, kl_weight=0.0)
    assert fields_read(plain, *FIELDS) == []
    capped = dataclasses.replace(plain, importance_cap=1.0)
    assert fields_read(capped, *FIELDS) == ["old_log_probs"]
    assert fields_read(Reinforce(entropy_weight=0.1), "entropy") == ["entropy"]


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("name", presets.NAMED)
def test_a_loss_without_token_scores_has_a_gradient_unless_they_weigh_its_tokens(
    name, samples
):
    loss = presets.NAMED[name]
    assert has_gradient(loss, samples, token_scores=True)
    weighs = "token_scores" in READ[name]
    assert has_gradient(loss, samples, token_scores=False) != weighs


def test_an_entropy_bonus_alone_is_a_gradient():
    nothing = Reinforce(kl_weight=0.0, advantage=lambda rewards: 0 * rewards)
    assert not has_gradient(nothing, 4, token_scores=True)
    bonus = dataclasses.replace(nothing, entropy_weight=0.1)
    assert has_gradient(bonus, 4, token_scores=True)
