"""The page of `oreal report`: numbers, size, evaluations, invalid input."""

import itertools
import json
import math
import re
import tomllib
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import report_runs
from printed import ROOT
from report_runs import (
    completion,
    decode,
    make_large_run,
    make_run,
    page,
    script,
    unselected,
)
from scripted import read_lines, write_lines

from oreal_jax.cli import main
from oreal_jax.evaluation import statistics
from oreal_jax.report import charts
from oreal_jax.report.page import spread, to_script_json


def lines(run: Path) -> dict[tuple, dict]:
    files = sorted((run / "trajectories").iterdir())
    rows = itertools.chain.from_iterable(map(read_lines, files))
    return {(row["step"], row["group"], row["sample"]): row for row in rows}


# -- the page


def test_the_page_has_the_numbers_and_texts_of_the_files(run):
    (rows,) = decode(page(run))
    saved = lines(run)
    assert len(rows) == len(saved) == 24
    for row in rows:
        line, content = (
            saved.pop((row["step"], row["group"], row["sample"])),
            row["content"],
        )
        assert content["text"] == line["completion"]
        assert (row["outcome"], row["reason"]) == (line["verdict"], line["reason"])
        assert (row["tokens"], row["advantage"]) == (line["tokens"], line["advantage"])
        assert row["selected"] == line["kept"]
        if not line["kept"]:
            assert not content["values"] and not content["texts"]
            continue
        assert content["texts"] == [*line["pieces"][:-1], None]
        assert content["omitted"] == [[len(line["pieces"]) - 1, "<|im_end|>"]]
        scores = np.array(line["token_scores"])
        running = np.cumsum(scores) / np.arange(1, len(scores) + 1)
        q = 1 / (1 + np.exp(-running))
        q = q if line["verdict"] == "correct" else 1 - q
        probs = {k: np.exp(line[k]) for k in ("log_probs", "old_log_probs")}
        for name, expected in {
            "token_scores": scores,
            "entropy": np.array(line["entropy"]),
            "weight": np.maximum(2 * q - 1, 0),
            "difference": probs["log_probs"] - probs["old_log_probs"],
        }.items():
            low, high, values = content["values"][name]
            assert np.abs(values - expected).max() <= (high - low) / 510 + 1e-6
            assert low == pytest.approx(expected.min(), abs=1e-6)
            assert high == pytest.approx(expected.max(), abs=1e-6)


def test_curves_are_the_metrics_with_their_texts(run):
    data = json.loads(script(page(run), "data"))
    (part,) = data["runs"]
    rows = read_lines(run / "metrics.jsonl")
    for name, values in part["metrics"].items():
        assert values == pytest.approx([row[name] for row in rows], rel=1e-5)
    assert [c["name"] for c in data["charts"]] == list(part["metrics"])
    # Each has a text on healthy values in the table of metrics.
    for name in charts.CHARTS:
        known = charts.describe(name)
        assert known["meaning"] and (known["healthy"] or name.startswith("perf"))


def test_runs_are_side_by_side(run, tmp_path):
    other = make_run(tmp_path / "other", steps=1)
    settings = report_runs.SETTINGS | {"seed": 1}
    (other / "config.json").write_text(json.dumps(settings))
    html = page(run, other)
    data = json.loads(script(html, "data"))
    assert [part["name"] for part in data["runs"]] == [str(run), str(other)]
    assert data["differences"] == [{"name": "seed", "values": ["0", "1"]}]
    assert list(map(len, decode(html))) == [24, 8]


def test_step_limits_the_trajectories(run):
    (rows,) = decode(page(run, "--step", 1))
    assert {row["step"] for row in rows} == {1}


class Elements(HTMLParser):
    """Tags of a page, and addresses that a browser would load."""

    def __init__(self):
        super().__init__()
        self.tags, self.loaded = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        addresses = [v or "" for k, v in attrs if k in ("src", "href")]
        self.loaded += [v for v in addresses if not v.startswith("#")]


def test_text_of_a_model_is_never_markup(run):
    attack = (
        "</script><script>alert(1)</script><img src=x onerror=alert(2)><!-- /* data */ "
    )
    line = completion(
        0, 0, 0, "incorrect", 3, question=attack, reason=attack, id=attack
    )
    line |= {"completion": attack, "pieces": [attack, "", "", ""], "by": attack}
    write_lines(run / "trajectories/step_000000.jsonl", [line])
    settings = report_runs.SETTINGS | {"model": attack}
    (run / "config.json").write_text(json.dumps(settings))
    html = page(run)
    elements = Elements()
    elements.feed(html)
    assert elements.tags.count("script") == 3 and "img" not in elements.tags
    assert not elements.loaded and "http" not in html.replace("http-equiv", "").replace(
        "http://www.w3.org/2000/svg", ""
    )
    data = json.loads(script(html, "data"))
    assert data["runs"][0]["model"] == attack
    (first, *_) = [row for row in decode(html)[0] if row["step"] == 0]
    assert first["question"] == first["reason"] == first["content"]["text"] == attack
    for name in ("browser.js", "page.js", "charts.js", "contents.js"):
        source = resources.files("oreal_jax.report").joinpath(name).read_text("utf-8")
        assert not re.search(
            "innerHTML|outerHTML|insertAdjacent|document.write", source
        )


def test_an_installed_package_has_the_files_of_the_page():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    patterns = settings["package-data"]["oreal_jax.report"]
    files = (ROOT / "oreal_jax/report").glob("*.*")
    others = [file for file in files if file.suffix != ".py"]
    assert len(others) == 6
    assert all(any(file.match(p) for p in patterns) for file in others)


def test_json_in_a_script_has_no_markup_and_no_nan():
    text = to_script_json({"a": ["</script>&\u2028", math.nan, -math.inf, 0.1234567]})
    assert "<" not in text and "\u2028" not in text
    assert json.loads(text) == {"a": ["</script>&\u2028", None, None, 0.123457]}


def test_a_page_never_exceeds_its_size_and_omits_completions_not_trained_on_first(run):
    run = make_run(run.with_name("other"), steps=0)
    rows = [completion(0, 0, k, "incorrect", 500) for k in range(60)]
    rows = [unselected(row) if k % 2 else row for k, row in enumerate(rows)]
    write_lines(run / "trajectories/step_000000.jsonl", rows)
    counts = []
    for limit in (60_000, 100_000, 130_000):
        html = page(run, "--max-size", limit / 1e6)
        assert 0.8 * limit < len(html.encode()) <= limit
        (rows,) = decode(html)
        has_text = {kind: [] for kind in (0, 1)}
        for row in rows:
            has_text[row["selected"]].append("content" in row)
        counts.append((sum(has_text[1]), sum(has_text[0])))
        assert all(has_text[1]) or not any(has_text[0])
    assert sorted(counts) == counts and len(set(counts)) == 3


@pytest.mark.slow
def test_a_thousand_completions_of_7000_tokens_fit_in_ten_megabytes(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run = make_large_run(tmp_path / "run")
    html = page(run)
    assert len(html.encode()) <= 10e6
    (rows,) = decode(html)
    assert len(rows) == 1000
    assert all("content" in row for row in rows if row["selected"])


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 100])
def test_steps_are_read_in_an_order_that_is_spread_evenly(count):
    order = list(spread(count))
    assert sorted(order) == list(range(count))
    assert order[:1] == [count - 1][:count]
    for size in range(2, count):
        gaps = np.diff(sorted([-1, *order[:size]]))
        assert gaps.max() <= 4 * count / size


# -- evaluations


def test_a_greedy_evaluation_has_the_interval_of_its_outcomes(run):
    problems = [
        {"id": f"{i}", "question": f"q{i}?", "gold_answer": 1} for i in range(40)
    ]
    write_lines(run / "exam.jsonl", problems)
    evaluation = {"data": [str(run / "exam.jsonl")], "folder": "data", "samples": 1}
    settings = report_runs.SETTINGS | {"evaluation": evaluation}
    (run / "config.json").write_text(json.dumps(settings))
    key = "val-core/exam/pass@1"
    rows = [
        {"step": 0, "score": 0.25, "best": True, key: 0.25},
        {"step": 10, "score": 0.0, "best": False, key: 0.0},
        {"step": 20, "score": 0.3333, "best": False, key: 0.3333},  # of another set
    ]
    write_lines(run / "evaluations.jsonl", rows)
    (part,) = json.loads(script(page(run), "data"))["runs"]
    first, zero, other = part["evaluations"]
    assert (first["value"], first["problems"], first["best"]) == (0.25, 40, True)
    outcomes = np.random.default_rng(1).permutation(40) < 10
    exact = statistics.mean(outcomes.astype(float))
    assert first["low"] == pytest.approx(exact.low, abs=0.03)
    assert first["high"] == pytest.approx(exact.high, abs=0.03)
    none = statistics.mean(np.zeros(40))
    assert (zero["low"], zero["high"]) == pytest.approx((none.low, none.high))
    assert other["low"] is None and other["value"] == pytest.approx(0.3333)


def test_items_of_an_evaluation_have_their_interval(run):
    verdicts = ["correct"] * 3 + ["incorrect"] * 7
    rows = [
        {"set": "exam", "greedy": True, "id": f"{i}", "question": "q", "verdict": v}
        for i, v in enumerate(verdicts)
    ]
    write_lines(run / "items.jsonl", rows)
    (item,) = json.loads(script(page(run, "--items", run / "items.jsonl"), "data"))[
        "items"
    ]
    expected = statistics.mean(np.array([1.0] * 3 + [0.0] * 7))
    assert (item["measure"], item["problems"]) == ("pass@1", 10)
    values = (item["value"], item["low"], item["high"])
    assert values == pytest.approx(tuple(expected), rel=1e-5)


# -- live and killed runs, invalid input


def test_a_killed_run_is_reported_as_far_as_it_is_complete(run):
    for name in ("metrics.jsonl", "trajectories/step_000002.jsonl"):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) - 40])
    (run / "trajectories/step_000001.jsonl").write_bytes(b"")
    (run / "trajectories/.step_000003.jsonl.incomplete").write_bytes(b'{"step"')
    html = page(run)
    (rows,), data = decode(html), json.loads(script(html, "data"))
    assert len(rows) == 8 + 7
    (part,) = data["runs"]
    assert part["steps"] == [0, 1, 2, 3, 4]
    assert any("step_000002.jsonl: line 8" in note for note in part["notes"])
    assert main(["show", str(run)]) == 0


@pytest.mark.parametrize(
    "names", [["trajectories"], ["metrics.jsonl"], ["config.json"]]
)
def test_a_run_that_has_just_begun_has_a_report(run, names, capsys):
    for path in run.iterdir():
        if path.name not in names and path.is_file():
            path.unlink()
        elif path.name not in names:
            path.rename(run.with_name("elsewhere"))
    assert "oreal report" in page(run)
    assert main(["show", str(run)]) == 0


def test_a_loss_of_the_users_own_has_no_weights(run):
    settings = report_runs.SETTINGS | {
        "loss": {"class": "my_run.Loss", "credit": "os.x"}
    }
    (run / "config.json").write_text(json.dumps(settings))
    names = {n for row in decode(page(run))[0] for n in row["content"]["values"]}
    assert names == {"token_scores", "entropy", "difference"}


@pytest.mark.parametrize(
    "words, message",
    [
        (["report", "nothing"], "nothing: no such run directory"),
        (["report", "empty"], "empty: not a run directory"),
        (["show", "empty"], "empty: not a run directory"),
        (["report", "run", "--step", "7"], "--step 7: not in the trajectories of run"),
        (["show", "run", "--step", "7"], "--step 7: not in the trajectories of run"),
        (["report", "run", "--max-size", "0"], "--max-size 0: must be above 0"),
        (["report", "run", "--max-size", "0.01"], "the page without completions takes"),
        (["report", "run", "--items", "none.jsonl"], "none.jsonl: no such file"),
        (["report", "run", "--output", "empty"], "empty: a directory"),
        (["report", "run", "--output", "x", "--items", "x"], "are the same: x"),
        (["show", "run", "--metric", "nope"], "--metric nope: not in run; available: "),
        (["show", "run", "--n", "-1"], "--n -1: must be at least 0"),
    ],
)
def test_invalid_input_is_one_line(run, words, message, capsys):
    Path("empty").mkdir()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("report.html").exists()
