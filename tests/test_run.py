"""Whole runs of the tiny model through the command line: SFT, OREAL, stop, go on."""

import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import scripted_runs
from judge_stub import replies, serving
from safetensors.numpy import load_file, save_file
from tiny_runs import (
    ONE_STEP,
    ROOT,
    arrays,
    finish,
    train,
    train_in_process,
    train_ok,
    wait_for_steps,
)

from oreal_jax import loss_lab, losses, metrics
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.run import Checkpoints
from oreal_jax.checkpoints.source import open_model
from oreal_jax.config import TrainConfig
from oreal_jax.config_loading import load
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.errors import InputError
from oreal_jax.loss_lab.load import PER_TOKEN
from oreal_jax.sampling import Engine
from oreal_jax.train import run_directory
from oreal_jax.train.programs import make_run_mesh

pytestmark = pytest.mark.usefixtures("judges")


def lasting(run: Path) -> list[dict]:
    """Return the metrics of a run without what depends on the clock."""
    clock = ("timing_s/", "perf/")
    rows = metrics.read(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if not k.startswith(clock)} for r in rows]


BLOWS = [
    signal.SIGKILL,
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("blow", BLOWS, ids=str)
def test_a_stopped_run_resumes_bit_for_bit(tiny, whole, blow):
    run = tiny / f"stopped-{blow.name}"
    process = train(tiny, run)
    wait_for_steps(run, 2, process)
    process.send_signal(blow)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    if blow != signal.SIGKILL:
        assert process.returncode == 130
        assert "resume with the same command" in output
        assert "Traceback" not in output + errors
    assert f"resuming {run} after " in finish(train(tiny, run))
    for ours, expected in zip(arrays(run, 5), arrays(whole, 5), strict=True):
        assert ours.tobytes() == expected.tobytes()
    assert lasting(run) == lasting(whole)
    for file in sorted((whole / "trajectories").iterdir()):
        assert (run / "trajectories" / file.name).read_text() == file.read_text()


def test_a_run_directory_has_all_files(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.json",
        "history.jsonl",
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
        "oreal/omega_correct/mean",
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
        for name in PER_TOKEN:
            assert len(trajectory[name]) == trajectory["tokens"]


def test_trajectories_are_written_while_the_next_step_samples(
    start, files, policy, monkeypatch
):
    """And before the checkpoint after which they would not be written again."""
    run, sampling = files / "run", threading.Event()
    write, sample, save = (
        run_directory.write_trajectories,
        Engine.sample,
        Checkpoints.save,
    )
    saved = []

    def write_late(folder, step, *others):
        assert step or sampling.wait(60)
        write(folder, step, *others)

    def announce(*arguments, step, **options):
        if step == 1:
            sampling.set()
        return sample(*arguments, step=step, **options)

    def list_files(self, *arguments):
        saved.append(sorted(path.name for path in (run / "trajectories").iterdir()))
        save(self, *arguments)

    monkeypatch.setattr(run_directory, "write_trajectories", write_late)
    monkeypatch.setattr(Engine, "sample", announce)
    monkeypatch.setattr(Checkpoints, "save", list_files)
    assert scripted_runs.train(start, files, "steps=2", "saving.every=2").code == 0
    assert saved == [["step_000000.jsonl", "step_000001.jsonl"]]


def test_the_loss_lab_finds_the_loss_that_the_run_had(whole):
    """The metrics of a step, from its trajectories alone."""
    for row in metrics.read(whole / "metrics.jsonl"):
        if row["oreal/kept"]:
            file = whole / "trajectories" / f"step_{row['step']:06d}.jsonl"
            result = loss_lab.evaluate_loss(
                losses.Oreal(), loss_lab.load_trajectories([file])
            )
            assert result.terms["loss"] == pytest.approx(row["actor/loss"], abs=1e-5)
            for name in ("actor/positive_loss", "actor/kl_loss"):
                assert result.terms[name] == pytest.approx(row[name], abs=1e-5)


def test_a_loss_in_a_config_file_trains_without_registration(tiny, tmp_path):
    config = tmp_path / "own.py"
    own = (ROOT / "configs" / "my_loss.py").read_text()
    config.write_text(own.replace("smollm2_arithmetic", "tiny"))
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path)
    run = tmp_path / "run"
    train_ok(tiny, run, "loss.weight=0.25", "steps=2", config=config)
    recorded = json.loads((run / "config.json").read_text())["loss"]
    assert recorded["class"] == "own.RareCloning" and recorded["weight"] == 0.25
    assert metrics.read(run / "metrics.jsonl")[-1]["actor/pg_loss"] > 0


OWN_LOSS = """
import dataclasses, jax.numpy as jnp, tiny
from oreal_jax.losses import Advantage, rloo, token_mean

@dataclasses.dataclass(frozen=True, kw_only=True)
class Flat:
    advantage: Advantage = rloo
    broken: bool = False

    def __call__(self, scored, counts):
        values = scored.log_probs
        zero = values - values
        if self.broken:  # 0, with a gradient of 0 times infinity
            values = values + jnp.where(zero > 0, jnp.sqrt(zero), 0)
        return -token_mean(values, scored.correct_tokens, counts.correct), {}

config = dataclasses.replace(
    tiny.config, loss=Flat(), token_reward=None, freeze_steps=0
)
"""


def test_a_non_finite_gradient_ends_the_run_without_saving(tiny, tmp_path):
    config, run = tmp_path / "own.py", tmp_path / "run"

    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path)
    config.write_text(OWN_LOSS)
    # A loss may record nothing of its own.
    assert "loss" in train_ok(tiny, run, "steps=1", config=config)
    code, _, errors = train_in_process(
        tiny, run, "steps=3", "loss.broken=True", config=config
    )
    assert code == 1
    assert "step 1: actor/grad_norm=nan; it is not saved" in errors
    assert "Traceback" not in errors
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]


def test_a_run_cannot_gain_or_lose_its_token_reward_model(tiny, whole, tmp_path):
    config = tmp_path / "own.py"
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path)
    config.write_text(OWN_LOSS)
    code, _, errors = train_in_process(tiny, whole, config=config)
    assert code == 2
    assert "token_reward cannot be added or removed" in errors
    assert errors.count("\n") == 1


def test_sizes_that_do_not_fit_are_reported_before_a_run_starts(tiny, tmp_path):
    for settings, message in [
        (
            ["sampling.max_tokens=255", "packing.row_length=512"],
            "max_tokens=255 must lie within 1..256",
        ),
        (["cache_tokens=64"], "does not fit cache_tokens=64"),
    ]:
        code, _, errors = train_in_process(tiny, tmp_path / "run", *settings)
        assert code == 2 and message in errors
        assert not (tmp_path / "run").exists()


def test_row_lengths_must_divide_by_the_context_axis(tiny):
    settings = ["mesh.context=8", "packing.row_length=300"]
    config = load(ROOT / "configs/tiny.py", TrainConfig, settings)
    with pytest.raises(
        InputError, match="row_length=300 is not divisible by .*context=8"
    ):
        make_run_mesh(config, open_model(tiny / "sft").config)


def test_training_on_the_sampled_distribution_agrees_with_the_sampler(tiny):
    settings = ["sampling.top_p=0.6", "sampling.temperature=0.8", *ONE_STEP]
    differences = []
    for kind in ("sampled", "full"):
        run = tiny / f"log-probs-{kind}"
        train_ok(tiny, run, *settings, f"log_probs={kind}")
        row = metrics.read(run / "metrics.jsonl")[0]
        differences.append(row["training/rollout_probs_diff_max"])
        lines = (run / "trajectories" / "step_000000.jsonl").read_text().splitlines()
        kept = [row for row in map(json.loads, lines) if row["kept"]]
        mean = np.mean([np.mean(row["old_log_probs"]) for row in kept])
        differences.append(mean)
        # The first step's policy is the reference, whatever it is sampled from.
        assert row["actor/kl_loss"] < 1e-9
        read = loss_lab.load_trajectories([run / "trajectories"])
        result = loss_lab.evaluate_loss(losses.Oreal(), read)
        assert result.terms["actor/kl_loss"] < 1e-9
        for t in kept:
            full = t.get("full_log_probs", t["log_probs"])
            np.testing.assert_allclose(full, t["reference_log_probs"], atol=2e-5)
    assert differences[0] < 1e-3 and differences[2] < 1e-3
    assert differences[1] > differences[3]  # what is cut off makes the rest likelier


def test_selected_completions_are_one_correct_and_one_incorrect_per_prompt(whole):
    for file in (whole / "trajectories").iterdir():
        kept = [t for t in map(json.loads, file.open()) if t["kept"]]
        by_prompt: dict[str, list[str]] = {}
        for t in kept:
            by_prompt.setdefault(t["id"], []).append(t["verdict"])
        for verdicts in by_prompt.values():
            assert verdicts.count("correct") * 2 == len(verdicts)


def test_a_step_without_a_pair_skips_and_logs_the_update(tiny):
    rows = [{"question": f"max {i} 1?", "gold_answer": "never"} for i in range(8)]
    prompts = tiny / "never.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tiny / "skipped"
    output = train_ok(tiny, run, f"prompts={prompts}", *ONE_STEP)
    assert "no update: every prompt was all correct or all incorrect" in output
    before, after = arrays(tiny / "sft", 60)[:3], arrays(run, 1)[:3]
    for ours, expected in zip(after, before, strict=True):
        assert ours.tobytes() == expected.tobytes()


def test_undecided_completions_are_dropped_if_configured(tiny):
    run = tiny / "undecided"
    with serving(replies("VERDICT: UNSURE")) as stub:
        judge = [
            f"verification.judge_hosts=('{stub.url}',)",
            "verification.judge_model=m",
            "verification.undecided=drop",
        ]
        train_ok(tiny, run, *ONE_STEP, *judge)
    row = metrics.read(run / "metrics.jsonl")[0]
    assert row["judge/asked"] == row["judge/undecided"] == stub.requests > 0
    assert row["verdict/undecided"] == row["verdict/by_judge"] == row["judge/asked"]
    lines = (run / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    unsure = [t for t in map(json.loads, lines) if t["by"] == "judge"]
    assert len(unsure) == stub.requests
    assert not any(t["advantage"] or t["kept"] for t in unsure)


def test_tensorboard_files_are_written_if_configured(tiny):
    train_ok(tiny, tiny / "board", *ONE_STEP, "tensorboard=True")
    assert list((tiny / "board" / "tensorboard").glob("events*"))


def test_a_run_keeps_its_template_and_system_prompt(tiny):
    template, run = tiny / "other.jinja", tiny / "other"
    text = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    template.write_text(text)
    settings = [f"chat_template={template}", "system_prompt=Long.", *ONE_STEP]
    train_ok(tiny, run, *settings)
    template.unlink()
    train_ok(tiny, run, *settings[:2], "steps=2")
    assert (run / "model" / "chat_template.jinja").read_text() == text
    source = open_model(run)
    assert source.settings["system_prompt"] == "Long."
    tokenizer = load_tokenizer(source.files)
    assert (
        Chat(tokenizer, source.settings["system_prompt"]).decode(
            Chat(tokenizer, source.settings["system_prompt"]).encode("1?")
        )
        == "Long.|1?|"
    )


def test_a_run_cannot_change_its_seed(tiny, whole):
    code, _, errors = train_in_process(tiny, whole, "seed=7")
    assert code == 2
    assert "seed: 0 -> 7" in errors and errors.count("\n") == 1


def test_eight_bit_decoding_trains_and_its_error_is_measured(tiny):
    run = tiny / "eight"
    settings = ["decode_weights=int8", "decode_cache=float8", *ONE_STEP]
    train_ok(tiny, run, *settings)
    (row,) = metrics.read(run / "metrics.jsonl")
    assert 1e-4 < row["training/rollout_probs_diff_mean"] < 0.05
    assert row["training/rollout_probs_correlation"] > 0.9


def test_a_sampler_that_disagrees_with_the_trainer_ends_the_run(tiny):
    run = tiny / "apart"
    settings = ["decode_weights=int8", "max_disagreement=1e-6", *ONE_STEP]
    code, _, errors = train_in_process(tiny, run, *settings)
    assert code == 1
    assert "max_disagreement=1e-06; the step is not saved" in errors
    assert "decode_weights='int8' is lossy; try 'full'" in errors
    assert "decode_cache" not in errors
    assert "Traceback" not in errors
    assert not metrics.read(run / "metrics.jsonl")
    assert not list((run / "checkpoints").glob("*"))


def test_a_non_finite_policy_ends_the_run_and_names_the_weight(tiny, monkeypatch):
    # Loading such weights is refused; training could have made them.
    monkeypatch.setattr(hf, "check_finite", lambda *_: None)
    home = shutil.copytree(tiny / "start" / "hf", tiny / "broken")
    weights = load_file(home / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, home / "model.safetensors")
    run = tiny / "not-finite"
    code, _, errors = train_in_process(
        tiny, run, f"model={home}", "steps=1", "freeze_steps=0"
    )
    assert code == 1
    assert (
        "step 0: sampled a token with a non-finite log-probability: 1 weight" in errors
    )
    assert "the first is layers/1/mlp/up; the step is not saved" in errors
    assert not metrics.read(run / "metrics.jsonl")


def test_finished_completions_of_an_interrupted_step_are_saved(tiny, monkeypatch):
    run = tiny / "interrupted"
    draw = Engine.sample

    def broken_off(*arguments, on_finished, **options):
        seen = []

        def count(n, k, completion):
            on_finished(n, k, completion)
            seen.append(n)
            if len(seen) == 10:
                raise KeyboardInterrupt

        return draw(*arguments, on_finished=count, **options)

    monkeypatch.setattr(Engine, "sample", broken_off)
    code, output, _ = train_in_process(tiny, run, *ONE_STEP)
    assert code == 130
    left = run / "interrupted" / "step_000000.jsonl"
    rows = [json.loads(line) for line in left.read_text().splitlines()]
    assert len(rows) == 10
    assert f"saved 10 of 64 completions to {left}" in output
    monkeypatch.setattr(Engine, "sample", draw)
    train_ok(tiny, run, *ONE_STEP)
    whole = (run / "trajectories" / "step_000000.jsonl").read_text().splitlines()
    drawn = {(r["group"], r["sample"]): r["completion"] for r in map(json.loads, whole)}
    for row in rows:  # the same, drawn anew
        assert drawn[row["group"], row["sample"]] == row["completion"]
    assert not left.exists()
