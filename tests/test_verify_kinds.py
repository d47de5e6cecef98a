"""Verdicts on the kinds of answers that users of verifiers report as misjudged."""

import json
from pathlib import Path

import pytest
import verify_kinds

from oreal_jax.verify import judge
from oreal_jax.verify.extract import has_answer

FILE = Path(__file__).parents[2] / "shared" / "verifier" / "field_answers.jsonl"
OUTCOMES = {
    "right": ("correct",),
    "not right": ("incorrect", "undecided"),
    "not wrong": ("correct", "undecided"),
}


def check(cases, expected: str) -> None:
    """Fail with all cases that are not judged as expected."""
    verdicts = [(*case, judge(*case)) for case in cases]
    assert not [v for v in verdicts if v[2].outcome not in OUTCOMES[expected]]


@pytest.mark.parametrize("kind", verify_kinds.CORRECT)
def test_equal_answers_of_this_kind_are_correct(kind):
    check(verify_kinds.CORRECT[kind], "right")


@pytest.mark.parametrize("kind", verify_kinds.NOT_CORRECT)
def test_other_answers_of_this_kind_are_not_correct(kind):
    check(verify_kinds.NOT_CORRECT[kind], "not right")


@pytest.mark.parametrize("kind", verify_kinds.NOT_INCORRECT)
def test_possibly_equal_answers_of_this_kind_are_not_incorrect(kind):
    check(verify_kinds.NOT_INCORRECT[kind], "not wrong")


@pytest.mark.parametrize(
    "text",
    ["Hence it is not 12", "It takes 12 minutes (see step 4)", "probability 1 in 6"],
)
def test_a_text_whose_answer_is_unclear_is_undecided(text):
    verdict = judge(text, "12")
    assert (verdict.outcome, verdict.reason) == ("undecided", "no answer found")


@pytest.mark.parametrize(
    "gold",
    ["no solution", "none", "A", "x", "undefined", "是", "π", "-1", "Q", "no"]
    + ["cannot be determined", "does not exist", "\\emptyset", "all real numbers"],
)
def test_short_gold_answers_are_answers(gold):
    assert has_answer(gold)


@pytest.mark.skipif(not FILE.exists(), reason="the shared cases are not available")
def test_reported_cases_are_judged_as_expected():
    rows = list(map(json.loads, FILE.read_text(encoding="utf-8").splitlines()))
    for expected in OUTCOMES:
        chosen = [row for row in rows if row["expected"] == expected]
        check([(row["prediction"], row["gold"]) for row in chosen], expected)
