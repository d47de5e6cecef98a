"""Whole runs of the tiny model through the command line: SFT, OREAL, stop, go on."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import make_tiny
import numpy as np
import orbax.checkpoint as ocp
import pytest
from judge_stub import honest, says, serving

from oreal_jax import laboratory, losses, metrics, sharding
from oreal_jax.checkpoints.source import open_model
from oreal_jax.cli import main
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.laboratory.recorded import LISTS
from oreal_jax.sampling import Engine

ROOT = Path(__file__).parents[1]
ALONE = os.environ | {
    "XLA_FLAGS": "",
    "PYTHONPATH": str(ROOT),
    "JAX_COMPILATION_CACHE_DIR": "",
}


def oreal(*arguments, **options) -> subprocess.Popen:
    """`oreal` in a process of its own, with one device."""
    command = [sys.executable, "-c", "import sys; from oreal_jax.cli import main; "]
    command[-1] += "sys.exit(main())"
    return subprocess.Popen(
        [*command, *map(str, arguments)],
        env=ALONE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    said, complained = process.communicate(timeout=300)
    assert process.returncode == 0, said + complained
    return said


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with the tiny model, its prompts, and a fine-tuned run of it."""
    home = tmp_path_factory.mktemp("tiny")
    make_tiny.write(home / "start")
    said = finish(
        oreal(
            "sft",
            ROOT / "configs/tiny_sft.py",
            *("--set", f"model={home / 'start' / 'hf'}"),
            *("--set", f"examples={home / 'start' / 'solutions.jsonl'}"),
            *("--run", home / "sft"),
        )
    )
    assert "step 60/60" in said
    return home


def train(
    tiny: Path, run: Path, *settings: str, config: Path = ROOT / "configs/tiny.py"
) -> subprocess.Popen:
    given = [
        f"model={tiny / 'sft'}",
        f"prompts={tiny / 'start' / 'prompts.jsonl'}",
        "saving.every=1",
        "steps=5",
        *settings,
    ]
    flags = [word for setting in given for word in ("--set", setting)]
    return oreal("train", config, *flags, "--run", run)


def arrays(run: Path, step: int) -> list[np.ndarray]:
    """Every number of a checkpoint."""
    found = []
    for item in ("policy", "trainer"):
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(run / "checkpoints" / str(step) / item)
        found += [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return found


def lasting(run: Path) -> list[dict]:
    """The metrics of a run without what depends on the clock."""
    clock = ("timing_s/", "perf/")
    rows = metrics.read(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(clock)} for r in rows]


@pytest.fixture(scope="session")
def whole(tiny) -> Path:
    """A run of five steps that nothing disturbs."""
    finish(train(tiny, tiny / "whole"))
    return tiny / "whole"


def wait_for_steps(run: Path, count: int, process: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT], ids=str)
def test_a_stopped_run_goes_on_bit_for_bit(tiny, whole, blow):
    run = tiny / f"stopped-{blow.name}"
    process = train(tiny, run)
    wait_for_steps(run, 2, process)
    process.send_signal(blow)
    said, complained = process.communicate(timeout=60)
    assert process.returncode != 0
    if blow == signal.SIGINT:
        assert process.returncode == 130
        assert "go on with the same command" in said
        assert "Traceback" not in said + complained
    assert "going on after step" in finish(train(tiny, run))
    for ours, expected in zip(arrays(run, 5), arrays(whole, 5), strict=True):
        assert ours.tobytes() == expected.tobytes()
    assert lasting(run) == lasting(whole)
    for file in sorted((whole / "trajectories").iterdir()):
        assert (run / "trajectories" / file.name).read_text() == file.read_text()


def test_what_a_run_directory_holds(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "model",
        "data",
        "metrics.jsonl",
        "trajectories",
        "checkpoints",
        "reference",
    }
    rows = metrics.read(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(5))
    learned = next(row for row in rows if row["oreal/kept"])
    for name in (
        "critic/score/mean",
        "response_length/clip_ratio",
        "actor/pg_loss",
        "actor/kl_loss",
        "actor/entropy",
        "actor/grad_norm",
        "actor/lr",
        "training/rollout_probs_diff_max",
        "training/rollout_probs_correlation",
        "timing_s/gen",
        "timing_s/update_actor",
        "perf/throughput",
        "perf/time_per_step",
        "frac_reward_zero_std",
        "token_reward/loss",
        "token_reward/auc",
        "oreal/omega_right/mean",
        "verdict/by_truncated",
    ):
        assert name in learned, name
    assert learned["training/rollout_probs_diff_max"] < 1e-3
    assert learned["training/rollout_probs_correlation"] > 0.9999
    lines = (whole / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    trajectories = [json.loads(line) for line in lines]
    assert len(trajectories) == 64
    kept = [t for t in trajectories if t["kept"]]
    assert len(kept) == rows[0]["oreal/kept"]
    for trajectory in kept:
        assert trajectory["mean_token_score"] == 0  # the head starts at zero
        assert trajectory["advantage"] != 0
        assert trajectory["pieces"][-1] == "<|im_end|>"
        assert "".join(trajectory["pieces"][:-1]) == trajectory["completion"]
        for name in LISTS:
            assert len(trajectory[name]) == trajectory["tokens"]


def test_the_laboratory_finds_the_loss_that_the_run_had(whole):
    """The metrics of a step, from its trajectories alone."""
    for row in metrics.read(whole / "metrics.jsonl"):
        if row["oreal/kept"]:
            file = whole / "trajectories" / f"step_{row['step']:06d}.jsonl"
            found = laboratory.examine(losses.Oreal(), laboratory.read([file]))
            assert found.terms["loss"] == pytest.approx(row["actor/loss"], abs=1e-5)
            for name in ("actor/positive_loss", "actor/kl_loss"):
                assert found.terms[name] == pytest.approx(row[name], abs=1e-5)


def test_a_loss_of_ones_own_trains_from_its_config_file_alone(tiny, tmp_path):
    config = tmp_path / "own.py"
    own = (ROOT / "configs" / "my_loss.py").read_text()
    config.write_text(own.replace("smollm2_arithmetic", "tiny"))
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path)
    run = tmp_path / "run"
    finish(train(tiny, run, "loss.weight=0.25", "steps=2", config=config))
    recorded = json.loads((run / "config.json").read_text())["loss"]
    assert recorded["class"] == "own.RareCloning" and recorded["weight"] == 0.25
    assert metrics.read(run / "metrics.jsonl")[-1]["actor/pg_loss"] > 0


def test_training_on_the_sampled_distribution_agrees_with_the_sampler(tiny):
    settings = ["sampling.top_p=0.6", "sampling.temperature=0.8", "steps=1"]
    differences = []
    for kind in ("sampled", "full"):
        run = tiny / f"log-probs-{kind}"
        finish(train(tiny, run, *settings, f"log_probs={kind}"))
        row = metrics.read(run / "metrics.jsonl")[0]
        differences.append(row["training/rollout_probs_diff_max"])
        lines = (run / "trajectories" / "step_000000.jsonl").read_text().splitlines()
        kept = [row for row in map(json.loads, lines) if row["kept"]]
        mean = np.mean([np.mean(row["old_log_probs"]) for row in kept])
        differences.append(mean)
    assert differences[0] < 1e-3 and differences[2] < 1e-3
    assert differences[1] > differences[3]  # what is cut off makes the rest likelier


def test_kept_completions_are_one_right_and_one_wrong_of_a_prompt(whole):
    for file in (whole / "trajectories").iterdir():
        kept = [t for t in map(json.loads, file.open()) if t["kept"]]
        by_prompt: dict[str, list[str]] = {}
        for t in kept:
            by_prompt.setdefault(t["id"], []).append(t["verdict"])
        for verdicts in by_prompt.values():
            assert verdicts.count("right") * 2 == len(verdicts)


def test_a_step_without_a_pair_skips_the_update_and_says_so(tiny):
    rows = [{"question": f"max {i} 1?", "gold_answer": "never"} for i in range(8)]
    prompts = tiny / "never.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny / "skipped"
    said = finish(train(tiny, run, f"prompts={prompts}", "steps=1"))
    assert "no update: every prompt was all right or all wrong" in said
    before, after = arrays(tiny / "sft", 60)[:3], arrays(run, 1)[:3]
    for ours, expected in zip(after, before, strict=True):
        assert ours.tobytes() == expected.tobytes()


def test_what_the_judge_leaves_undecided_is_dropped_where_so_configured(tiny):
    run = tiny / "undecided"
    with serving(says("VERDICT: UNSURE")) as stub:
        judge = [
            f"verification.judge_hosts=('{stub.url}',)",
            "verification.judge_model=m",
            "verification.undecided=drop",
        ]
        finish(train(tiny, run, "steps=1", *judge))
    row = metrics.read(run / "metrics.jsonl")[0]
    assert row["judge/asked"] == row["judge/undecided"] == stub.requests > 0
    assert row["verdict/undecided"] == row["verdict/by_judge"] == row["judge/asked"]
    lines = (run / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    unsure = [t for t in map(json.loads, lines) if t["by"] == "judge"]
    assert len(unsure) == stub.requests
    assert not any(t["advantage"] or t["kept"] for t in unsure)


def test_tensorboard_files_come_when_asked_for(tiny):
    finish(train(tiny, tiny / "board", "steps=1", "tensorboard=True"))
    assert list((tiny / "board" / "tensorboard").glob("events*"))


def test_a_runs_template_and_system_prompt_stay_with_it(tiny, capsys):
    template, run = tiny / "other.jinja", tiny / "other"
    text = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    template.write_text(text)
    settings = [f"chat_template={template}", "system_prompt=Long.", "steps=1"]
    finish(train(tiny, run, *settings))
    template.unlink()
    finish(train(tiny, run, *settings[:2], "steps=2"))
    assert (run / "model" / "chat_template.jinja").read_text() == text
    source = open_model(run)
    assert source.system_prompt == "Long."
    tokenizer = load_tokenizer(source.files)
    assert (
        Chat(tokenizer, source.system_prompt).decode(
            Chat(tokenizer, source.system_prompt).encode("1?")
        )
        == "Long.|1?|"
    )


def test_an_existing_run_is_not_mistaken_for_another(tiny, whole):
    process = train(tiny, whole, "seed=7")
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "seed: 0 -> 7" in complained and complained.count("\n") == 1


def test_a_run_can_be_sampled_evaluated_and_exported(tiny, whole, capsys, tmp_path):
    question = ["--model", str(whole), "--max-tokens", "6", "--rows", "8"]
    assert (
        main(["sample", *question, "--prompt", "max 3 4?", "--n", "2", "--json"]) == 0
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and rows[0]["question"] == "max 3 4?"
    data = str(tiny / "start" / "prompts.jsonl")
    report = tmp_path / "report.json"
    done = main(["eval", *question, "--data", data, "--k", "2", "--json", str(report)])
    assert done == 0
    assert "avg@2" in capsys.readouterr().out
    measured = json.loads(report.read_text())
    assert len(measured["items"]) == 200
    right = [item["verdict"] == "right" for item in measured["items"]]
    assert measured["accuracy"] == pytest.approx(np.mean(right))
    assert measured["low"] <= measured["accuracy"] <= measured["high"]
    exported = str(tmp_path / "exported")
    assert main(["convert", "to-hf", str(whole), exported, "--dtype", "bfloat16"]) == 0
    assert main(["sample", "--model", exported, *question[2:], "--prompt", "max"]) == 0


def test_what_is_finished_is_said_when_sampling_is_interrupted(
    tiny, capsys, monkeypatch
):
    draw = Engine.sample

    def broken_off(*arguments, on_finished, **options):
        draw(*arguments, on_finished=on_finished, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "sample", broken_off)
    asked = ["--model", str(tiny / "sft"), "--prompt", "max 3 4?", "--max-tokens", "6"]
    assert main(["sample", *asked, "--n", "2", "--json", "--rows", "8"]) == 130
    said = capsys.readouterr()
    assert len([json.loads(line) for line in said.out.splitlines()]) == 2
    assert said.err.endswith("oreal: interrupted\n")


def test_options_of_sampling_reach_the_sampler(tiny, capsys):
    asked = ["--model", str(tiny / "sft"), "--prompt", "max 3 4?", "--max-tokens", "6"]
    asked += ["--greedy", "--rows", "8", "--json"]

    def said(*options: str) -> dict:
        assert main(["sample", *asked, *options]) == 0
        return json.loads(capsys.readouterr().out)

    letter = 65  # of the tiny tokenizer's bytes
    always = said("--logit-bias", f"{letter}=1e4")
    text = always["completion"]
    assert text == text[0] * 6 and always["finish_reason"] == "length"
    bias = ("--logit-bias", f"{letter}=30")
    for penalty in (
        ("--repetition-penalty", "1000"),
        ("--presence-penalty", "1000"),
        ("--frequency-penalty", "1000"),
    ):
        assert said(*bias, *penalty)["completion"].count(text[0]) == 1
    stopped = said("--logit-bias", f"{letter}=1e4", "--stop", text[0] * 2)
    assert stopped == always | {
        "completion": "",
        "tokens": 2,
        "finish_reason": "stop",
        "log_prob": stopped["log_prob"],
    }
    special = said("--stop", "<|im_end|>")
    assert special == said()
    with pytest.raises(SystemExit):
        main(["sample", *asked, "--logit-bias", "x=1"])
    assert "'x=1': expected e.g. 1234=-5" in capsys.readouterr().err


def test_eight_bit_decoding_trains_and_its_distance_is_measured(tiny):
    run = tiny / "eight"
    settings = ["decode_weights=int8", "decode_cache=float8", "steps=1"]
    finish(train(tiny, run, *settings))
    (row,) = metrics.read(run / "metrics.jsonl")
    assert 1e-4 < row["training/rollout_probs_diff_mean"] < 0.05
    assert row["training/rollout_probs_correlation"] > 0.9


def test_a_sampler_that_is_not_the_trainers_ends_the_run(tiny):
    run = tiny / "apart"
    settings = ["decode_weights=int8", "max_disagreement=1e-6", "steps=1"]
    process = train(tiny, run, *settings)
    _, complained = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "max_disagreement=1e-06; the step is not saved" in complained
    assert "Traceback" not in complained
    assert not metrics.read(run / "metrics.jsonl")
    assert not list((run / "checkpoints").glob("*"))


def test_what_was_drawn_stays_when_a_step_is_interrupted(tiny, capsys, monkeypatch):
    run = tiny / "interrupted"
    settings = [f"model={tiny / 'sft'}", "steps=1"]
    settings += [f"prompts={tiny / 'start' / 'prompts.jsonl'}"]
    flags = [word for setting in settings for word in ("--set", setting)]
    command = ["train", str(ROOT / "configs/tiny.py"), *flags, "--run", str(run)]
    draw = Engine.sample
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)

    def broken_off(*arguments, on_finished, **options):
        seen = []

        def count(n, k, completion):
            on_finished(n, k, completion)
            seen.append(n)
            if len(seen) == 10:
                raise KeyboardInterrupt

        return draw(*arguments, on_finished=count, **options)

    monkeypatch.setattr(Engine, "sample", broken_off)
    assert main(command) == 130
    left = run / "interrupted" / "step_000000.jsonl"
    rows = [json.loads(line) for line in left.read_text().splitlines()]
    assert len(rows) == 10
    assert f"10 of 64 completions are in {left}" in capsys.readouterr().out
    monkeypatch.setattr(Engine, "sample", draw)
    assert main(command) == 0
    whole = (run / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    drawn = {(r["group"], r["sample"]): r["completion"] for r in map(json.loads, whole)}
    for row in rows:  # the same, drawn anew
        assert drawn[row["group"], row["sample"]] == row["completion"]
    assert not left.exists()


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"question": "a", "gold_answer": "1"}\n')
    return path


def wrong_rows(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "wrong.jsonl"
    path.write_text("\n".join(lines))
    return f"prompts={path}"


GOOD = '{"question": "a", "gold_answer": "1"}'


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda d: ["polcy.learning_rate=1"], "has no field 'polcy'; it has"),
        (lambda d: ["policy.learning_rate=fast"], "learning_rate must be float"),
        (lambda d: ["loss=1"], "which only a config file can give"),
        (
            lambda d: ["log_probs=sampled", "sampling.temperature=0.0"],
            "greedy choice has no probabilities",
        ),
        (lambda d: ["steps"], "expected name=value"),
        (lambda d: ["steps=0"], "steps=0 must be at least 1"),
        (lambda d: ["samples_per_prompt=1"], "samples_per_prompt=1 must be at least 2"),
        (lambda d: ["sampling.top_p=2.0"], "top_p=2.0 must be above 0"),
        (lambda d: ["packing.row_length=10"], "sampling.max_tokens=8 must not exceed"),
        (lambda d: ["token_reward=None"], "freeze_steps=1 without token_reward"),
        (lambda d: [wrong_rows(d)], "wrong.jsonl: the file has no rows"),
        (
            lambda d: [wrong_rows(d, GOOD, '{"question": "b"}')],
            "wrong.jsonl:2: field 'gold_",
        ),
        (lambda d: [wrong_rows(d, "no json")], "wrong.jsonl:1: not JSON"),
        (lambda d: [f"prompts={d / 'gone.jsonl'}"], "gone.jsonl: no such file"),
        (lambda d: [f"model={d / 'gone'}"], "gone: no such model directory"),
        (lambda d: ["mesh.fsdp=3"], "3 devices, this process sees 8"),
        (
            lambda d: ["mesh.fsdp=1", "mesh.tensor=8"],
            "heads=4 does not divide by tensor=8",
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
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    tiny, tmp_path, capsys, settings, said
):
    run = tmp_path / "run"
    given = [f"model={tiny / 'sft'}", f"prompts={tiny / 'start' / 'prompts.jsonl'}"]
    given += settings(tmp_path)
    flags = [word for setting in given for word in ("--set", setting)]
    config = str(ROOT / "configs/tiny.py")
    assert main(["train", config, *flags, "--run", str(run)]) == 2
    complained = capsys.readouterr().err
    assert said in complained and complained.count("\n") == 1
    assert not run.exists()


def test_a_missing_tensor_stops_a_run_before_it_begins(tiny, tmp_path, capsys):
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


def test_a_run_directory_that_cannot_be_written_is_named(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--set", f"model={tiny / 'sft'}"]
    flags += ["--set", f"prompts={tiny / 'start' / 'prompts.jsonl'}"]
    run = tmp_path / "file" / "run"
    config = str(ROOT / "configs/tiny.py")
    assert main(["train", config, *flags, "--run", str(run)]) == 2
    complained = capsys.readouterr().err
    assert str(run) in complained and complained.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
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
    ],
)
def test_every_verb_refuses_what_is_not_there(
    arguments, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_verify_prints_a_verdict_a_line(tmp_path, capsys):
    file = tmp_path / "answers.jsonl"
    rows = [("7", "it is \\boxed{7}"), ("7", "it is \\boxed{8}"), ("7", "no idea")]
    text = [json.dumps({"gold": g, "prediction": p}) + "\n" for g, p in rows]
    file.write_text("".join(text))
    assert main(["verify", "--file", str(file), "--json", "--workers", "1"]) == 0
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [v["verdict"] for v in verdicts] == ["right", "wrong", "wrong"]
    assert set(verdicts[0]) == {"verdict", "reason", "by"}


def test_verify_asks_a_judge_where_the_rule_does_not_say_right(capsys):
    answer = ["verify", "--gold", "7", "--answer", "it is right: \\boxed{VII}"]
    with serving(honest) as stub:
        assert main([*answer, "--judge", stub.url, "--judge-model", "m"]) == 0
        assert capsys.readouterr().out == "right: Compared. (by judge)\n"
        assert main([*answer, "--judge", stub.url]) == 2
    assert "which model is to be asked?" in capsys.readouterr().err
