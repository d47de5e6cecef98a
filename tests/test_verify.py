"""The rule: verdicts, time, and that nothing of an answer is evaluated."""

import gc
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import verify_cases
from bench_verify import read, rewritten

from oreal_jax.errors import InputError
from oreal_jax.verify import Pool, Verdict, judge
from oreal_jax.verify.extract import answer
from oreal_jax.verify.verdict import read_outcome

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "verifier"
DEADLINE = 5.0


@pytest.fixture(scope="module")
def pool():
    with Pool(2, DEADLINE) as pool:
        yield pool


@pytest.mark.parametrize(
    "completion, gold",
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{\dfrac{1}{2}}", "0.5"),
        (r"\boxed{1{,}000}", "1000"),
        (r"\boxed{x^2+z^2+y^2+1}", "x^2+y^2+z^2+1"),  # powers side by side: no tower
        (r"<think>\boxed{8}</think> \boxed{7}", "7"),
        (r"First \boxed{5}. No: \boxed{6}", "6"),
        (r"$\boxed{1}$ and $\boxed{-2}$", "-2,1"),  # one answer, in two boxes
        ("He has 3 + 4 apples.\n#### 7", "#### 7"),
        ("The answer is $\\frac{14}{2}$.", "7"),
        ("Final Answer: The volume of the prism is 120. I hope it is correct.", "120"),
        (r"\boxed{0.0833333333333333}", r"\frac{1}{12}"),  # as a calculator prints it
    ],
)
def test_equal_answers_are_correct(completion, gold):
    assert judge(completion, gold).outcome == "correct"


@pytest.mark.parametrize(
    "completion, gold",
    [
        (r"\boxed{3}", "7"),
        (r"\boxed{100}", "1"),
        (r"\boxed{20011}", "20012"),
        (r"\boxed{1011_2}", "1011_3"),
        (r"\boxed{0.33}", "1/3"),
        (r"\boxed{1/2^{99}}", "1/2^{98}"),
        (r"\boxed{5\text{ m}}", r"5\text{ cm}"),
        (r"\boxed{1}, \boxed{2}, \boxed{3}", "3"),  # a list of candidates
        (r"\boxed{1} so \boxed{2} so \boxed{3} so \boxed{4}", "4"),
        ("The answer is $3$ or $4$.", "3"),
        (r"<think> \boxed{7}", "7"),
        (r"\boxed{7} <think> but", "7"),
        (r"\boxed{7}</think> so it is 8", "7"),
        (r"\boxed{}", "0"),
        (r"\boxed{7", "7"),
        ("", "7"),
    ],
)
def test_other_answers_are_incorrect(completion, gold):
    assert judge(completion, gold).outcome == "incorrect"


@pytest.mark.parametrize(("given", "gold"), verify_cases.RIGHT)
def test_other_spellings_are_correct(given, gold):
    assert judge(f"So $\\boxed{{{given}}}$.", gold).outcome == "correct"


@pytest.mark.parametrize(("given", "gold"), verify_cases.WRONG)
def test_known_differences_are_incorrect(given, gold):
    assert judge(f"So $\\boxed{{{given}}}$.", gold).outcome == "incorrect"


@pytest.mark.parametrize(("given", "gold"), verify_cases.NOT_RIGHT)
def test_similar_answers_are_not_correct(given, gold):
    assert judge(f"So $\\boxed{{{given}}}$.", gold).outcome != "correct"


def test_minervas_final_sentence_after_a_box_replaces_it():
    text = (
        "half is \\boxed{255}. Final Answer: The final answer is $10,455$. I hope so."
    )
    assert judge(text, "10455").outcome == "correct"
    assert judge(text, "255").outcome == "incorrect"
    assert judge("\\boxed{10} of 12. That is 83 percent.", "10").outcome == "correct"


def test_verdicts_have_readable_reasons():
    assert judge(r"\boxed{7}", "7") == Verdict("correct", "equal: 7", "rule")
    assert judge(r"\boxed{3}", "7").reason == "3 is not 7"
    assert judge("no idea", "7").reason == "no answer found"
    assert Verdict.truncated() == Verdict("incorrect", "no stop token", "truncated")


@pytest.mark.parametrize(
    ("word", "outcome"),
    [("correct", "correct"), ("incorrect", "incorrect"), ("undecided", "undecided")]
    + [("right", "correct"), ("wrong", "incorrect")],  # of older versions
)
def test_outcomes_are_read_from_files_of_this_and_older_versions(word, outcome):
    assert read_outcome("f.jsonl:1", {"verdict": word}) == outcome


@pytest.mark.parametrize("value", ["Right", "", None, 1, ["right"]])
def test_other_outcomes_in_files_are_refused(value):
    message = re.escape(
        f"f.jsonl:1: field 'verdict' is {value!r}, expected one of correct"
    )
    with pytest.raises(InputError, match=message):
        read_outcome("f.jsonl:1", {"verdict": value})


@pytest.mark.parametrize(
    "bomb",
    [
        "9^9^9^9",
        "9**9**9",
        "9^{9^{9^{9}}}",
        "(9999^{9999})^{9999}",
        "(x+y+z)^{200}",
        "100000!",
        "(100!)!",
        r"\binom{10^9}{10^8}",
        r"\sum_{k=1}^{10^9} k^k",
        "123456789012345678901234567890^Final",
        "(" * 60 + "1" + ")" * 60,
    ],
)
def test_costly_formulas_are_undecided_unread(bomb):
    start = time.process_time()
    verdict = judge(f"\\boxed{{{bomb}}}", "7")
    assert (verdict.outcome, verdict.by) == ("undecided", "rule")
    assert time.process_time() - start < 0.5


def test_formulas_without_value_are_not_simplified():
    """Found by fuzzing: its logarithm was combined to 10 to the power of the gold."""
    start = time.process_time()
    assert judge(r"\boxed{\log1la:0}", "7654321").outcome == "undecided"
    assert judge(r"\boxed{\log1la:0}", "7654321 cm").outcome == "undecided"
    assert judge(r"\boxed{\log1x∞}", "7654321").outcome == "undecided"
    assert time.process_time() - start < 0.5


LONG_TEXTS = {
    "letters": lambda n: "x" * (500_000 * n),
    "open": lambda n: r"\boxed{" * (25_000 * n),
    "boxes": lambda n: r"\boxed{1} so " * (12_500 * n),
    "nested": lambda n: r"\boxed{" + "{" * (125_000 * n) + "}" * (125_000 * n + 1),
    "think": lambda n: "<think>" * (25_000 * n),
    "phrases": lambda n: "answer is " * (25_000 * n),
    "unit": lambda n: r"\boxed{" + "5" * (100 * n) + " " + "ab " * (40 * n) + "#}",
}


def seconds_of(text: str) -> float:
    gc.freeze()  # objects of other tests are not collected in the time of this one
    start = time.process_time()
    assert answer(text) is not None and judge(text, "7").outcome != "correct"
    took = time.process_time() - start
    gc.unfreeze()
    return took


@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_time_is_linear_in_the_length(kind):
    """Four times the text takes less than eight times as long, never sixteen times."""
    texts = [LONG_TEXTS[kind](n) for n in (1, 4)]
    seconds_of(texts[0])  # imports
    short, long = (min(seconds_of(text), seconds_of(text)) for text in texts)
    assert long < 8 * max(short, 0.02)


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_long_texts_take_less_than_three_seconds(kind):
    assert seconds_of(LONG_TEXTS[kind](4)) < 3


ATTACKS = [
    "__import__('os').system('touch x')",
    "open('x','w')",
    r"\{\text{open('x','w')}, 2\}",
    r"\mathrm{exec('1')}",
    "(lambda:open('x','w'))()",
    r"x.__class__.__bases__",
    r"\sqrt[\text{open('x','w')}]{2}",
    "x>open('x','w')",
    "[open('x','w'),3]",
]
AUDIT = """
import json, re, sys
from oreal_jax.verify import judge, rule
rule.warm_up()
compiled = []
def hook(event, arguments):
    if event == "compile" and isinstance(arguments[0], (str, bytes)):
        text = arguments[0]
        compiled.append(text if isinstance(text, str) else text.decode())
    if event in ("os.system", "subprocess.Popen"):
        compiled.append(event)
sys.addaudithook(hook)
rule.dangerous = lambda text: None  # the reader itself must be safe
for attack in json.loads(sys.argv[1]):
    for gold in ("7", "x^2", "x>3", r"\\{1,2\\}", r"\\text{a}=3"):
        assert judge(f"\\\\boxed{{{attack}}}", gold).outcome != "correct"
assert judge(r"\\boxed{x^2 + 40404}", "x^2").outcome == "incorrect"
known = r"from sympy import \\*|(Integer|Float) \\(['0-9. ]+\\)|def monomial_.*"
unknown = [text for text in compiled if not re.fullmatch(known, text, re.DOTALL)]
assert not unknown, unknown
assert any("40404" in text for text in compiled), "the hook sees what is evaluated"
"""


def test_text_of_a_model_is_never_evaluated(tmp_path):
    """Nothing but number literals reaches the compiler, even with the guard off."""
    command = [sys.executable, "-c", AUDIT, json.dumps(ATTACKS)]
    run(command, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_package_imports_no_jax(tmp_path):
    code = "import sys, oreal_jax.verify.worker, oreal_jax.verify; "
    code += "assert not {'jax', 'flax', 'torch', 'numpy'} & set(sys.modules)"
    run([sys.executable, "-c", code], tmp_path)


def run(command: list[str], directory: Path) -> None:
    done = subprocess.run(
        command,
        cwd=directory,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "name, prediction, gold, share",
    [
        ("triples", "prediction_boxed", "gold_bare", 0.98),
        ("adversarial", "prediction", "gold", 0.98),
    ],
)
def test_shared_cases_are_judged_as_people_do(pool, name, prediction, gold, share):
    """The cases on which careful people agree; `contested` ones are left out."""
    if not CASES.exists():
        pytest.skip("the shared cases are not available")
    lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if not row["contested"]]
    verdicts = pool.verdicts([(row[prediction], row[gold]) for row in rows])
    correct = [verdict.outcome == "correct" for verdict in verdicts]
    expected = [row["expected"] for row in rows]
    false_correct = sum(r and not e for r, e in zip(correct, expected, strict=True))
    agreed = sum(r == e for r, e in zip(correct, expected, strict=True))
    assert agreed / len(rows) >= share
    assert false_correct == 0
    assert not [verdict for verdict in verdicts if verdict.by == "timeout"]


@pytest.mark.parametrize("name", ["math500", "olympiadbench"])
def test_rewritten_gold_answers_are_correct(pool, name):
    file = CASES.parent / "data" / f"{name}.jsonl"
    if not file.exists():
        pytest.skip("the shared problems are not available")
    cases = rewritten(row["gold_answer"] for row in read(file))
    verdicts = pool.verdicts([(completion, gold) for _, completion, gold in cases])
    correct = sum(verdict.outcome == "correct" for verdict in verdicts)
    assert len(cases) > 4000 and correct / len(cases) >= 0.995
