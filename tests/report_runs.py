"""Run directories made on the spot, for the tests of reports."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
from scripted import write_lines

from oreal_jax.cli import main

SETTINGS = {
    "class": "oreal_jax.config.TrainConfig",
    "model": "models/tiny",
    "seed": 0,
    "steps": 20,
    "loss": {
        "class": "oreal_jax.losses.oreal.Oreal",
        "credit": "oreal_jax.losses.weights.running_credit",
        "weight_correct": {
            "class": "oreal_jax.losses.weights.ThresholdWeights",
            "threshold": 0.5,
        },
        "weight_incorrect": {
            "class": "oreal_jax.losses.weights.ThresholdWeights",
            "threshold": 0.5,
        },
    },
}
PIECES = ["Let", " x", " =", " 7", ",", " so", " 3", " \u00d7", "\n", " is"]


def healthy(steps: int = 20) -> list[dict]:
    """Metrics of a run that learns."""
    return [
        {
            "step": step,
            "critic/score/mean": 0.2 + 0.02 * step,
            "frac_reward_zero_std": 0.4,
            "response_length/mean": 100.0,
            "response_length/clip_ratio": 0.1 - 0.004 * step,
            "actor/loss": 0.01,
            "actor/grad_norm": 0.0 if step < 2 else 0.1 + 0.01 * (step % 3),
            "actor/entropy": 1.0 - 0.02 * step,
            "actor/kl_loss": 0.001 * step,
            "token_reward/auc": min(0.9, 0.5 + 0.05 * step),
            "token_reward/loss": 0.69 - 0.01 * step,
            "token_reward/grad_norm": 2.0 + 0.1 * (step % 4),
            "training/rollout_probs_diff_mean": 1e-5,
            "verdict/correct": 40.0,
            "verdict/incorrect": 60.0,
            "verdict/undecided": 1.0,
            "verdict/by_timeout": 0.0,
            "verdict/by_crash": 0.0,
            "judge/disagrees_with_rule": 1.0,
        }
        for step in range(steps)
    ]


def completion(
    step: int, group: int, sample: int, outcome: str, tokens: int, **fields
) -> dict:
    """Make a line of a trajectory file; correct ones have higher scores."""
    random = np.random.default_rng((step, group, sample))
    pieces = [PIECES[i] for i in random.integers(len(PIECES), size=tokens)]
    log_probs = -random.exponential(0.5, tokens)
    level = 0.3 if outcome == "correct" else -0.3
    lists = {
        "old_log_probs": log_probs + random.normal(0, 1e-3, tokens),
        "log_probs": log_probs,
        "entropy": random.exponential(0.4, tokens),
        "token_scores": random.normal(level, 1.0, tokens),
    }
    return {
        "step": step,
        "id": f"p{group}",
        "group": group,
        "sample": sample,
        "question": f"What is problem {group}?",
        "gold_answer": "7",
        "completion": "".join(pieces),
        "tokens": tokens + 1,
        "finish_reason": "stop",
        "verdict": outcome,
        "reason": "equal: 7" if outcome == "correct" else f"{sample} is not 7",
        "by": "rule",
        "advantage": 0.75 if outcome == "correct" else -0.25,
        "kept": True,
        "pieces": [*pieces, "<|im_end|>"],
        **{k: np.round([*x, x[-1]], 6).tolist() for k, x in lists.items()},
        **fields,
    }


def unselected(line: dict) -> dict:
    """Return the same completion, not trained on."""
    lists = ("pieces", "old_log_probs", "log_probs", "entropy", "token_scores")
    return {k: v for k, v in line.items() if k not in lists} | {"kept": False}


def make_run(
    run: Path, steps: int = 3, groups: int = 2, tokens: int = 12, samples: int = 4
) -> Path:
    """Write a run: in each group the last sample is correct, two are trained on."""
    (run / "trajectories").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(SETTINGS))
    write_lines(run / "metrics.jsonl", healthy(max(6, steps)))
    for step in range(steps):
        lines = []
        for group in range(groups):
            for k in range(samples):
                outcome = "correct" if k == samples - 1 else "incorrect"
                line = completion(step, group, k, outcome, tokens + step + k)
                lines.append(line if k >= samples - 2 else unselected(line))
        write_lines(run / f"trajectories/step_{step:06d}.jsonl", lines)
    return run


def make_large_run(run: Path) -> Path:
    """Write a run with 1,000 completions of 7,000 tokens, an eighth trained on."""
    make_run(run, steps=0)
    outcomes = [("incorrect", "correct")[k % 2] for k in range(16)]
    group = [completion(0, 0, k, outcome, 7000) for k, outcome in enumerate(outcomes)]
    group = [x if k < 2 else unselected(x) for k, x in enumerate(group)]
    for step in range(8):
        places = [{"step": step, "group": k // 16} for k in range(125)]
        lines = [group[k % 16] | place for k, place in enumerate(places)]
        write_lines(run / f"trajectories/step_{step:06d}.jsonl", lines)
    return run


def script(html: str, name: str) -> str:
    """Return the content of a script element."""
    (content,) = re.findall(rf'<script [^>]*id="{name}">(.*?)</script>', html, re.S)
    return content


def inflate(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def decode(html: str) -> list[list[dict]]:
    """Completions of each run, decoded independently of the page's scripts.

    A completion has the columns of the list, and, if the page contains it, `tokens` as
    (text or None) and `values` by name as (low, high, numbers).
    """
    data = json.loads(script(html, "data"))
    parts = script(html, "contents").split("\n\n")
    return [
        decode_run(run, part.split("\n"))
        for run, part in zip(data["runs"], parts, strict=True)
    ]


def decode_run(run: dict, contents: list[str]) -> list[dict]:
    table = json.loads(inflate(run["rows"]))
    names = {"question": "questions", "reason": "reasons", "outcome": "outcomes"}
    rows = []
    for i in range(len(table["step"])):
        row = {k: v[i] for k, v in table.items() if len(v) == len(table["step"])}
        row |= {k: table[v][table[k][i]] for k, v in names.items()}
        if i < len(contents) and contents[i]:
            row |= {"content": decode_content(inflate(contents[i]))}
        rows.append(row)
    return rows


def decode_content(data: bytes) -> dict:
    header, _, body = data.partition(b"\0")
    content = json.loads(header)
    units = content["text"].encode("utf-16-le")
    omitted, texts = dict(content.get("omitted", [])), []
    position = start = 0
    for token in range(content.get("tokens", 0)):
        length = shift = 0
        while True:
            byte = body[position]
            position += 1
            length |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        text = units[2 * start : 2 * (start + length)].decode("utf-16-le")
        texts.append(None if token in omitted else text)
        start += length
    values = {}
    for name, low, high in content.get("planes", []):
        codes = np.frombuffer(body[position : position + len(texts)], np.uint8)
        values[name] = (low, high, low + codes / 255 * (high - low))
        position += len(texts)
    assert position == len(body)
    return content | {"texts": texts, "values": values}


def changed(**metrics) -> list[dict]:
    """Healthy metrics with others: functions of the step."""
    return [
        row | {name: f(row["step"]) for name, f in metrics.items()} for row in healthy()
    ]


def page(*words, output="report.html") -> str:
    """Run `oreal report` and return the page."""
    assert main(["report", *map(str, words), "--output", output]) == 0
    return Path(output).read_text(encoding="utf-8")
