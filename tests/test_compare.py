"""`oreal compare`: two evaluations, problem by problem."""

import json
from pathlib import Path

import numpy as np
import pytest
from scripted import read_lines, write_lines

from oreal_jax.cli import main
from oreal_jax.errors import InputError
from oreal_jax.evaluation import compare


def items(path: Path, correct: dict[str, list[bool]], **change) -> Path:
    rows = [
        {
            "set": "six",
            "greedy": False,
            "id": id,
            "question": f"question {id}",
            "verdict": "correct" if is_correct else "incorrect",
        }
        | change
        for id, samples in correct.items()
        for is_correct in samples
    ]
    return write_lines(path, rows)


def test_two_evaluations_are_compared_problem_by_problem(home, script, oreal, capsys):
    for k, name in [(1, "a.jsonl"), (1, "b.jsonl")]:
        assert oreal("eval", "--data", "six.jsonl", "--k", k, "--items", name) == 0
    rows = read_lines(home / "b.jsonl")
    for row in rows[1:4]:
        row["verdict"] = "correct"
    write_lines(home / "b.jsonl", rows[:5])
    assert main(["compare", "a.jsonl", "b.jsonl", "--json", "c.json"]) == 0
    (result,) = json.loads(Path("c.json").read_text())
    assert (result["set"], result["measure"], result["problems"]) == (
        "six",
        "pass@1",
        5,
    )
    assert (result["better"], result["worse"], result["left_out"]) == (3, 0, 1)
    assert result["p_value"] == pytest.approx(2 * 0.5**3)
    assert result["difference"]["value"] == pytest.approx(3 / 5)
    printed = capsys.readouterr().out
    assert "+60.0" in printed and "0.25" in printed and "1 problems" in printed


def test_the_order_of_files_sets_the_sign_and_the_seed_the_interval(home, capsys):
    random = np.random.default_rng(0)
    for name, rate in [("a.jsonl", 0.3), ("b.jsonl", 0.6)]:
        correct = {str(i): (random.random(7) < rate).tolist() for i in range(50)}
        items(home / name, correct)
    forward = compare(home / "a.jsonl", home / "b.jsonl")
    backward = compare(home / "b.jsonl", home / "a.jsonl")
    gains = [c[0].paired.difference.value for c in (forward, backward)]
    assert gains[0] == -gains[1] > 0
    intervals = []
    for seed in ("1", "2"):
        words = ["compare", "a.jsonl", "b.jsonl", "--seed", seed, "--json", "c.json"]
        assert main(words) == 0
        intervals.append(json.loads(Path("c.json").read_text())[0]["difference"])
    assert intervals[0] != intervals[1]


def test_a_report_is_compared_like_its_items(home, script, oreal):
    words = ["--items", "i.jsonl", "--json", "r.json"]
    assert oreal("eval", "--data", "six.jsonl", *words) == 0
    assert compare(Path("i.jsonl"), Path("r.json"))[0].paired.problems == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"greedy": True}, "nothing in common: six (sampled) against six (greedy)"),
        ({"set": "other"}, "nothing in common: six (sampled) against other (sampled)"),
        ({"id": "z"}, "no id of set 'six' in common"),
        ({"question": "another"}, "id 'x' of set 'six' has two questions"),
        ({"greedy": "yes"}, "b.jsonl:1: field 'greedy' is 'yes', expected an item"),
        ({"verdict": None}, "b.jsonl:1: field 'verdict' is None, expected one of"),
    ],
)
def test_incomparable_files_are_refused(home, capsys, change, message):
    items(home / "a.jsonl", {"x": [True, False]})
    items(home / "b.jsonl", {"x": [True, False]}, **change)
    assert main(["compare", "a.jsonl", "b.jsonl", "--json", "c.json"]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert not Path("c.json").exists()


@pytest.mark.parametrize(
    ("settings", "other", "greedy", "name"),
    [
        ({"max_tokens": 24}, {"max_tokens": 48}, True, "max_tokens=24 and 48"),
        ({"top_p": 0.9}, {"top_p": 1.0}, False, "top_p=0.9 and 1.0"),
        ({"system_prompt": None}, {"system_prompt": "a"}, True, "system_prompt=None"),
        ({"top_p": 0.9}, {"top_p": 1.0}, True, None),  # without effect
        ({"model": "a", "k": 1, "seed": 0}, {"model": "b", "k": 2, "seed": 1}, 0, None),
        ({"max_tokens": 24}, {}, False, None),  # of an older version
    ],
)
def test_evaluations_with_other_settings_are_refused(
    home, capsys, settings, other, greedy, name
):
    greedy = bool(greedy)
    items(home / "a.jsonl", {"x": [True]}, greedy=greedy, settings=settings)
    items(home / "b.jsonl", {"x": [True]}, greedy=greedy, settings=other)
    words = ["compare", "a.jsonl", "b.jsonl"]
    assert main(words) == (2 if name else 0)
    printed = capsys.readouterr().err
    if name:
        assert f"set 'six' was evaluated with {name}" in printed
        assert printed.count("\n") == 1
    assert main([*words, "--ignore-settings"]) == 0


def test_items_never_replace_those_of_other_settings(home, script, oreal, capsys):
    words = ["eval", "--data", "six.jsonl", "--items", "i.jsonl"]
    assert oreal(*words) == 0
    text, rows = Path("i.jsonl").read_text(), read_lines(home / "i.jsonl")
    assert rows[0]["settings"]["max_tokens"] == 512 and rows[0]["settings"]["k"] == 1
    assert oreal(*words) == 0 and Path("i.jsonl").read_text() == text  # the same again
    capsys.readouterr()
    assert oreal(*words, "--max-tokens", 99) == 2
    printed = capsys.readouterr().err
    assert "--items i.jsonl: has items with max_tokens=512, not 99; remove" in printed
    assert printed.count("\n") == 1 and Path("i.jsonl").read_text() == text
    write_lines(home / "i.jsonl", [{"question": "notes"}])
    assert oreal(*words) == 2
    assert "i.jsonl: has no items with these settings" in capsys.readouterr().err


def test_problems_with_unequal_numbers_of_samples_are_refused(home):
    items(home / "a.jsonl", {"x": [True, False], "y": [True]})
    with pytest.raises(InputError, match="a.jsonl: problems with 1 and with 2 samples"):
        compare(home / "a.jsonl", home / "a.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "six.jsonl", "gone.jsonl"], "six.jsonl:1: field 'set' is None"),
        (["compare", "gone.jsonl", "six.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_invalid_input_is_one_line_and_writes_nothing(home, words, message, capsys):
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]
