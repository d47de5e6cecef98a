"""`oreal data`: from raw rows to pass rates, an RFT set and weak skills."""

import json
from pathlib import Path

import make_tiny
import pytest
from scripted import read_lines, write_lines

from oreal_jax.cli import main
from oreal_jax.data import load_prompts, read_examples
from oreal_jax.sampling import Sampling

pytestmark = pytest.mark.usefixtures("judges")


def test_raw_rows_become_an_rft_set(home, script, oreal, capsys):
    raw = [{"problem": f"max {a} 7?", "answer": "\\boxed{7}"} for a in range(6)]
    write_lines(home / "raw.jsonl", [*raw, raw[0]])
    exam = [{"question": "max 5 7", "gold_answer": "7"}]
    write_lines(home / "exam.jsonl", exam)
    words = ["--question", "problem", "--answer", "answer", "--out", "prompts"]
    words += ["--evaluation", "exam.jsonl", "--removed", "removed.jsonl"]
    assert main(["data", "build", "--data", "raw.jsonl", *words]) == 0
    assert len(load_prompts("prompts")) == 5
    reasons = [row["reason"] for row in read_lines(home / "removed.jsonl")]
    assert reasons == ["duplicate", "overlap with exam"]
    metadata = json.loads(Path("prompts/metadata.json").read_text())
    assert metadata["read"] == 7 and metadata["prompts"] == 5

    words = ["--data", "prompts", "--k", 4, "--out", "measured.jsonl"]
    assert oreal("data", "pass-rate", *words, "--completions", "c.jsonl") == 0
    assert {p.pass_rate for p in load_prompts("measured.jsonl")} == {0.25}
    assert len(read_lines(home / "c.jsonl")) == 20

    words = ["--completions", "c.jsonl", "--out", "solutions.jsonl", "--keep", "1"]
    assert main(["data", "rft", *words]) == 0
    examples = read_examples(home / "solutions.jsonl")  # as `oreal sft` does
    assert [example.solution for example in examples] == ["It is 7"] * 5
    assert "20 completions, 5 correct, 5 of them different" in capsys.readouterr().out

    words = ["--data", "prompts", "--k", 4, "--out", "direct.jsonl"]
    assert oreal("data", "rft", *words) == 0
    assert read_examples(home / "direct.jsonl") == examples


def test_several_sources_make_one_set(home):
    write_lines(home / "more.jsonl", [{"question": "1?", "gold_answer": "1"}])
    words = ["--data", "six.jsonl", "--data", "more.jsonl", "--out", "o.jsonl"]
    assert main(["data", "build", *words]) == 0
    assert [p.id for p in load_prompts("o.jsonl")][-2:] == ["six/5", "more/0"]


def test_ngram_sets_the_words_of_an_overlap(home):
    write_lines(home / "exam.jsonl", [{"question": "a b c d", "gold_answer": "1"}])
    write_lines(home / "p.jsonl", [{"question": "a b c e", "gold_answer": "1"}])
    words = ["data", "build", "--data", "p.jsonl", "--evaluation", "exam.jsonl"]
    assert main([*words, "--ngram", "3", "--out", "o.jsonl"]) == 2
    assert main([*words, "--ngram", "4", "--out", "o.jsonl"]) == 0
    assert len(load_prompts("o.jsonl")) == 1


def test_an_interrupted_pass_rate_resumes(home, script, oreal, capsys):
    words = ["data", "pass-rate", "--data", "six.jsonl", "--k", 4, "--out", "m.jsonl"]
    script.patience = 9
    assert oreal(*words) == 130
    assert not Path("m.jsonl").exists()
    script.patience = 10**9
    assert oreal(*words) == 0
    assert len(script.requests) == 24 == len(set(script.requests))
    assert [p.labels["level"] for p in load_prompts("m.jsonl")] == [0, 1] * 3


def test_skills_are_labelled_measured_and_the_weak_ones_found(
    home, script, oreal, capsys
):
    Path("skills.txt").write_text("It is 0\nIt is 1\n")
    words = ["--skills", "skills.txt", "--out", "l.jsonl"]
    # The scripted model's answer to a problem is its answer to any request about it.
    assert oreal("data", "label", "--data", "six.jsonl", *words) == 0
    assert "6 prompts, 5 without any of the 2 skills" in capsys.readouterr().out
    assert load_prompts("l.jsonl")[1].values("skills") == ["It is 1"]
    rates = [0.0, 0.5, 0.1, 0.6, 0.2, 0.7]
    rows = [
        row | {"pass_rate": r}
        for row, r in zip(read_lines(home / "six.jsonl"), rates, strict=True)
    ]
    write_lines(home / "m.jsonl", rows)
    words = ["data", "weak", "--data", "m.jsonl", "--by", "level"]
    assert main([*words, "--below", "0.3", "--out", "w.jsonl"]) == 0
    assert [p.id for p in load_prompts("w.jsonl")] == ["0", "2", "4"]
    assert "weak" in capsys.readouterr().out
    assert main([*words, "--below", "0.7", "--out", "all.jsonl"]) == 0
    assert len(load_prompts("all.jsonl")) == 6
    pool = ["--below", "0.3", "--pool", "more.jsonl", "--out", "more-weak.jsonl"]
    more = [{"question": f"q{i}", "gold_answer": "1", "level": i % 2} for i in range(4)]
    write_lines(home / "more.jsonl", more)
    assert main([*words, *pool]) == 0
    assert [p.question for p in load_prompts("more-weak.jsonl")] == ["q0", "q2"]


def test_label_and_sampling_options_reach_the_engine(home, script, oreal):
    Path("skills.txt").write_text("a\n")
    words = ["--skills", "skills.txt", "--out", "l.jsonl", "--max-tokens", 9]
    assert oreal("data", "label", "--data", "six.jsonl", *words) == 0
    greedy = Sampling(max_tokens=9, temperature=0.0)
    assert {s for _, _, s in script.requests} == {greedy}
    script.requests.clear()
    words = ["--temperature", 0.5, "--top-p", 0.8, "--top-k", 3, "--min-p", 0.1]
    words += ["--max-tokens", 11, "--k", 1, "--out", "m.jsonl", "--seed", 4]
    script.seeds.clear()
    assert oreal("data", "pass-rate", "--data", "six.jsonl", *words) == 0
    assert {s for _, _, s in script.requests} == {
        Sampling(max_tokens=11, temperature=0.5, top_p=0.8, top_k=3, min_p=0.1)
    }
    assert set(script.seeds) == {4}


@pytest.mark.parametrize(
    "words",
    [
        ["eval"],
        ["data", "pass-rate", "--k", "1", "--out", "m.jsonl"],
        ["data", "rft", "--k", "8", "--out", "m.jsonl"],
        ["data", "label", "--skills", "skills.txt", "--out", "m.jsonl"],
    ],
)
def test_slots_and_prompt_options_reach_the_engine(home, script, oreal, words):
    Path("skills.txt").write_text("a\n")
    text = "{{ 'Be quick.' if not thinking }}{{ n + 1 }}" + make_tiny.TEMPLATE
    Path("own.jinja").write_text(text)
    data = ["--data", "six.jsonl", "--rows", 24, "--system-prompt", "Be brief."]
    data += ["--chat-template", "own.jinja", "--template-var", "n=3"]
    assert oreal(*words, *data, "--template-var", "thinking=False") == 0
    assert script.slots == {3}  # on each of 8 devices
    for prompt in script.prompts:
        assert prompt.startswith("Be quick.4") and "Be brief." in prompt


RATE = ["data", "pass-rate", "--data", "six.jsonl", "--out", "new.jsonl"]
RFT = ["data", "rft", "--out", "new.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*RATE, "--k", "0"], "--k 0: must be at least 1"),
        ([*RATE, "--completions", "six.jsonl/c.jsonl"], "cannot be written"),
        ([*RFT, "--data", "six.jsonl", "--keep", "0"], "--keep 0: must be at least 1"),
        ([*RFT, "--data", "six.jsonl", "--k", "0"], "--k 0: must be at least 1"),
        ([*RFT, "--data", "gone.jsonl"], "gone.jsonl: no such file"),
        ([*RATE, "--chat-template", "gone.jinja"], "gone.jinja: no such file"),
        ([*RATE, "--template-var", "n=3"], "the chat template has no variable 'n'"),
        (["data", "label", "--data", "six.jsonl", "--skills", "gone.txt", "--out", "l"],
         "gone.txt: no such file"),
    ],
)  # fmt: skip
def test_invalid_generation_input_is_one_line_and_writes_nothing(
    home, start, words, message, capsys
):
    assert main([*words, "--model", str(start / "hf")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]


BUILD = ["data", "build", "--data", "six.jsonl", "--out", "new"]
PASS_RATE = ["data", "pass-rate", "--model", "m", "--data", "six.jsonl"]
PASS_RATE += ["--out", "new.jsonl"]
WEAK = ["data", "weak", "--data", "six.jsonl", "--out", "new.jsonl"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "build", "--data", "gone.jsonl", "--out", "new"], "no such file"),
        ([*BUILD, "--evaluation", "gone.jsonl"], "gone.jsonl: no such file"),
        ([*BUILD, "--evaluation", "exam"], "--evaluation exam: no such file, and no"),
        ([*BUILD, "--evaluation", "six.jsonl"], "six.jsonl: no prompt is left of 6"),
        ([*BUILD, "--ngram", "0"], "--ngram 0: must be at least 1"),
        (
            [*BUILD, "--question", "text"],
            "six.jsonl:1: no field 'text'; its fields are",
        ),
        ([*BUILD, "--answer", "text"], "six.jsonl:1: no field 'text'; its fields are"),
        ([*BUILD[:-1], "."], ".: exists; a data set is never overwritten"),
        ([*BUILD, "--removed", "six.jsonl/r.jsonl"], "r.jsonl: cannot be written"),
        ([*BUILD, "--removed", "new"], "--out and --removed are the same: new"),
        ([*BUILD[:-1], "six.jsonl"], "--data and --out are the same: six.jsonl"),
        ([*BUILD[:-1], "b.json"], "b.json: expected a .jsonl file or the name of"),
        ([*RFT, "--completions", "six.jsonl", "--seed", "-1"], "--seed -1: must be"),
        (
            [*PASS_RATE, "--completions", "c.txt"],
            "--completions c.txt: expected a .jsonl file",
        ),
        ([*PASS_RATE, "--completions", "new.jsonl"], "are the same: new.jsonl"),
        (RFT, "either --completions, or --model and --data"),
        ([*RFT, "--completions", "gone.jsonl"], "gone.jsonl: no such file"),
        ([*RFT, "--completions", "six.jsonl"], "six.jsonl:1: field 'completion' is"),
        ([*RFT, "--completions", "six.jsonl", "--k", "4"], "--k with --completions"),
        ([*RFT, "--completions", "six.jsonl", "--top-p", "0.5"], "--top-p with --comp"),
        ([*RFT, "--completions", "a", "--template-var", "n=3"], "--template-var with"),
        (["data", "rft", "--completions", "x", "--out", "new"], "expected a .jsonl"),
        (WEAK, "six.jsonl: no row has both a pass_rate and a field 'skills'; its"),
        ([*WEAK, "--below", "0"], "--below 0.0: must be above 0"),
    ],
)
def test_invalid_files_are_one_line_and_write_nothing(home, words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]
