"""Interrupted generation resumes: nothing is lost, nothing is generated twice."""

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
from oreal_jax.evaluation.completions import CompletionRecord
from oreal_jax.evaluation.generation import Journal, generation_settings, resumable

pytestmark = pytest.mark.usefixtures("judges")


def test_an_interrupted_evaluation_resumes(home, script, oreal, capsys):
    words = ["eval", "--data", "six.jsonl", "--k", 2, "--greedy", "--items", "i.jsonl"]
    assert oreal(*words) == 0
    complete, calls = Path("i.jsonl").read_text(), len(script.requests)
    Path("i.jsonl").unlink()
    script.requests.clear()
    for patience in (4, 5):  # within the greedy ones, then within a group of two
        script.patience = patience
        assert oreal(*words) == 130
        assert "resume with the same command" in capsys.readouterr().err
        assert not Path("i.jsonl").exists()
    script.patience = 10**9
    assert oreal(*words) == 0
    assert "resuming after 9 completions" in capsys.readouterr().err
    assert Path("i.jsonl").read_text() == complete
    # Each completion was generated once.
    assert len(script.requests) == calls == len(set(script.requests))
    assert {path.name for path in home.iterdir()} == {"six.jsonl", "i.jsonl"}


def test_without_output_file_nothing_is_kept_and_the_user_is_told(
    home, script, oreal, capsys
):
    script.patience = 2
    assert oreal("eval", "--data", "six.jsonl") == 130
    assert (
        "no completions are kept because no output file is named"
        in capsys.readouterr().err
    )
    assert [path.name for path in home.iterdir()] == ["six.jsonl"]


def test_more_samples_begin_with_the_recorded_ones(home, script, oreal):
    words = ["eval", "--data", "six.jsonl", "--items", "i.jsonl", "--k"]
    script.patience = 7
    assert oreal(*words, 2) == 130
    script.patience = 10**9
    assert oreal(*words, 4) == 0
    assert len(script.requests) == 24 == len(set(script.requests))


def test_a_journal_with_another_seed_is_refused(home, script, oreal, capsys):
    words = ["eval", "--data", "six.jsonl", "--items", "i.jsonl", "--seed"]
    script.patience = 2
    assert oreal(*words, 1) == 130
    journal = Path("i.jsonl.unfinished").read_text()
    capsys.readouterr()
    assert oreal(*words, 2) == 2
    message = "i.jsonl.unfinished: the unfinished work had seed=1, now it is 2"
    assert message in capsys.readouterr().err
    assert Path("i.jsonl.unfinished").read_text() == journal


def test_a_record_cut_by_a_kill_is_generated_again(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, {"seed": 1})
    assert not path.exists()
    for sample in range(2):
        journal["", "a", sample] = CompletionRecord("é\n", 1, "stop")
    path.write_text(path.read_text()[:-5])
    again = Journal(path, {"seed": 1})
    assert dict(again) == {("", "a", 0): CompletionRecord("é\n", 1, "stop")}
    again["", "a", 1] = CompletionRecord("b", 2, "length")
    assert dict(Journal(path, {"seed": 1})) == dict(again)


def test_a_file_that_is_not_a_journal_is_named(tmp_path):
    path = tmp_path / "i.jsonl.unfinished"
    path.write_text("[1]\n")
    with pytest.raises(InputError, match="unfinished: not a file of unfinished work"):
        Journal(path, {})


def test_a_journal_stays_until_the_work_succeeds(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(InputError), resumable(out, {}, print) as records:
        records["", "a", 0] = CompletionRecord("b", 1, "stop")
        raise InputError("later")
    with resumable(out, {}, print) as records:
        assert len(records) == 1
    assert not list(tmp_path.iterdir())


def test_settings_depend_on_weights_system_prompt_questions_and_options(start):
    source = open_model(start / "hf")
    chats = [Chat(load_tokenizer(source.files), prompt) for prompt in (None, "Hi")]
    prompts = [[Prompt("a", question, "1")] for question in ("q", "r")]
    settings = [
        generation_settings(source, chat, questions, {"top_k": top_k})
        for chat in chats
        for questions in prompts
        for top_k in (1, 2)
    ]
    assert len({json.dumps(each) for each in settings}) == 8
    weights = start / "hf" / "model.safetensors"
    weights.touch()
    changed = generation_settings(source, chats[0], prompts[0], {"top_k": 1})
    assert changed not in settings


@pytest.mark.parametrize(
    ("option", "value"), [("seed", 7), ("temperature", 0.5), ("max_tokens", 9)]
)
def test_a_journal_with_another_option_is_refused(
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
def test_the_tiny_model_resumes_after_a_real_interruption(start, tmp_path):
    """SIGINT during generation; the same command then ends as if uninterrupted."""
    words = ["data", "pass-rate", "--model", start / "hf", "--k", "8", "--rows", "8"]
    words += ["--data", start / "prompts.jsonl", "--max-tokens", "12", "--out"]

    def begin(*outs: str) -> subprocess.Popen:
        program = "import sys; from oreal_jax.cli import main; sys.exit(0"
        for out in outs:
            args = [*words, f"{out}.jsonl", "--completions", f"{out}.all.jsonl"]
            program += f" or main({list(map(str, args))})"
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
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "resume with the same command" in printed
    assert not (tmp_path / "stopped.jsonl").exists()
    printed, _ = (process := begin("stopped", "whole")).communicate(timeout=120)
    assert process.returncode == 0 and printed.count("resuming after") == 1
    for name in (".jsonl", ".all.jsonl"):
        stopped, expected = (tmp_path / f"{n}{name}" for n in ("stopped", "whole"))
        assert stopped.read_text() == expected.read_text()
