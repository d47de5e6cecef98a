"""The loss lab: coefficients by hand, shares, agreement, and invalid files."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from oreal_jax import loss_lab, losses
from oreal_jax.cli import main
from oreal_jax.errors import InputError
from oreal_jax.loss_lab import coefficients
from oreal_jax.loss_lab.load import PER_TOKEN


def row(verdict="correct", tokens=4, seed=0, **fields) -> dict:
    """Return a line as a run writes it."""
    draw = np.random.default_rng(seed)
    log_probs = draw.normal(-1, 0.3, tokens)
    lists = {
        "log_probs": log_probs,
        "old_log_probs": log_probs + draw.normal(0, 0.01, tokens),
        "reference_log_probs": log_probs + draw.normal(0, 0.2, tokens),
        "token_scores": draw.normal(0, 1, tokens),
        "entropy": draw.uniform(0, 2, tokens),
    }
    assert tuple(lists) == PER_TOKEN
    line = {"step": 0, "id": "a", "group": 0, "sample": seed, "verdict": verdict}
    line["pieces"] = [f"t{i}" for i in range(tokens)]
    return line | {name: x.tolist() for name, x in lists.items()} | fields


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def two_groups(path: Path) -> Path:
    """Two selected of four samples in one group, two of two in another."""
    unseen = {"step": 0, "id": "a", "group": 0, "verdict": "incorrect"}
    rows = [row("correct", 4, 0), unseen, row("incorrect", 7, 1), unseen]
    rows += [
        row("incorrect", 2, 2, id="b", group=1),
        row("correct", 5, 3, id="b", group=1),
    ]
    return write(path, rows)


@pytest.fixture
def trajectories(tmp_path):
    return loss_lab.load_trajectories([two_groups(tmp_path / "step_000000.jsonl")])


def test_advantages_are_over_all_samples_of_a_group(trajectories):
    assert [len(trajectory.rewards) for trajectory in trajectories] == [4, 4, 2, 2]
    assert [trajectory.correct for trajectory in trajectories] == [1, 0, 0, 1]
    tokens = 4 + 7 + 2 + 5
    # d/dlog pi of -A pi/stop(pi), over all tokens.
    reinforce = losses.Reinforce(advantage=losses.rloo, kl_weight=0.0)
    result = loss_lab.evaluate_loss(reinforce, trajectories)
    advantages = [2.0, -2 / 3, -2.0, 2.0]
    for values, advantage in zip(result.coefficients, advantages, strict=True):
        np.testing.assert_allclose(values, -advantage / tokens, rtol=1e-6)


def test_a_kl_uses_full_log_probs_where_a_run_has_them(tmp_path):
    """Coefficients by hand: both log-probabilities of a token change together."""
    line = row("correct", 3)
    full = np.array(line["log_probs"]) - [0.5, 0.2, 0.1]
    path = write(tmp_path / "a.jsonl", [line | {"full_log_probs": full.tolist()}])
    loss = losses.Reinforce(kl_weight=2.0)
    result = loss_lab.evaluate_loss(loss, loss_lab.load_trajectories([path]))
    difference = np.array(line["reference_log_probs"]) - full
    kl = np.mean(np.exp(difference) - difference - 1)
    assert result.terms["actor/kl_loss"] == pytest.approx(kl, rel=1e-5)
    expected = (2.0 * (1 - np.exp(difference)) - 1) / 3
    np.testing.assert_allclose(result.coefficients[0], expected, rtol=1e-5)


def test_shares_are_of_the_sum_of_coefficients(trajectories):
    cloning = loss_lab.evaluate_loss(losses.BestOfNCloning(), trajectories)
    assert cloning.shares["correct"] == 1 and cloning.shares["incorrect"] == 0
    assert cloning.shares["early"] == pytest.approx(0.5)
    assert cloning.shares["untouched_tokens"] == pytest.approx(9 / 18)
    assert cloning.shares["early"] + cloning.shares["late"] == pytest.approx(1)


def test_losses_agree_with_themselves_and_with_their_multiples(trajectories):
    one = loss_lab.evaluate_loss(losses.Reinforce(kl_weight=0.0), trajectories)
    zero_one = losses.ZeroOne(losses.outcome)
    other = losses.Reinforce(kl_weight=0.0, advantage=zero_one)
    half = loss_lab.evaluate_loss(other, trajectories)
    same = {"cosine": pytest.approx(1), "same_sign": 1}
    assert loss_lab.agreement(one, one) == same
    # The other ignores incorrect completions: 9 tokens of 18 have the same sign.
    assert loss_lab.agreement(one, half)["same_sign"] == 0.5
    assert loss_lab.agreement(one, half)["cosine"] == pytest.approx(np.sqrt(0.5))


@pytest.mark.parametrize("name", losses.presets.NAMED)
def test_parts_of_bounded_size_change_nothing(trajectories, monkeypatch, name):
    loss = loss_lab.load_loss(name)
    complete = loss_lab.evaluate_loss(loss, trajectories)
    monkeypatch.setattr(coefficients, "MAX_ENTRIES", 14)  # two rows of seven
    parts = loss_lab.evaluate_loss(loss, trajectories)
    for a, b in zip(complete.coefficients, parts.coefficients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)
    for term, value in complete.terms.items():
        assert parts.terms[term] == pytest.approx(value, rel=1e-5, abs=1e-7)


def test_a_config_file_names_its_loss():
    path = Path(__file__).parents[1] / "configs" / "my_loss.py"
    assert type(loss_lab.load_loss(str(path))).__name__ == "RareCloning"
    with pytest.raises(InputError, match="--loss grop: neither .* released, paper"):
        loss_lab.load_loss("grop")


def test_one_completion_of_each_outcome_is_selected_by_default(trajectories):
    assert loss_lab.select(trajectories, []) == [0, 1]
    assert loss_lab.select(trajectories, ["0/b/3", "0/a/1"]) == [3, 1]
    with pytest.raises(InputError, match="--trajectory 9: not among the 4 completions"):
        loss_lab.select(trajectories, ["9"])


def test_the_verb_prints_tables_and_writes_numbers_and_a_picture(tmp_path, capsys):
    two_groups(tmp_path / "step_000000.jsonl")
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    chosen = ["--loss", "released", "--loss", "grpo"]
    outputs = ["--json", str(numbers), "--picture", str(picture)]
    assert main(["losses", str(tmp_path), *chosen, *outputs]) == 0
    output = capsys.readouterr().out
    for word in ("released", "grpo", "actor/positive_loss", "early", "agreement"):
        assert word in output
    written = json.loads(numbers.read_text())
    assert (written["completions"], written["tokens"]) == (4, 18)
    released = written["losses"]["released"]
    assert len(released["coefficients"]["0/a/1"]) == 7
    assert set(released["agreement"]) == {"released", "grpo"}
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(verdict="maybe")], "field 'verdict' is 'maybe', expected one of correct"),
        ([row(entropy=[1.0])], "field 'entropy' is [1.0], expected a list of finite"),
        ([row(entropy=None)], "field 'entropy' is None, expected a list of finite"),
        ([row(log_probs=3)], "field 'log_probs' is 3, expected a list of finite"),
        ([row(log_probs=[])], "field 'log_probs' is [], expected a list of finite"),
        ([row(full_log_probs=[1.0])], "field 'full_log_probs' is [1.0], expected a"),
        ([row(entropy=["a"] * 4)], "field 'entropy' is ['a', 'a', 'a', 'a'], expected"),
        ([row(entropy=[np.nan] * 4)], "field 'entropy' is [nan, nan, nan, nan], exp"),
        ([{"verdict": "correct"}], "no completion with per-token lists"),
    ],
)
def test_an_invalid_line_is_named(rows, message, tmp_path, capsys):
    path = write(tmp_path / "step.jsonl", rows)
    assert main(["losses", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and "step.jsonl" in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timed
def test_a_hundred_thousand_tokens_take_less_than_five_seconds(tmp_path):
    """From the start of the process to the end of its output; 2 cores."""
    rows = [
        row("correct" if i % 3 else "incorrect", 500, i, group=i // 4, id=str(i // 4))
        for i in range(200)
    ]
    path = write(tmp_path / "step.jsonl", rows)
    program = "from oreal_jax.cli import command; command()"
    command = [sys.executable, "-c", program, "losses", str(path)]
    # Without the settings that make tests compile quickly: see conftest.py.
    quick = ("XLA_", "JAX_")
    plain = {k: v for k, v in os.environ.items() if not k.startswith(quick)}
    seconds = []
    for _ in range(2):  # the second finds files in the system's cache
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=plain)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5, seconds


def test_a_loss_receives_the_counts_of_the_whole_batch(trajectories):
    seen = []

    class Spy:
        advantage = staticmethod(losses.rloo)

        def __call__(self, scored, counts):
            seen.append((scored, counts))
            loss = jnp.sum(scored.log_probs)
            return loss, {}

    loss_lab.evaluate_loss(Spy(), trajectories)
    _, counts = seen[0]
    assert float(counts.correct.tokens) == 9 and float(counts.correct.sequences) == 2
    assert float(counts.incorrect.tokens) == 9 and float(counts.all.sequences) == 4
