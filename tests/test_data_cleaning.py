"""Cleaning: answers, duplicates, overlaps, solutions, skills."""

import json

import huggingface_hub
import numpy as np
import pytest

from oreal_jax.data import Prompt, load_prompts, read_prompts
from oreal_jax.data.builder import (
    check_prompts_writable,
    load_all,
    write_prompts,
)
from oreal_jax.data.cleaning import (
    clean,
    normalise_answer,
    remove_duplicates,
    remove_overlaps,
    statistics,
    words,
)
from oreal_jax.data.rft import read_completions, select_solutions
from oreal_jax.data.skills import (
    add_skills,
    make_request,
    rank_skills,
    read_skills,
    select_prompts,
)
from oreal_jax.errors import InputError

# Answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("18", "18"),
        (" $\\frac{1}{2}$. ", "\\frac{1}{2}"),
        ("\\(x\\)", "x"),
        ("$$2$$", "2"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("27.0", "27"),
        ("-3.00", "-3"),
        ("2.50", "2.50"),
        ("So it is \\boxed{1}, no: $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1", "\\boxed{1"),
        ("\\boxed{2} and \\boxed{3}", "2, 3"),
        ("She makes 9 * 2 = 18.\n#### 18", "18"),
        (".", "."),
    ],
)
def test_answers_are_normalised(text, answer):
    assert normalise_answer(text) == answer
    assert normalise_answer(answer) == answer


# Duplicates and overlaps


def prompts(*rows: tuple[str, str]) -> list[Prompt]:
    return [Prompt(str(i), q, a) for i, (q, a) in enumerate(rows)]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("What is $2 + 3$?", "what is 2+3", True),
        ("What is 2 + 3?", "What is 2 * 3?", False),
        ("What is 1.5?", "What is 15?", False),
        ("What is 1.5?", "What is 1 5?", False),
        ("Find x^2.", "Find x_2.", False),
        ("What is .5 + 1?", "What is 5 + 1?", False),
        ("What is f'(3)?", "What is f(3)?", False),
        ("What is f''(3)?", "What is f'(3)?", False),
        ("What is Ann's (3) share?", "What is Anns (3) share?", False),
        ("It's 'two'", "it’s two", True),
    ],
)
def test_questions_are_compared_by_words_and_signs(first, second, same):
    assert (words(first) == words(second)) == same


def test_the_first_of_equal_questions_is_kept():
    kept, removed = remove_duplicates(prompts(("a b", "1"), ("c", "2"), ("A  b?", "1")))
    assert [p.id for p in kept] == ["0", "1"]
    assert [(r.prompt.id, r.reason, r.like) for r in removed] == [
        ("2", "duplicate", "0")
    ]


def test_equal_questions_with_different_answers_are_removed():
    kept, removed = remove_duplicates(prompts(("a", "1"), ("b", "2"), ("a", "3")))
    assert [p.id for p in kept] == ["1"]
    assert [r.prompt.id for r in removed] == ["0", "2"]
    assert {r.reason for r in removed} == {"contradictory answers"}


def overlaps(train: str, test: str, ngram: int) -> bool:
    """Compare every n-gram of one question with every n-gram of the other."""
    first, second = words(train), words(test)
    if min(len(first), len(second)) < ngram:
        return first == second
    ngrams = lambda w: [w[i : i + ngram] for i in range(len(w) - ngram + 1)]
    return any(a == b for a in ngrams(first) for b in ngrams(second))


def test_prompts_without_a_gold_answer_are_removed_with_a_reason():
    golds = ["7", "proof", "\\text{not found}", "see solution", "none", "\\boxed{8}"]
    prompts = [Prompt(gold, f"question {gold}", gold) for gold in golds]
    cleaned = clean(prompts, {})
    assert [prompt.gold_answer for prompt in cleaned.prompts] == ["7", "none", "8"]
    assert cleaned.statistics()["removed"] == {"gold answer is no answer": 3}
    assert [removal.prompt.id for removal in cleaned.removed] == golds[1:4]


def test_overlaps_equal_those_of_an_exhaustive_comparison():
    random = np.random.default_rng(0)
    text = lambda: " ".join(random.choice(list("ab"), size=random.integers(1, 9)))
    train = [Prompt(str(i), text(), "1") for i in range(60)]
    test = [Prompt(str(i), text(), "1") for i in range(3)]
    counts = set()
    for ngram in (2, 4, 6):
        kept, removed = remove_overlaps(train, {"test": test}, ngram)
        expected = [
            p
            for p in train
            if any(overlaps(p.question, t.question, ngram) for t in test)
        ]
        assert [r.prompt for r in removed] == expected
        assert kept == [p for p in train if p not in expected]
        counts.add(len(removed))
    assert len(counts) == 3  # the length matters


def test_removals_name_the_question_they_overlap_with():
    test = {"exam": [Prompt("seven", "is this the same?", "1")]}
    _, removed = remove_overlaps(prompts(("Is this the same", "1")), test, 13)
    row = removed[0].as_json()
    assert row["reason"] == "overlap with exam" and row["like"] == "exam: seven"
    assert row["question"] == "Is this the same"


def test_statistics_count_prompts_removals_and_labels():
    rows = [
        Prompt("a", "one", "$1$", 0.25, {"level": 1, "topics": ["x", "y"]}),
        Prompt("b", "seven", "2", 0.75, {"level": 2, "topics": ["x"]}),
        Prompt("c", "seven", "2"),
        Prompt("d", "test", "2"),
    ]
    cleaned = clean(rows, {"exam": [Prompt("t", "Test", "9")]})
    assert [p.gold_answer for p in cleaned.prompts] == ["1", "2"]
    assert cleaned.statistics() == {
        "read": 4,
        "removed": {"duplicate": 1, "overlap with exam": 1},
        "answers_changed": 1,
        "prompts": 2,
        "question_characters": {"least": 3, "median": 4.0, "most": 5},
        "pass_rate": {
            "measured": 2,
            "mean": 0.5,
            "by_tenths": [0, 0, 1, 0, 0, 0, 0, 1, 0, 0],
        },
        "labels": {"level": {"1": 1, "2": 1}, "topics": {"x": 2, "y": 1}},
    }
    assert statistics([]) == {"prompts": 0, "labels": {}}


# Labels, sources, writing


def test_labels_survive_a_file_and_a_data_set(tmp_path):
    labels = {"level": 2, "subject": "Ålgebra", "topics": ["x"], "hard": True}
    prompts_with_labels = [Prompt("a", "q", "1", 0.5, labels), Prompt("b", "r", "2")]
    for name in ("p.jsonl", "set"):
        write_prompts(prompts_with_labels, tmp_path / name, {"read": 3})
        assert load_prompts(str(tmp_path / name)) == prompts_with_labels
    assert json.loads((tmp_path / "set" / "metadata.json").read_text()) == {"read": 3}


def test_fields_of_other_types_are_not_labels(tmp_path):
    path = tmp_path / "p.jsonl"
    row = '{"question": "q", "gold_answer": "1", "level": 1, '
    row += '"nothing": null, "nested": {"a": 1}, "half": "\\ud800", "nan": NaN}'
    path.write_text(row + "\n")
    assert read_prompts(path)[0].labels == {"level": 1}


def test_the_fields_of_question_and_answer_can_be_named(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "q", "answer": 1, "level": 2}\n')
    assert read_prompts(path, "problem", "answer") == [
        Prompt("0", "q", "1", labels={"level": 2})
    ]
    with pytest.raises(
        InputError, match="p.jsonl:1: no field 'Answer'; its fields are"
    ):
        read_prompts(path, "problem", "Answer")


def test_ids_of_several_sources_have_prefixes(tmp_path):
    for name in ("one", "two"):
        write_prompts(prompts((name, "1")), tmp_path / f"{name}.jsonl")
    paths = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    assert [p.id for p in load_all(paths)] == ["one/0", "two/0"]
    with pytest.raises(InputError, match="one.jsonl: a second source named 'one'"):
        load_all([paths[0], paths[0]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/out.jsonl", "cannot be written"),
        ("set", "exists; a data set is never overwritten"),
        ("folder.jsonl", "a directory, expected a file"),
    ],
)
def test_unwritable_outputs_are_rejected_before_the_work(tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match=message):
        check_prompts_writable(tmp_path / name)
    check_prompts_writable(tmp_path / "new" / "folder" / "out.jsonl")
    check_prompts_writable(tmp_path / "new" / "set")
    assert not (tmp_path / "new").exists()


# Rejection sampling


def judged(id: str, completion: str, verdict: str) -> dict:
    return {
        "id": id,
        "question": f"question {id}",
        "completion": completion,
        "verdict": verdict,
    }


ROWS = [
    judged("a", "It is 2.", "correct"),
    judged("a", "it is  2", "correct"),
    judged("a", "2", "correct"),
    judged("a", "So: 2", "correct"),
    judged("a", "3", "incorrect"),
    judged("b", "4", "undecided"),
    judged("c", "5", "correct"),
]


def test_an_rft_set_has_different_correct_completions():
    rft_set = select_solutions(ROWS, limit=9)
    assert [s.solution for s in rft_set.solutions] == ["It is 2.", "2", "So: 2", "5"]
    counts = (rft_set.completions, rft_set.correct, rft_set.different)
    assert counts + (rft_set.questions, rft_set.solved) == (7, 5, 4, 3, 2)


def test_the_limit_bounds_solutions_and_the_seed_selects_them():
    draws = set()
    for seed in range(40):
        selected = select_solutions(ROWS, limit=2, seed=seed).solutions
        draws.add(tuple(s.solution for s in selected if s.id == "a"))
    assert len(draws) == 3  # every pair of three
    assert all(len(draw) == 2 for draw in draws)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"verdict": "yes"},
            "field 'verdict' is 'yes', expected one of correct, incorrect",
        ),
        ({"completion": 1}, "field 'completion' is 1, expected text"),
        ({"question": None}, "field 'question' is None, expected text"),
    ],
)
def test_rows_that_are_not_verified_completions_are_reported(tmp_path, change, message):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1] | change) + "\n")
    with pytest.raises(InputError) as caught:
        read_completions([path])
    assert f"c.jsonl:2: {message}" in str(caught.value)


# Skills


def test_completions_label_prompts_with_the_skills_they_name():
    skills = ["Carrying", "Times tables"]
    labelling = make_request(Prompt("a", "What is 8 + 5?", "13"), skills)
    assert labelling.id == "a"
    assert all(part in labelling.question for part in [*skills, "What is 8 + 5?"])
    prompt = Prompt("a", "q", "13", labels={"level": 1})
    labelled = add_skills(prompt, "It needs carrying.", skills)
    assert labelled.labels == {"level": 1, "skills": ["Carrying"]}
    assert add_skills(prompt, "?", skills).values("skills") == []
    names = ["geometry", "analytic geometry"]
    assert add_skills(prompt, "Analytic geometry.", names).values("skills") == names[1:]
    labelled = add_skills(prompt, "geometry, analytic geometry", names)
    assert labelled.values("skills") == names


def test_the_weakest_skill_comes_first():
    rows = [
        Prompt("a", "q", "1", 0.2, {"skills": ["x", "y"]}),
        Prompt("b", "q", "1", 0.6, {"skills": ["y"]}),
        Prompt("c", "q", "1", None, {"skills": ["x"]}),
    ]
    ranked = rank_skills("f", rows, "skills")
    assert [(s.name, s.prompts, s.pass_rate) for s in ranked] == [
        ("x", 1, 0.2),
        ("y", 2, 0.4),
    ]
    assert [p.id for p in select_prompts(rows, "skills", {"x"})] == ["a", "c"]
    with pytest.raises(
        InputError, match="f: no row has both a pass_rate and a field 'z'"
    ):
        rank_skills("f", rows, "z")


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n", "no skill in it"), ("a\nA\n", "skill 'A' is listed twice")],
)
def test_invalid_lists_of_skills_are_reported(tmp_path, text, message):
    path = tmp_path / "skills.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=f"skills.txt: {message}"):
        read_skills(path)


def test_a_hub_data_sets_fields_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text('{"problem": "q", "solution": "1"}\n')
    download = lambda name, **_: str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load_all(["someone/maths"], "problem", "solution") == [
        Prompt("train/0", "q", "1")
    ]
