"""`oreal eval`: measures, sets, presets; a scripted model in place of the engine."""

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from judge_stub import replies, serving
from scripted import correct, read_lines, write_lines

from oreal_jax.cli import main
from oreal_jax.data import Prompt
from oreal_jax.errors import InputError
from oreal_jax.evaluation import PRESETS, VerifiedCompletion, load_sets, report
from oreal_jax.evaluation.completions import CompletionRecord
from oreal_jax.evaluation.tables import PASS_AT_1, SETS, published_table
from oreal_jax.verify import Verdict
from oreal_jax.verify.verdict import Outcome

pytestmark = pytest.mark.usefixtures("judges")


def verified(text: str, outcome: Outcome, tokens: int = 9) -> VerifiedCompletion:
    record = CompletionRecord(text, tokens, "stop")
    return VerifiedCompletion(Prompt("a", "q", "7"), 0, record, Verdict(outcome, ""))


def test_one_sample_is_greedy_and_several_are_sampled(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl") == 0
    assert {s.temperature for _, _, s in script.requests} == {0.0}
    script.requests.clear()
    assert oreal("eval", "--data", "six.jsonl", "--k", 3, "--temperature", 0.5) == 0
    assert [(a, k) for a, k, _ in script.requests] == [
        (a, k) for a in range(6) for k in range(3)
    ]
    assert {s.temperature for _, _, s in script.requests} == {0.5}


def test_the_report_has_every_measure_of_k_samples(home, script, oreal, capsys):
    assert oreal("eval", "--data", "six.jsonl", "--k", 4, "--json", "r.json") == 0
    written = json.loads(Path("r.json").read_text())
    measures = {name: m["value"] for name, m in written["measures"].items()}
    # One of four samples of every problem is correct; the other three are `a`.
    assert measures == {"avg@4": 0.25, "pass@2": 0.5, "pass@4": 1.0, "maj@4": 0.0}
    assert written["accuracy"] == 0.25 and written["problems"] == 6
    assert len(written["items"]) == 24 and written["samples"] == 4
    printed = capsys.readouterr().out
    assert all(name in printed for name in measures)


def test_greedy_adds_pass_at_1_as_the_main_measure(home, script, oreal):
    words = ["--data", "six.jsonl", "--k", 2, "--items", "i.jsonl", "--json", "r.json"]
    assert oreal("eval", *words, "--greedy") == 0
    written = json.loads(Path("r.json").read_text())
    assert list(written["measures"])[:2] == ["pass@1", "avg@2"]
    assert written["accuracy"] == np.mean([correct(a, 1)[0] for a in range(6)])
    items = read_lines(Path("i.jsonl"))
    assert [item["greedy"] for item in items] == [True] * 6 + [False] * 12


def test_items_are_json_lines_with_all_fields(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl", "--items", "i.jsonl") == 0
    items = read_lines(Path("i.jsonl"))
    assert [item["verdict"] for item in items] == [
        "correct" if correct(a, 1)[0] else "incorrect" for a in range(6)
    ]
    settings = items[1].pop("settings")
    assert settings.items() >= {"max_tokens": 512, "seed": 0, "k": 1}.items()
    assert items[1] | {"reason": ""} == {
        "set": "six",
        "greedy": True,
        "id": "1",
        "sample": 0,
        "question": "max 1 7?",
        "gold_answer": "7",
        "completion": "It is 1",
        "tokens": 8,
        "finish_reason": "stop",
        "verdict": "incorrect",
        "reason": "",
        "by": "rule",
    }


def test_the_main_measure_is_broken_down_by_a_field(home, script, oreal, capsys):
    words = ["--data", "six.jsonl", "--k", 2, "--by", "level", "--json", "r.json"]
    assert oreal("eval", *words) == 0
    by_level = json.loads(Path("r.json").read_text())["breakdown"]["level"]
    for level in (0, 1):
        share = np.mean([correct(a, 2) for a in range(6) if a % 2 == level])
        assert by_level[str(level)]["value"] == share
        assert by_level[str(level)]["problems"] == 3
    assert "six: avg@2 by level" in capsys.readouterr().out


def test_several_sets_are_evaluated_in_one_command(home, script, oreal, capsys):
    other = [{"question": "max 4 7?", "gold_answer": "7"}]
    write_lines(home / "other.jsonl", other)
    words = ["--data", "six.jsonl", "--data", "other.jsonl", "--json", "r.json"]
    assert oreal("eval", *words) == 0
    written = json.loads(Path("r.json").read_text())
    assert set(written["sets"]) == {"six", "other"}
    assert written["sets"]["other"]["accuracy"] == 1.0 and "accuracy" not in written
    assert [item["set"] for item in written["items"]] == ["six"] * 6 + ["other"]
    printed = capsys.readouterr().out
    assert "six: pass@1" in printed and "other: pass@1 100.0%" in printed


def test_a_preset_is_read_from_the_folder(home, script, oreal, capsys):
    (home / "amc23.jsonl").write_text((home / "six.jsonl").read_text())
    assert oreal("eval", "--data", "amc23", "--folder", home) == 0
    assert "amc23: pass@1" in capsys.readouterr().out
    words = ["--evaluation", "amc23", "--folder", home, "--out", "new"]
    assert main([*map(str, ["data", "build", "--data", "six.jsonl", *words])]) == 2
    assert "no prompt is left of 6" in capsys.readouterr().err


def test_limit_takes_the_first_problems(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl", "--limit", 2) == 0
    assert [a for a, _, _ in script.requests] == [0, 1]


def test_the_seed_reaches_the_engine(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl", "--seed", 5) == 0
    assert set(script.seeds) == {5}


def test_completions_without_stop_token_are_incorrect_and_counted(home, script, oreal):
    words = ["--data", "six.jsonl", "--max-tokens", 7, "--json", "r.json"]
    assert oreal("eval", *words) == 0
    written = json.loads(Path("r.json").read_text())
    assert written["truncated"] == 1.0 and written["accuracy"] == 0
    assert written["tokens_correct"] is None and written["tokens_incorrect"] == 7


def test_a_problem_that_is_too_long_is_named_counted_and_incorrect(
    home, script, oreal, capsys
):
    long = {"id": "long", "question": "max 1 7? " + 300 * "x", "gold_answer": "7"}
    write_lines(home / "six.jsonl", [*read_lines(home / "six.jsonl"), long])
    words = ["--data", "six.jsonl", "--k", 2, "--json", "r.json"]
    assert oreal("eval", *words, "--max-tokens", 9) == 0
    printed = capsys.readouterr()
    message = "six, sampled: problem 'long' is too long for a completion: prompt of 3"
    assert printed.err.count(message) == 1
    assert "on 7 problems" in printed.out and "1 problem too long" in printed.out
    written = json.loads(Path("r.json").read_text())
    assert written["problems"] == 7 and written["too_long"] == 1
    assert written["tokens_incorrect"] == 8 and written["truncated"] == 0
    solved = sum(sum(correct(a, 2)) for a in range(6))
    assert written["accuracy"] == pytest.approx(solved / 14)
    assert [item["finish_reason"] for item in written["items"][-2:]] == ["too_long"] * 2
    words = ["--data", "six.jsonl", "--out", "m.jsonl", "--k", 2, "--max-tokens", 9]
    assert oreal("data", "pass-rate", *words) == 0
    assert "problem 'long' is too long" in capsys.readouterr().out
    assert "pass_rate" not in read_lines(home / "m.jsonl")[-1]


def test_folders_of_output_files_are_created(home, script, oreal):
    words = ["--items", "a/b/i.jsonl", "--json", "c/d/r.json"]
    assert oreal("eval", "--data", "six.jsonl", *words) == 0
    words = ["compare", "a/b/i.jsonl", "c/d/r.json", "--json", "e/f/c.json"]
    assert main(words) == 0
    assert Path("e/f/c.json").is_file()


def test_lengths_are_averaged_by_verdict():
    group = [
        verified("1", "correct", tokens=10),
        verified("1", "correct", tokens=20),
        verified("1", "undecided", tokens=50),
    ]
    result = report([], [group])
    assert (result.tokens_correct, result.tokens_incorrect) == (15, 50)
    assert result.undecided == 1


def test_incorrect_answers_with_one_value_share_their_votes():
    group = [
        verified("\\boxed{0.5}", "incorrect"),
        verified("\\boxed{\\frac12}", "incorrect"),
        verified("7", "correct"),
    ]
    assert report([], [group]).measures["maj@3"].value == 0


def test_the_judge_decides_what_the_rule_does_not_call_correct(home, script, oreal):
    words = ["--data", "six.jsonl", "--k", 4, "--items", "i.jsonl"]
    with serving(replies("VERDICT: RIGHT")) as stub:
        named = ["--judge", stub.url, "--judge-model", "m"]
        assert oreal("eval", *words, *named) == 0
    items = read_lines(Path("i.jsonl"))
    assert {item["verdict"] for item in items} == {"correct"}
    assert [item["by"] for item in items].count("judge") == 18 == stub.requests
    requests = [body["messages"][-1]["content"] for body in stub.bodies]
    assert all(any(item["question"] in text for text in requests) for item in items)


def test_judge_options_are_checked_before_generation(home, script, oreal, capsys):
    assert oreal("eval", "--data", "six.jsonl", "--judge-model", "m") == 2
    assert "--judge-model without --judge" in capsys.readouterr().err
    judge = ["--judge", "nowhere", "--judge-model", "m"]
    assert oreal("eval", "--data", "six.jsonl", *judge) == 2
    assert not script.requests


def test_a_local_preset_has_our_fields_or_those_of_the_hub(tmp_path):
    ours = {"question": "q", "gold_answer": "1", "level": 3}
    write_lines(tmp_path / "math500.jsonl", [ours])
    write_lines(tmp_path / "amc23.jsonl", [{"question": "q", "answer": 27.0}])
    theirs = {"question": "q", "final_answer": ["1", "2"], "subject": "x"}
    write_lines(tmp_path / "olympiadbench.jsonl", [theirs])
    solution = {"question": "q", "answer": "9 * 2 = 18\n#### 18"}
    write_lines(tmp_path / "gsm8k.jsonl", [solution])
    names = ["math500", "amc23", "olympiadbench", "gsm8k"]
    sets = dict(load_sets(names, tmp_path))
    golds = {name: sets[name][0].gold_answer for name in names}
    assert golds == dict(zip(names, ["1", "27", "1, 2", "18"], strict=True))
    assert sets["math500"][0].labels == {"level": 3}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_without_local_file_are_downloaded(name, tmp_path, monkeypatch):
    preset, requests = PRESETS[name], []
    answer = ["7"] if name == "olympiadbench" else "7"
    row = {preset.question: "q", preset.gold_answer: answer}
    inside = {
        "aime2025-i": "aime2025-I",
        "aime2024": "data/train-00000",
        "aime2025": "aime2025-II",
        "gsm8k": "main/test-00000",
        "olympiadbench": "OE/OE_TO_maths_en_COMP",
        "livemathbench": "data/v202412_AMC_en-test",
    }.get(name, "test")
    for place in (inside, "train/other"):  # of another split
        file = tmp_path / f"{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, [row])

    def download(source, **options):
        requests.append((source, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ((set_name, problems),) = load_sets([name], tmp_path / "data")
    assert set_name == name and problems[0].gold_answer == "7"
    assert len(problems) == 1
    patterns = [preset.files + ".parquet", preset.files + ".jsonl"]
    assert requests == [(preset.hub, patterns)]


def test_an_unavailable_preset_is_named(tmp_path, monkeypatch):
    def unreachable(name, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(
        InputError, match=r"preset gsm8k: no .*/gsm8k.jsonl or .parquet"
    ):
        load_sets(["gsm8k"], tmp_path)


def test_the_table_has_the_published_results_and_ours():
    assert all(len(row) == len(SETS) for row in PASS_AT_1.values())
    assert set(SETS) <= set(PRESETS)
    result = report([[verified("7", "correct")]], [])
    table = published_table("runs/ours", {"math500": result, "mine": result})
    columns = [list(column.cells) for column in table.columns]
    assert len(columns) == 2 and columns[0][-1] == "runs/ours (pass@1)"
    assert columns[1][1] == "91.0" and columns[1][-1] == "100.0"


EVAL = ["eval", "--data", "six.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EVAL, "--k", "0"], "--k 0: must be at least 1"),
        ([*EVAL, "--limit", "0"], "--limit 0: must be at least 1"),
        ([*EVAL, "--greedy"], "--greedy with --k 1: one sample is greedy already"),
        ([*EVAL, "--by", "topic"], "--by topic: no row of six has that field; their"),
        ([*EVAL, "--data", "./six.jsonl"], "a second set named 'six'"),
        ([*EVAL, "--items", "six.jsonl/i.jsonl"], "i.jsonl: cannot be written"),
        ([*EVAL, "--json", "six.jsonl/r.json"], "r.json: cannot be written"),
        ([*EVAL, "--json", "."], ".: a directory, expected a file"),
        ([*EVAL, "--max-tokens", "0"], "max_tokens=0 must be at least 1"),
        ([*EVAL, "--max-tokens", "300"], "must lie within 1..256"),
        (["eval", "--data", "math5000"], "no preset; those are math500, aime2024"),
        (["eval", "--data", "gone.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_invalid_input_is_one_line_and_writes_nothing(
    home, start, words, message, capsys
):
    assert main([*words, "--model", str(start / "hf")]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]
