"""`oreal eval`, `compare` and the data verbs: a scripted model, and the tiny one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import make_tiny
import numpy as np
import pytest
from scripted import Script

from oreal_jax.checkpoints.source import open_model
from oreal_jax.cli import main
from oreal_jax.data import Chat, Prompt, load_prompts, load_tokenizer, read_examples
from oreal_jax.errors import BadInput
from oreal_jax.evaluation import PRESETS, Journal, compare, load_sets
from oreal_jax.evaluation.attempts import Attempt, Drawn, drawing, kept_beside
from oreal_jax.evaluation.published import PASS_AT_1, SETS, published
from oreal_jax.evaluation.report import report
from oreal_jax.evaluation.tables import beside_the_paper
from oreal_jax.sampling import Engine, Sampling
from oreal_jax.verify import Verdict

ALONE = os.environ | {
    "XLA_FLAGS": "",
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """The tiny model and its prompts "max A B?"."""
    home = tmp_path_factory.mktemp("start")
    make_tiny.write(home)
    return home


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with six problems of two levels."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"id": f"{a}", "question": f"max {a} 7?", "gold_answer": 7, "level": a % 2}
        for a in range(6)
    ]
    write_lines(tmp_path / "six.jsonl", rows)
    return tmp_path


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def says(a: int, sample: int) -> str:
    """What the scripted model says to "max A 7?"."""
    return "It is 7" if (a + sample) % 4 == 0 else f"It is {a}"


@pytest.fixture
def script(start, monkeypatch) -> Script:
    script = Script(start / "hf", says)
    sample = lambda engine, *given, **named: script.sample(engine, *given, **named)
    monkeypatch.setattr(Engine, "sample", sample)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # judging processes
    return script


@pytest.fixture
def oreal(start):
    """`oreal VERB ... --model tiny`."""
    return lambda *words: main([*map(str, words), "--model", str(start / "hf")])


def right(a: int, samples: int) -> list[bool]:
    return ["7" in says(a, k) for k in range(samples)]


# oreal eval


def test_one_sample_is_greedy_and_several_are_not(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl") == 0
    assert {s.temperature for _, _, s in script.asked} == {0.0}
    script.asked.clear()
    assert oreal("eval", "--data", "six.jsonl", "--k", 3, "--temperature", 0.5) == 0
    assert [(a, k) for a, k, _ in script.asked] == [
        (a, k) for a in range(6) for k in range(3)
    ]
    assert {s.temperature for _, _, s in script.asked} == {0.5}


def test_every_measure_of_k_samples_is_in_the_report(home, script, oreal, capsys):
    assert oreal("eval", "--data", "six.jsonl", "--k", 4, "--json", "r.json") == 0
    written = json.loads(Path("r.json").read_text())
    found = {name: m["value"] for name, m in written["measures"].items()}
    # One of four samples is right whatever the problem; the other three say `a`.
    assert found == {"avg@4": 0.25, "pass@2": 0.5, "pass@4": 1.0, "maj@4": 0.0}
    assert written["accuracy"] == 0.25 and written["problems"] == 6
    assert len(written["items"]) == 24 and written["samples"] == 4
    said = capsys.readouterr().out
    assert all(name in said for name in found)


def test_greedy_beside_k_adds_pass_at_1_and_comes_first(home, script, oreal):
    words = ["--data", "six.jsonl", "--k", 2, "--items", "i.jsonl", "--json", "r.json"]
    assert oreal("eval", *words, "--greedy") == 0
    written = json.loads(Path("r.json").read_text())
    assert list(written["measures"])[:2] == ["pass@1", "avg@2"]
    assert written["accuracy"] == np.mean([right(a, 1)[0] for a in range(6)])
    items = read_lines(Path("i.jsonl"))
    assert [item["greedy"] for item in items] == [True] * 6 + [False] * 12


def test_items_are_json_lines_that_say_all(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl", "--items", "i.jsonl") == 0
    items = read_lines(Path("i.jsonl"))
    assert [item["verdict"] for item in items] == [
        "right" if right(a, 1)[0] else "wrong" for a in range(6)
    ]
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
        "verdict": "wrong",
        "reason": "",
        "by": "rule",
    }


def test_a_field_breaks_the_main_measure_down(home, script, oreal, capsys):
    words = ["--data", "six.jsonl", "--k", 2, "--by", "level", "--json", "r.json"]
    assert oreal("eval", *words) == 0
    by_level = json.loads(Path("r.json").read_text())["breakdown"]["level"]
    for level in (0, 1):
        share = np.mean([right(a, 2) for a in range(6) if a % 2 == level])
        assert by_level[str(level)]["value"] == share
        assert by_level[str(level)]["problems"] == 3
    assert "six: avg@2 by level" in capsys.readouterr().out


def test_any_number_of_sets_in_one_go(home, script, oreal, capsys):
    other = [{"question": "max 4 7?", "gold_answer": "7"}]
    write_lines(home / "other.jsonl", other)
    words = ["--data", "six.jsonl", "--data", "other.jsonl", "--json", "r.json"]
    assert oreal("eval", *words) == 0
    written = json.loads(Path("r.json").read_text())
    assert set(written["sets"]) == {"six", "other"}
    assert written["sets"]["other"]["accuracy"] == 1.0 and "accuracy" not in written
    assert [item["set"] for item in written["items"]] == ["six"] * 6 + ["other"]
    said = capsys.readouterr().out
    assert "six: pass@1" in said and "other: pass@1 100.0%" in said


def test_a_preset_by_name_comes_from_the_folder(home, script, oreal, capsys):
    (home / "amc23.jsonl").write_text((home / "six.jsonl").read_text())
    assert oreal("eval", "--data", "amc23", "--folder", home) == 0
    assert "amc23: pass@1" in capsys.readouterr().out
    words = ["--evaluation", "amc23", "--folder", home, "--out", "new"]
    assert main([*map(str, ["data", "build", "--data", "six.jsonl", *words])]) == 2
    assert "no prompt is left of 6" in capsys.readouterr().err


def test_limit_takes_the_first_problems(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl", "--limit", 2) == 0
    assert [a for a, _, _ in script.asked] == [0, 1]


def test_a_seed_is_passed_on(home, script, oreal):
    assert oreal("eval", "--data", "six.jsonl", "--seed", 5) == 0
    assert set(script.seeds) == {5}


def test_a_completion_without_stop_token_is_wrong_and_counted(home, script, oreal):
    words = ["--data", "six.jsonl", "--max-tokens", 7, "--json", "r.json"]
    assert oreal("eval", *words) == 0
    written = json.loads(Path("r.json").read_text())
    assert written["truncated"] == 1.0 and written["accuracy"] == 0
    assert written["tokens_right"] is None and written["tokens_wrong"] == 7


def test_folders_of_results_are_made(home, script, oreal):
    words = ["--items", "a/b/i.jsonl", "--json", "c/d/r.json"]
    assert oreal("eval", "--data", "six.jsonl", *words) == 0
    words = ["compare", "a/b/i.jsonl", "c/d/r.json", "--json", "e/f/c.json"]
    assert main(words) == 0
    assert Path("e/f/c.json").is_file()


def test_lengths_are_told_apart_by_verdict():
    attempt = lambda tokens, outcome: Attempt(
        Prompt("a", "q", "1"), 0, Drawn("1", tokens, "stop"), Verdict(outcome, "")
    )
    group = [attempt(10, "right"), attempt(20, "right"), attempt(50, "undecided")]
    found = report([], [group])
    assert (found.tokens_right, found.tokens_wrong, found.undecided) == (15, 50, 1)


# Ctrl-C


def test_an_interrupted_evaluation_goes_on(home, script, oreal, capsys):
    words = ["eval", "--data", "six.jsonl", "--k", 2, "--greedy", "--items", "i.jsonl"]
    assert oreal(*words) == 0
    whole, calls = Path("i.jsonl").read_text(), len(script.asked)
    Path("i.jsonl").unlink()
    script.asked.clear()
    for patience in (4, 5):  # within the greedy ones, then within a group of two
        script.patience = patience
        assert oreal(*words) == 130
        assert "go on with the same command" in capsys.readouterr().err
        assert not Path("i.jsonl").exists()
    script.patience = 10**9
    assert oreal(*words) == 0
    assert "going on after 9 completions" in capsys.readouterr().err
    assert Path("i.jsonl").read_text() == whole
    assert len(script.asked) == calls == len(set(script.asked))  # none drawn twice
    assert {path.name for path in home.iterdir()} == {"six.jsonl", "i.jsonl"}


def test_without_a_file_an_interruption_says_that_nothing_is_kept(
    home, script, oreal, capsys
):
    script.patience = 2
    assert oreal("eval", "--data", "six.jsonl") == 130
    assert "nothing is kept where no file is named" in capsys.readouterr().err
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]


def test_more_samples_begin_with_those_that_are_there(home, script, oreal):
    words = ["eval", "--data", "six.jsonl", "--items", "i.jsonl", "--k"]
    script.patience = 7
    assert oreal(*words, 2) == 130
    script.patience = 10**9
    assert oreal(*words, 4) == 0
    assert len(script.asked) == 24 == len(set(script.asked))


def test_unfinished_work_of_another_kind_is_not_mixed_in(home, script, oreal, capsys):
    words = ["eval", "--data", "six.jsonl", "--items", "i.jsonl", "--seed"]
    script.patience = 2
    assert oreal(*words, 1) == 130
    left = Path("i.jsonl.unfinished").read_text()
    capsys.readouterr()
    assert oreal(*words, 2) == 2
    said = capsys.readouterr().err
    assert "i.jsonl.unfinished: the unfinished work had seed=1, now it is 2" in said
    assert Path("i.jsonl.unfinished").read_text() == left


def test_a_line_cut_by_a_kill_is_drawn_again(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"seed": 1})
    assert not path.exists()
    for sample in range(2):
        journal["", "a", sample] = Drawn("é\n", 1, "stop")
    path.write_text(path.read_text()[:-5])
    again = Journal(path, {"seed": 1})
    assert dict(again) == {("", "a", 0): Drawn("é\n", 1, "stop")}
    again["", "a", 1] = Drawn("b", 2, "length")
    assert dict(Journal(path, {"seed": 1})) == dict(again)


def test_a_file_that_is_no_journal_is_named(tmp_path):
    path = tmp_path / "i.jsonl.unfinished"
    path.write_text("[1]\n")
    with pytest.raises(BadInput, match="unfinished: not a file of unfinished work"):
        Journal(path, {})


def test_work_that_failed_keeps_what_it_has(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(BadInput), kept_beside(out, {}, print) as finished:
        finished["", "a", 0] = Drawn("b", 1, "stop")
        raise BadInput("later")
    with kept_beside(out, {}, print) as finished:
        assert len(finished) == 1
    assert not list(tmp_path.iterdir())


def test_completions_of_other_weights_or_another_system_prompt_are_others(start):
    source = open_model(start / "hf")
    chats = [Chat(load_tokenizer(source.files), prompt) for prompt in (None, "Hi")]
    prompts = [[Prompt("a", question, "1")] for question in ("q", "r")]
    seen = [
        drawing(source, chat, asked, {"top_k": top_k})
        for chat in chats
        for asked in prompts
        for top_k in (1, 2)
    ]
    assert len({json.dumps(each) for each in seen}) == 8
    weights = start / "hf" / "model.safetensors"
    weights.touch()
    assert drawing(source, chats[0], prompts[0], {"top_k": 1}) not in seen


@pytest.mark.parametrize(
    ("option", "value"), [("seed", 7), ("temperature", 0.5), ("max_tokens", 9)]
)
def test_every_option_of_drawing_tells_unfinished_work_apart(
    home, script, oreal, capsys, option, value
):
    words = ["data", "pass-rate", "--data", "six.jsonl", "--out", "m.jsonl"]
    script.patience = 2
    assert oreal(*words) == 130
    script.patience = 10**9
    assert oreal(*words, f"--{option.replace('_', '-')}", value) == 2
    assert f"the unfinished work had {option}=" in capsys.readouterr().err
    assert oreal(*words, "--rows", 8) == 0  # which changes no completion


def test_a_real_interruption_of_the_real_model(start, tmp_path):
    """SIGINT while the tiny model draws; the same command then ends as undisturbed."""
    words = ["data", "pass-rate", "--model", start / "hf", "--k", "8", "--rows", "8"]
    words += ["--data", start / "prompts.jsonl", "--max-tokens", "12", "--out"]

    def begin(*outs: str) -> subprocess.Popen:
        program = "import sys; from oreal_jax.cli import main; sys.exit(0"
        for out in outs:
            given = [*words, f"{out}.jsonl", "--completions", f"{out}.all.jsonl"]
            program += f" or main({list(map(str, given))})"
        return subprocess.Popen(
            [sys.executable, "-c", program + ")"],
            cwd=tmp_path,
            env=ALONE | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
            stdout=subprocess.PIPE,
            text=True,
        )

    process, journal = begin("stopped"), tmp_path / "stopped.jsonl.unfinished"
    while not journal.exists() or len(journal.read_text().splitlines()) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "go on with the same command" in said
    assert not (tmp_path / "stopped.jsonl").exists()
    said, _ = (process := begin("stopped", "whole")).communicate(timeout=120)
    assert process.returncode == 0 and said.count("going on after") == 1
    for name in (".jsonl", ".all.jsonl"):
        stopped, whole = (tmp_path / f"{n}{name}" for n in ("stopped", "whole"))
        assert stopped.read_text() == whole.read_text()


# Presets


def test_a_preset_is_read_from_a_local_file_of_our_fields_or_the_hubs(tmp_path):
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
def test_every_preset_is_downloaded_where_there_is_no_file(name, tmp_path, monkeypatch):
    preset, asked = PRESETS[name], []
    answer = ["7"] if name == "olympiadbench" else "7"
    row = {preset.question: "q", preset.gold_answer: answer}
    inside = {
        "aime2025-i": "aime2025-I",
        "gsm8k": "main/test-00000",
        "olympiadbench": "OE/OE_TO_maths_en_COMP",
        "livemathbench": "data/v202412_AMC_en-test",
    }.get(name, "test")
    for place in (inside, "train/other"):
        file = tmp_path / f"{place}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_lines(file, [row])

    def download(source, **options):
        asked.append((source, options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ((found, problems),) = load_sets([name], tmp_path / "data")
    assert found == name and problems[0].gold_answer == "7"
    assert len(problems) == (2 if preset.files == "*" else 1)
    patterns = [preset.files + ".parquet", preset.files + ".jsonl"]
    assert asked == [(preset.hub, patterns)]


def test_a_preset_that_is_nowhere_is_named(tmp_path, monkeypatch):
    def unreachable(name, **_):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(BadInput, match=r"preset gsm8k: no .*/gsm8k.jsonl or .parquet"):
        load_sets(["gsm8k"], tmp_path)


def test_the_papers_table_stands_beside_ours():
    assert all(len(row) == len(SETS) for row in PASS_AT_1.values())
    assert set(SETS) <= set(PRESETS)
    assert published("OREAL-7B", "math500") == 91.0
    assert published("OREAL-7B", "gsm8k") is None
    attempt = Attempt(
        Prompt("a", "q", "1"), 0, Drawn("1", 1, "stop"), Verdict("right", "")
    )
    found = report([[attempt]], [])
    table = beside_the_paper("runs/ours", {"math500": found, "mine": found})
    assert table is not None
    columns = [list(column.cells) for column in table.columns]
    assert len(columns) == 2 and columns[0][-1] == "runs/ours (pass@1)"
    assert columns[1][1] == "91.0" and columns[1][-1] == "100.0"
    assert beside_the_paper("runs/ours", {"mine": found}) is None


# oreal compare


def items(path: Path, right_of: dict[str, list[bool]], **change) -> Path:
    rows = [
        {
            "set": "six",
            "greedy": False,
            "id": id,
            "question": f"question {id}",
            "verdict": "right" if each else "wrong",
        }
        | change
        for id, of in right_of.items()
        for each in of
    ]
    return write_lines(path, rows)


def test_two_evaluations_are_compared_problem_by_problem(home, script, oreal, capsys):
    for k, name in [(1, "a.jsonl"), (1, "b.jsonl")]:
        assert oreal("eval", "--data", "six.jsonl", "--k", k, "--items", name) == 0
    rows = read_lines(home / "b.jsonl")
    for row in rows[1:4]:
        row["verdict"] = "right"
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
        right = {str(i): (random.random(7) < rate).tolist() for i in range(50)}
        items(home / name, right)
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
    with pytest.raises(BadInput, match="a.jsonl: problems with 1 and with 2 samples"):
        compare(home / "a.jsonl", home / "a.jsonl")


# oreal data


def test_the_whole_way_from_raw_rows_to_an_rft_set(home, script, oreal, capsys):
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
    assert "20 completions, 5 right, 5 of them different" in capsys.readouterr().out

    words = ["--data", "prompts", "--k", 4, "--out", "direct.jsonl"]
    assert oreal("data", "rft", *words) == 0
    assert read_examples(home / "direct.jsonl") == examples


def test_several_sources_make_one_set(home):
    write_lines(home / "more.jsonl", [{"question": "1?", "gold_answer": "1"}])
    words = ["--data", "six.jsonl", "--data", "more.jsonl", "--out", "o.jsonl"]
    assert main(["data", "build", *words]) == 0
    assert [p.id for p in load_prompts("o.jsonl")][-2:] == ["six/5", "more/0"]


def test_the_number_of_words_of_an_overlap_is_heeded(home):
    write_lines(home / "exam.jsonl", [{"question": "a b c d", "gold_answer": "1"}])
    write_lines(home / "p.jsonl", [{"question": "a b c e", "gold_answer": "1"}])
    words = ["data", "build", "--data", "p.jsonl", "--evaluation", "exam.jsonl"]
    assert main([*words, "--ngram", "3", "--out", "o.jsonl"]) == 2
    assert main([*words, "--ngram", "4", "--out", "o.jsonl"]) == 0
    assert len(load_prompts("o.jsonl")) == 1


def test_an_interrupted_pass_rate_goes_on(home, script, oreal, capsys):
    words = ["data", "pass-rate", "--data", "six.jsonl", "--k", 4, "--out", "m.jsonl"]
    script.patience = 9
    assert oreal(*words) == 130
    assert not Path("m.jsonl").exists()
    script.patience = 10**9
    assert oreal(*words) == 0
    assert len(script.asked) == 24 == len(set(script.asked))
    assert [p.labels["level"] for p in load_prompts("m.jsonl")] == [0, 1] * 3


def test_skills_are_labelled_measured_and_the_weak_ones_found(
    home, script, oreal, capsys
):
    Path("skills.txt").write_text("It is 0\nIt is 1\n")
    words = ["--skills", "skills.txt", "--out", "l.jsonl"]
    # The scripted model's answer to a problem is what it says to any request about it.
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
    assert {s for _, _, s in script.asked} == {Sampling(max_tokens=9, temperature=0.0)}
    script.asked.clear()
    words = ["--temperature", 0.5, "--top-p", 0.8, "--top-k", 3, "--min-p", 0.1]
    words += ["--max-tokens", 11, "--k", 1, "--out", "m.jsonl", "--seed", 4]
    script.seeds.clear()
    assert oreal("data", "pass-rate", "--data", "six.jsonl", *words) == 0
    assert {s for _, _, s in script.asked} == {
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
def test_slots_and_system_prompt_reach_the_engine(home, script, oreal, words):
    Path("skills.txt").write_text("a\n")
    data = ["--data", "six.jsonl", "--rows", 24, "--system-prompt", "Be brief."]
    assert oreal(*words, *data) == 0
    assert script.slots == {3}  # on each of 8 devices
    assert all("Be brief." in prompt for prompt in script.prompts)


# Bad input

EVAL = ["eval", "--data", "six.jsonl"]
RATE = ["data", "pass-rate", "--data", "six.jsonl", "--out", "new.jsonl"]
RFT = ["data", "rft", "--out", "new.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
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
        ([*RATE, "--k", "0"], "--k 0: must be at least 1"),
        ([*RATE, "--completions", "six.jsonl/c.jsonl"], "cannot be written"),
        ([*RFT, "--data", "six.jsonl", "--keep", "0"], "--keep 0: must be at least 1"),
        ([*RFT, "--data", "six.jsonl", "--k", "0"], "--k 0: must be at least 1"),
        ([*RFT, "--data", "gone.jsonl"], "gone.jsonl: no such file"),
        (["data", "label", "--data", "six.jsonl", "--skills", "gone.txt", "--out", "l"],
         "gone.txt: no such file"),
    ],
)  # fmt: skip
def test_bad_input_to_a_model_is_one_line_and_leaves_nothing(
    home, start, words, said, capsys
):
    assert main([*words, "--model", str(start / "hf")]) == 2
    complained = capsys.readouterr().err
    assert said in complained and complained.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]


BUILD = ["data", "build", "--data", "six.jsonl", "--out", "new"]
WEAK = ["data", "weak", "--data", "six.jsonl", "--out", "new.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data", "build", "--data", "gone.jsonl", "--out", "new"], "no such file"),
        ([*BUILD, "--evaluation", "gone.jsonl"], "gone.jsonl: no such file"),
        ([*BUILD, "--evaluation", "exam"], "--evaluation exam: no such file, and no"),
        ([*BUILD, "--evaluation", "six.jsonl"], "six.jsonl: no prompt is left of 6"),
        ([*BUILD, "--ngram", "0"], "--ngram 0: must be at least 1"),
        ([*BUILD, "--question", "text"], "six.jsonl:1: field 'text' is None, expected"),
        ([*BUILD, "--answer", "text"], "six.jsonl:1: field 'text' is None, expected"),
        ([*BUILD[:-1], "."], ".: exists; a data set is never written over"),
        ([*BUILD, "--removed", "six.jsonl/r.jsonl"], "r.jsonl: cannot be written"),
        (RFT, "either --completions, or --model and --data"),
        ([*RFT, "--completions", "gone.jsonl"], "gone.jsonl: no such file"),
        ([*RFT, "--completions", "six.jsonl"], "six.jsonl:1: field 'completion' is"),
        ([*RFT, "--completions", "six.jsonl", "--k", "4"], "--k with --completions"),
        ([*RFT, "--completions", "six.jsonl", "--top-p", "0.5"], "--top-p with --comp"),
        (["data", "rft", "--completions", "x", "--out", "new"], "expected a .jsonl"),
        (WEAK, "six.jsonl: no row has both a pass_rate and a field 'skills'; its"),
        ([*WEAK, "--below", "0"], "--below 0.0: must be above 0"),
        (["compare", "six.jsonl", "gone.jsonl"], "six.jsonl:1: field 'set' is None"),
        (["compare", "gone.jsonl", "six.jsonl"], "gone.jsonl: no such file"),
    ],
)
def test_bad_input_to_files_is_one_line_and_leaves_nothing(home, words, said, capsys):
    assert main(words) == 2
    complained = capsys.readouterr().err
    assert said in complained and complained.count("\n") == 1
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]
