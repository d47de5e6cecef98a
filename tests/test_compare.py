"""`oreal compare`: two evaluations, problem by problem."""

import json
from pathlib import Path

import numpy as np
import pytest
from scripted import read_lines, write_lines

from oreal_jax.cli import main
from oreal_jax.errors import InputError
from oreal_jax.evaluation import compare


def items(path: Path, correct_of: dict[str, list[bool]], **change) -> Path:
    rows = [
        {
            "set": "six",
            "greedy": False,
            "id": id,
            "question": f"question {id}",
            "verdict": "correct" if each else "incorrect",
        }
        | change
        for id, of in correct_of.items()
        for each in of
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
    (found,) = json.loads(Path("c.json").read_text())
    assert (found["set"], found["measure"], found["problems"]) == ("six", "pass@1", 5)
    assert (found["better"], found["worse"], found["left_out"]) == (3, 0, 1)
    assert found["p_value"] == pytest.approx(2 * 0.5**3)
    assert found["difference"]["value"] == pytest.approx(3 / 5)
    said = capsys.readouterr().out
    assert "+60.0" in said and "0.25" in said and "1 problems" in said


def test_the_order_of_files_and_the_seed_matter(home, capsys):
    random = np.random.default_rng(0)
    for name, rate in [("a.jsonl", 0.3), ("b.jsonl", 0.6)]:
        correct = {str(i): (random.random(7) < rate).tolist() for i in range(50)}
        items(home / name, correct)
    one = compare(home / "a.jsonl", home / "b.jsonl")
    back = compare(home / "b.jsonl", home / "a.jsonl")
    assert one[0].paired.difference.value == -back[0].paired.difference.value > 0
    intervals = []
    for seed in ("1", "2"):
        words = ["compare", "a.jsonl", "b.jsonl", "--seed", seed, "--json", "c.json"]
        assert main(words) == 0
        intervals.append(json.loads(Path("c.json").read_text())[0]["difference"])
    assert intervals[0] != intervals[1]


def test_a_report_is_compared_as_well_as_its_items(home, script, oreal):
    words = ["--items", "i.jsonl", "--json", "r.json"]
    assert oreal("eval", "--data", "six.jsonl", *words) == 0
    assert compare(Path("i.jsonl"), Path("r.json"))[0].paired.problems == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"greedy": True}, "nothing in common: six (sampled) against six (greedy)"),
        ({"set": "other"}, "nothing in common: six (sampled) against other (sampled)"),
        ({"id": "z"}, "no id of set 'six' in common"),
        ({"question": "another"}, "id 'x' of set 'six' has two questions"),
        ({"greedy": "yes"}, "b.jsonl:1: field 'greedy' is 'yes', expected an item"),
        ({"verdict": None}, "b.jsonl:1: field 'verdict' is None, expected an item"),
    ],
)
def test_what_cannot_be_compared_is_named(home, capsys, change, said):
    items(home / "a.jsonl", {"x": [True, False]})
    items(home / "b.jsonl", {"x": [True, False]}, **change)
    assert main(["compare", "a.jsonl", "b.jsonl", "--json", "c.json"]) == 2
    complained = capsys.readouterr().err
    assert said in complained and complained.count("\n") == 1
    assert not Path("c.json").exists()


def test_problems_with_unequal_numbers_of_samples_are_refused(home):
    items(home / "a.jsonl", {"x": [True, False], "y": [True]})
    with pytest.raises(InputError, match="a.jsonl: problems with 1 and with 2 samples"):
        compare(home / "a.jsonl", home / "a.jsonl")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "six.jsonl", "gone.jsonl"], "six.jsonl:1: field 'set' is None"),
        (["compare", "gone.jsonl", "six.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_bad_input_to_files_is_one_line_and_leaves_nothing(home, words, said, capsys):
    assert main(words) == 2
    complained = capsys.readouterr().err
    assert said in complained and complained.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]
