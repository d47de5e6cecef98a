"""The fields that losses depend on, against their definitions."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import pytest

from oreal_jax.errors import InputError
from oreal_jax.losses import (
    Grpo,
    Oreal,
    Reinforce,
    fields_read,
    has_gradient,
    outcome,
    presets,
    unweighted,
)

# The fields that the formula of each preset reads in addition to `log_probs`, where all
# completions are correct with advantage 1.
FORMULA_FIELDS = {
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
    assert set(fields_read(loss, *FIELDS)) == FORMULA_FIELDS[name]
    assert fields_read(loss, "entropy") == []


def test_a_term_of_weight_zero_reads_nothing():
    assert fields_read(Reinforce(kl_weight=0.0), *FIELDS) == []
    assert fields_read(Grpo(kl_weight=0.0), *FIELDS) == ["old_log_probs"]
    plain = Oreal(weight_correct=unweighted, weight_incorrect=unweighted, kl_weight=0.0)
    assert fields_read(plain, *FIELDS) == []
    capped = dataclasses.replace(plain, importance_cap=1.0)
    assert fields_read(capped, *FIELDS) == ["old_log_probs"]
    assert fields_read(Reinforce(entropy_weight=0.1), "entropy") == ["entropy"]


@pytest.mark.parametrize("group_size", [2, 5])
@pytest.mark.parametrize("name", presets.NAMED)
def test_a_loss_with_token_weights_has_no_gradient_without_token_scores(
    name, group_size
):
    loss = presets.NAMED[name]
    assert has_gradient(loss, group_size, token_scores=True)
    weighted = "token_scores" in FORMULA_FIELDS[name]
    assert has_gradient(loss, group_size, token_scores=False) != weighted


def test_an_entropy_bonus_alone_has_a_gradient():
    zero = Reinforce(kl_weight=0.0, advantage=lambda rewards: 0 * rewards)
    assert not has_gradient(zero, 4, token_scores=True)
    bonus = dataclasses.replace(zero, entropy_weight=0.1)
    assert has_gradient(bonus, 4, token_scores=True)


@dataclasses.dataclass(frozen=True)
class Failing:
    kind: str
    advantage: Any = outcome

    def __call__(self, scored: Any, counts: Any) -> Any:
        if self.kind == "name":
            return scored.log_prob.sum(), {}
        value = scored.log_probs.sum()
        if self.kind == "metric":
            return value, {"own/rows": jnp.sum(scored.log_probs, axis=1)}
        return value


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("name", r"test_loss_probe.py, line \d+: loss=.*no attribute 'log_prob'"),
        ("metric", r"loss=.*own/rows has shape \(4,\), expected a scalar"),
        ("alone", "loss=Failing.* fails: "),
    ],
)
def test_a_loss_that_fails_is_named_with_its_line(kind, message):
    with pytest.raises(InputError, match=message):
        has_gradient(Failing(kind=kind), 4, token_scores=True)
    with pytest.raises(InputError, match=f"loss=Failing.*kind='{kind}'.* fails"):
        fields_read(Failing(kind=kind), "entropy")
