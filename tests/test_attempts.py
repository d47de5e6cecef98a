"""Drawing that is interrupted and goes on: nothing is lost, nothing drawn twice."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import ALONE

from oreal_jax.checkpoints.source import open_model
from oreal_jax.data import Chat, Prompt, load_tokenizer
from oreal_jax.errors import InputError
from oreal_jax.evaluation import Journal
from oreal_jax.evaluation.attempts import Drawn, drawing, kept_beside

pytestmark = pytest.mark.usefixtures("judges")


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
    with pytest.raises(InputError, match="unfinished: not a file of unfinished work"):
        Journal(path, {})


def test_work_that_failed_keeps_what_it_has(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError), kept_beside(out, {}, print) as finished:
        finished["", "a", 0] = Drawn("b", 1, "stop")
        raise InputError("later")
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


@pytest.mark.slow
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
            env=ALONE,
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
