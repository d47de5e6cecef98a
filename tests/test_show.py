"""`oreal show`: a run in the terminal."""

import re
from pathlib import Path

import pytest
from report_runs import (
    changed,
    completion,
)
from scripted import write_lines

from oreal_jax.cli import main


def shown(capsys, *words) -> str:
    assert main(["show", *map(str, words)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", [Path.mkdir, lambda path: path.symlink_to(path.name)]
)
def test_an_unreadable_file_is_one_line(run, damage, capsys):
    path = run / "trajectories" / "step_000009.jsonl"
    damage(path)
    assert main(["show", str(run)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"oreal: {path}: ") and errors.count("\n") == 1


def test_show_prints_incorrect_completions_of_the_last_step_first(run, capsys):
    text = shown(capsys, run, "--n", 8)
    assert "step 2: 6 incorrect, 0 undecided, 2 correct" in text
    outcomes = re.findall(r"^(correct|incorrect)  ", text, re.M)
    assert outcomes == ["incorrect"] * 6 + ["correct"] * 2
    assert "0 is not 7 (by rule)" in text and "trained on" in text


def test_show_has_a_choice_of_step_outcome_and_number(run, capsys):
    text = shown(capsys, run, "--step", 1, "--outcome", "correct", "--n", 1)
    assert "step 1:" in text and "1 more: --n 2" in text
    assert re.findall(r"^(correct|incorrect)  ", text, re.M) == ["correct"]


def test_show_prints_curves_of_chosen_metrics(run, capsys):
    write_lines(
        run / "metrics.jsonl", [{"step": i, "a": i, "b": 8 - i} for i in range(8)]
    )
    text = shown(capsys, run, "--metric", "a", "--metric", "b", "--n", 0)
    assert re.search("^a +▁▂▃▄▅▆▇█ +0 +7", text, re.M)
    assert re.search("^b +█▇▆▅▄▃▂▁ +8 +1", text, re.M)


def test_a_narrow_terminal_cuts_nothing(run, capsys, monkeypatch):
    name = "actor/kl_loss"
    rows = [{"step": i, name: 0.123 + i} for i in range(24)]
    write_lines(run / "metrics.jsonl", rows)
    monkeypatch.setenv("COLUMNS", "72")
    text = shown(capsys, run, "--metric", name, "--n", 0)
    assert re.search(rf"^{name} +[▁-█]+ +0\.123 +23\.12 ", text, re.M)
    assert {"at", "first,", "grows", "slowly"} <= {*text.split()}


def test_show_prints_warnings_and_evaluations(run, capsys):
    write_lines(
        run / "metrics.jsonl", changed(**{"token_reward/auc": lambda step: 0.5})
    )
    row = {"step": 10, "score": 0.5, "best": True, "val-core/exam/pass@1": 0.5}
    write_lines(run / "evaluations.jsonl", [row])
    text = shown(capsys, run, "--n", 0)
    assert "no better than chance" in text
    assert re.search(r"exam.*pass@1.*10.*50\.0%, best", text)


def test_show_prints_begin_and_end_of_a_long_completion(run, capsys):
    text = "a" + "x" * 800 + "m" + "y" * 1200 + "z"
    line = completion(0, 0, 0, "incorrect", 3, completion=text)
    write_lines(run / "trajectories/step_000002.jsonl", [line])
    printed = re.sub(r"\s", "", shown(capsys, run))
    assert "ax" in printed and "[3charactersomitted]" in printed
    assert "xm" not in printed and "my" not in printed and "yz" in printed


def test_control_characters_of_a_model_are_escaped(run, capsys):
    attack = "a\x1b[2Jb\x1b]0;title\x07\r\u202ec\x9b31m[bold]d[/bold]\n  e"
    line = completion(0, 0, 0, "incorrect", 3, completion=attack, question=attack)
    line |= {"reason": attack, "gold_answer": attack, "by": attack}
    write_lines(run / "trajectories/step_000002.jsonl", [line])
    text = shown(capsys, run)
    assert not set(text) & set("\x1b\x07\r\u202e\x9b")
    assert "\\x1b[2Jb" in text and "[bold]d[/bold]" in text
