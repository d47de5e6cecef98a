"""The command line: output, exit codes, and messages for invalid input."""

import json
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import make_tiny
import numpy as np
import pytest
from judge_stub import honest, serving
from tiny_runs import ROOT

from oreal_jax.cli import main, verify
from oreal_jax.data.chat import Chat
from oreal_jax.sampling import Engine
from oreal_jax.verify import Pool


def test_a_run_can_be_sampled_evaluated_and_exported(
    tiny, whole, capsys, tmp_path, monkeypatch
):
    question = ["--model", str(whole), "--max-tokens", "6", "--rows", "8"]
    assert (
        main(["sample", *question, "--prompt", "max 3 4?", "--n", "2", "--json"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0]["question"] == "max 3 4?"
    data = str(tiny / "start" / "prompts.jsonl")
    report = tmp_path / "report.json"
    code = main(["eval", *question, "--data", data, "--k", "2", "--json", str(report)])
    assert code == 0
    assert "avg@2" in capsys.readouterr().out
    measured = json.loads(report.read_text())
    assert len(measured["items"]) == 200
    correct = [item["verdict"] == "correct" for item in measured["items"]]
    assert measured["accuracy"] == pytest.approx(np.mean(correct))
    assert measured["low"] <= measured["accuracy"] <= measured["high"]
    exported = str(tmp_path / "exported")
    assert main(["convert", "to-hf", str(whole), exported, "--dtype", "bfloat16"]) == 0
    words = ["sample", "--model", exported, *question[2:], "--prompt", "max"]
    capsys.readouterr()
    assert main([*words, "--n", "2"]) == 0
    plain = capsys.readouterr().out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main([*words, "--n", "2"]) == 0
    first, second = capsys.readouterr().out[len("--- 1 of 2\n") :].split("--- 2 of 2\n")
    assert first + second == plain


@pytest.mark.parametrize("on_terminal", [False, True])
def test_sample_escapes_control_characters_in_a_terminal_only(
    start, script, oreal, capsys, monkeypatch, on_terminal
):
    attack = "a\x1b]0;b\x07\u202e\nc\t\u3000"
    escaped = "a\\x1b]0;b\\x07\\u202e\nc\t\u3000"
    monkeypatch.setattr(Chat, "decode", lambda *_: attack)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: on_terminal)
    assert oreal("sample", "--prompt", "max 3 7?", "--max-tokens", 9) == 0
    assert capsys.readouterr().out == (escaped if on_terminal else attack) + "\n"
    assert oreal("sample", "--prompt", "max 3 7?", "--max-tokens", 9, "--json") == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["completion"] == attack
    assert printed.isascii() == on_terminal


def test_finished_completions_are_printed_when_sampling_is_interrupted(
    tiny, capsys, monkeypatch
):
    generate = Engine.sample

    def interrupted(*arguments, on_finished, **options):
        generate(*arguments, on_finished=on_finished, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "sample", interrupted)
    options = ["--model", str(tiny / "sft"), "--prompt", "max 3 4?"]
    options += ["--max-tokens", "6", "--n", "2", "--json", "--rows", "8"]
    assert main(["sample", *options]) == 130
    output = capsys.readouterr()
    assert len([json.loads(line) for line in output.out.splitlines()]) == 2
    assert output.err.endswith("oreal: interrupted\n")


def test_ctrl_c_in_a_destructor_interrupts_the_verb(capsys, monkeypatch):
    class Dropped:  # Python ignores exceptions of destructors
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work(_):
        Dropped()
        time.sleep(20)

    monkeypatch.setattr(verify, "verify", work)
    assert main(["verify", "--answer", "1", "--gold", "1"]) == 130
    assert capsys.readouterr().err == "oreal: interrupted\n"


def test_options_of_sampling_reach_the_sampler(tiny, capsys):
    shared = ["--model", str(tiny / "sft"), "--prompt", "max 3 4?"]
    shared += ["--max-tokens", "6", "--greedy", "--rows", "8", "--json"]

    def sample(*options: str) -> dict:
        assert main(["sample", *shared, *options]) == 0
        return json.loads(capsys.readouterr().out)

    letter = 65  # a byte of the tiny tokenizer
    always = sample("--logit-bias", f"{letter}=1e4")
    text = always["completion"]
    assert text == text[0] * 6 and always["finish_reason"] == "length"
    padded = sample("--logit-bias", "260=1e4")  # a row beyond the tokenizer
    assert padded["completion"] == sample()["completion"]
    bias = ("--logit-bias", f"{letter}=30")
    for penalty in (
        ("--repetition-penalty", "1000"),
        ("--presence-penalty", "1000"),
        ("--frequency-penalty", "1000"),
    ):
        assert sample(*bias, *penalty)["completion"].count(text[0]) == 1
    stopped = sample("--logit-bias", f"{letter}=1e4", "--stop", text[0] * 2)
    assert stopped == always | {
        "completion": "",
        "tokens": 2,
        "finish_reason": "stop",
        "log_prob": stopped["log_prob"],
    }
    special = sample("--stop", "<|im_end|>")
    assert special == sample()
    with pytest.raises(SystemExit):
        main(["sample", *shared, "--logit-bias", "x=1"])
    assert "'x=1': expected e.g. 1234=-5" in capsys.readouterr().err


def invalid_prompts(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "invalid.jsonl"
    path.write_text("\n".join(lines))
    return f"prompts={path}"


GOOD = '{"question": "a", "gold_answer": "1"}'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            lambda d: ["polcy.learning_rate=1"],
            "'polcy'; did you mean policy.learning_rate",
        ),
        (lambda d: ["policy.learning_rate=fast"], "learning_rate must be float"),
        (lambda d: ["loss=1"], "of a config file, or one of released, paper"),
        (lambda d: ["keep=1"], "which only a config file can give"),
        (
            lambda d: ["sampling.temperature=0.0"],
            "sampling.temperature=0.0: all samples of a prompt are the same",
        ),
        (lambda d: ["sampling.top_k=1"], "sampling.top_k=1: all samples of a prompt"),
        (lambda d: ["sampling.min_p=1.0"], "sampling.min_p=1.0: all samples of a"),
        (lambda d: ["steps=1"], "freeze_steps=1 must be below steps=1"),
        (
            lambda d: ["token_reward=None", "freeze_steps=0"],
            "presets that train without one: without_token_rewards, "
            "reinforce, reward_shaping, behaviour_cloning, best_of_n, grpo, dr_grpo, "
            "dapo, xtuner",
        ),
        (
            lambda d: ["loss.positive_weight=0.0", "loss.negative_weight=0.0"],
            "the gradient is zero for every token, so nothing would be learned",
        ),
        (lambda d: ["steps"], "expected name=value"),
        (lambda d: ["steps=0"], "steps=0 must be at least 1"),
        (lambda d: ["samples_per_prompt=1"], "samples_per_prompt=1 must be at least 2"),
        (lambda d: ["sampling.top_p=2.0"], "top_p=2.0 must be above 0"),
        (lambda d: ["packing.row_length=10"], "sampling.max_tokens=8 must not exceed"),
        (lambda d: ["token_reward=None"], "freeze_steps=1 without token_reward"),
        (lambda d: [invalid_prompts(d)], "invalid.jsonl: the file has no rows"),
        (
            lambda d: [invalid_prompts(d, GOOD, '{"question": "b"}')],
            "invalid.jsonl:2: no field 'gold_",
        ),
        (lambda d: [invalid_prompts(d, "no json")], "invalid.jsonl:1: not JSON"),
        (lambda d: [f"prompts={d / 'gone.jsonl'}"], "gone.jsonl: no such file"),
        (lambda d: [f"model={d / 'gone'}"], "gone: no such model directory"),
        (lambda d: ["mesh.fsdp=3"], "3 devices, there are 8"),
        (
            lambda d: ["mesh.fsdp=1", "mesh.tensor=8"],
            "heads=4 is not divisible by tensor=8",
        ),
        (lambda d: ["prompts_per_step=1000"], "1000 prompts, the data set has 100"),
        (lambda d: ["stop_words=('two words',)"], "'two words' is 9 tokens"),
        (lambda d: ["stop_strings=('',)"], "an empty one would end every completion"),
        (lambda d: ["max_disagreement=0.0"], "max_disagreement=0.0 must be above 0"),
        (
            lambda d: ["log_probs=sampled", "sampling.presence_penalty=0.1"],
            "log_probs='sampled' with a penalty",
        ),
        (lambda d: ["sampling.logit_bias=((999,1.0),)"], "no token 999, the model has"),
        (lambda d: ["max_prompt_tokens=3"], "longer than max_prompt_tokens=3"),
    ],
)
def test_invalid_input_is_reported_in_one_line_and_leaves_nothing(
    tiny, tmp_path, capsys, settings, message
):
    run = tmp_path / "run"
    data = tiny / "start" / "prompts.jsonl"
    changes = [f"model={tiny / 'sft'}", f"prompts={data}", *settings(tmp_path)]
    flags = [word for change in changes for word in ("--set", change)]
    config = str(ROOT / "configs/tiny.py")
    assert main(["train", config, *flags, "--run", str(run)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1
    assert not run.exists()


def test_a_missing_tensor_is_rejected_before_a_run_starts(tiny, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    start = tmp_path / "hf"
    make_tiny.write(tmp_path)
    values = load_file(start / "model.safetensors")
    del values["model.norm.weight"]
    save_file(values, start / "model.safetensors")
    data = tiny / "start" / "prompts.jsonl"
    flags = ["--set", f"model={start}", "--set", f"prompts={data}"]
    run = tmp_path / "run"
    config = str(ROOT / "configs/tiny.py")
    assert main(["train", config, *flags, "--run", str(run)]) == 2
    assert "missing model.norm.weight" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize(("verb", "data"), [("train", "prompts"), ("sft", "examples")])
def test_a_tokenizer_of_a_larger_model_is_rejected_before_a_run_starts(
    tmp_path, capsys, verb, data
):
    make_tiny.write(tmp_path)
    tokenizer = make_tiny.tokenizer()
    tokenizer.add_tokens([f"q{number}" for number in range(10)])
    tokenizer.save_pretrained(str(tmp_path / "hf"))
    file = tmp_path / "data.jsonl"
    row = {"question": "q9", "gold_answer": "1", "solution": "1"}
    file.write_text(json.dumps(row) + "\n")
    config = ROOT / "configs" / {"train": "tiny.py", "sft": "tiny_sft.py"}[verb]
    flags = ["--set", f"model={tmp_path / 'hf'}", "--set", f"{data}={file}"]
    run = tmp_path / "run"
    assert main([verb, str(config), *flags, "--run", str(run)]) == 2
    errors = capsys.readouterr().err
    assert f"{file}: no token 267, the model has 264" in errors
    assert not run.exists()


def test_an_unwritable_run_directory_is_named(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--set", f"model={tiny / 'sft'}"]
    flags += ["--set", f"prompts={tiny / 'start' / 'prompts.jsonl'}"]
    run = tmp_path / "file" / "run"
    config = str(ROOT / "configs/tiny.py")
    assert main(["train", config, *flags, "--run", str(run)]) == 2
    errors = capsys.readouterr().err
    assert str(run) in errors and errors.count("\n") == 1


VERIFY = ["verify", "--gold", "1", "--answer", "1"]
SAMPLE = ["sample", "--model", "gone", "--prompt", "a"]
EVAL = ["eval", "--model", "gone", "--data", "gone.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "gone.py"], "gone.py: no such config file"),
        (
            ["sft", str(ROOT / "configs/tiny.py")],
            "must be a SftConfig, found TrainConfig",
        ),
        (
            ["eval", "--model", "gone", "--data", "gone.jsonl"],
            "gone.jsonl: no such file",
        ),
        (
            ["sample", "--model", "gone", "--prompt", "a"],
            "gone: no such model directory",
        ),
        (["convert", "from-hf", "gone", "new"], "gone: no such model directory"),
        (["convert", "from-hf", "gone.gguf", "new"], "gone.gguf: no such file"),
        (["convert", "to-hf", "gone", "new"], "gone: no such model directory"),
        (["verify", "--gold", "1"], "either --gold and --answer, or --file"),
        (["verify", "--file", "gone.jsonl"], "gone.jsonl: no such file"),
        ([*VERIFY, "--workers", "0"], "--workers 0: must be at least 1"),
        ([*VERIFY, "--judge-max-tokens", "9"], "--judge-max-tokens without --judge"),
        ([*VERIFY, "--deadline", "nan"], "--deadline nan: must be above 0 and"),
        ([*VERIFY, "--deadline", "-1"], "--deadline -1.0: must be above 0 and"),
        ([*SAMPLE, "--n", "0"], "--n 0: must be at least 1"),
        ([*SAMPLE, "--greedy", "--temperature", "0.5"], "--greedy with --temperature"),
        ([*SAMPLE, "--stop", "\udcff"], "--stop '\\udcff': not valid Unicode"),
        ([*SAMPLE, "--seed", "-1"], "--seed -1: must be from 0"),
        ([*SAMPLE, "--rows", "0"], "--rows 0: must be at least 1"),
        ([*EVAL, "--temperature", "0.5"], "--temperature with --k 1"),
        ([*EVAL, "--items", "a.jsonl", "--json", "a.jsonl"], "are the same: a.jsonl"),
        (
            [*EVAL, "--items", "gone.jsonl"],
            "--items are the same: gone.jsonl",
        ),
        ([*EVAL, "--items", "a.txt"], "--items a.txt: expected a .jsonl file"),
        (["compare", "a", "b", "--json", "b"], "are the same: b"),
        (["compare", "a", "b", "--json", "/dev/null"], "a device, expected a file"),
        (["compare", "a", "b", "--seed", "-1"], "--seed -1: must be from 0"),
        (
            ["losses", "x", "--loss", "grpo", "--loss", "grpo"],
            "there is a grpo already",
        ),
    ],
)
def test_every_verb_rejects_invalid_options_and_missing_files(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_unknown_option_prints_the_usage_of_its_verb(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        main(["train", "config.py", "--setx", "steps=4"])
    errors = capsys.readouterr().err
    assert errors.startswith("usage: oreal train ") and "--set NAME=VALUE" in errors
    assert errors.endswith(
        "oreal train: error: unrecognized arguments: --setx steps=4\n"
    )


def test_the_version_is_printed(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"oreal-jax {metadata.version('oreal-jax')}\n"


def test_a_name_that_is_too_long_is_one_line(capsys):
    name = "a" * 300
    for words in (
        ["train", f"{name}.py"],
        ["eval", "--model", "m", "--data", f"{name}.jsonl"],
        ["sample", "--model", name, "--prompt", "a"],
    ):
        assert main(words) == 2
        errors = capsys.readouterr().err
        assert name in errors and errors.count("\n") == 1


def test_verify_prints_one_verdict_per_line(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    rows = [("7", "it is \\boxed{7}"), ("7", "it is \\boxed{8}"), ("7", "no idea")]
    text = [json.dumps({"gold": g, "prediction": p}) + "\n" for g, p in rows]
    file.write_text("".join(text))
    assert main(["verify", "--file", str(file), "--json", "--workers", "1"]) == 0
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [v["verdict"] for v in verdicts] == ["correct", "incorrect", "incorrect"]
    assert set(verdicts[0]) == {"verdict", "reason", "by"}


def test_finished_verdicts_are_printed_when_verify_is_interrupted(
    tmp_path, capsys, monkeypatch
):
    file = tmp_path / "answers.jsonl"
    row = json.dumps({"gold": "7", "prediction": "", "question": "3 + 4?"}) + "\n"
    file.write_text(row * 5)
    judge, calls = Pool.verdicts, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(*arguments)

    monkeypatch.setattr(verify, "BATCH", 2)
    monkeypatch.setattr(Pool, "verdicts", interrupted)
    assert main(["verify", "--file", str(file), "--workers", "1"]) == 130
    assert capsys.readouterr().out.count("incorrect: no answer found") == 4


def test_a_closed_pipe_is_not_an_error(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"gold": "7", "prediction": "8"}\n' * 3)
    program = "from oreal_jax.cli import command; command()"
    command = f"{sys.executable} -c '{program}' verify --file {file} | true"
    shell = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT
    )
    assert shell.stderr == ""


def test_answers_not_correct_by_rule_are_judged_by_the_model(capsys):
    answer = ["verify", "--gold", "7", "--answer", "it is correct: \\boxed{VII}"]
    with serving(honest) as stub:
        judge = ["--judge", stub.url, "--judge-model", "m"]
        assert main([*answer, *judge, "--question", "3 + 4?"]) == 0
        assert capsys.readouterr().out == "correct: Compared. (by judge)\n"
        assert "Problem:\n3 + 4?\n" in stub.bodies[0]["messages"][-1]["content"]
        assert main([*answer, "--question", "3 + 4?"]) == 2
        assert main([*answer, "--judge", stub.url]) == 2
    assert "no model is named" in capsys.readouterr().err
