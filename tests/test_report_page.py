"""The page of a report in a browser: filters, colours, numbers, and its speed."""

from pathlib import Path

import numpy as np
import pytest
from chromium import PROGRAM, Chromium
from report_runs import completion, make_large_run, make_run
from scripted import read_lines, write_lines

from oreal_jax.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM, reason="no chromium on this machine"),
]
READY = "document.documentElement?.dataset.ready"
ATTACK = "<!--<script>/* data */<img src=x onerror='window.attacked = 1'></script>"


@pytest.fixture(scope="module")
def browser():
    chromium = Chromium()
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Three steps of four prompts; the first completion has unusual text."""
    run = make_run(tmp_path_factory.mktemp("page") / "run", groups=4)
    path = run / "trajectories/step_000002.jsonl"
    rows = read_lines(path)
    text = f"a\u00e9\U0001f600{ATTACK}"
    pieces = ["a", "\ufffd", "\ufffd", "\U0001f600", ATTACK, "<|im_end|>"]
    # Of a prompt whose incorrect completion is in row 2, the correct one in row 3.
    rows[2] = completion(2, 0, 2, "incorrect", 5, completion=text, pieces=pieces)
    write_lines(path, rows)
    scores = {"val-core/exam/pass@1": 0.5, "val-core/other/pass@1": 0.25}
    evaluations = [{"step": n, "score": 0.4, "best": n == 0} | scores for n in (0, 10)]
    write_lines(run / "evaluations.jsonl", evaluations)
    return run


@pytest.fixture
def page(browser, run, tmp_path):
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    browser.errors.clear()
    browser.requests.clear()
    browser.open(output, READY)
    yield browser
    assert not browser.errors
    assert [url[:5] for url in browser.requests if url[:5] != "blob:"] == ["file:"]
    assert not browser.evaluate("window.attacked")


def rows(page) -> list[list[str]]:
    """Return the cells of the list."""
    script = "[...document.querySelectorAll('#list tbody tr')].map(row => "
    return page.evaluate(script + "[...row.children].map(cell => cell.textContent))")


def set_filter(page, name: str, value: str) -> None:
    element = f"document.querySelector('#filters [name={name}]')"
    event = "dispatchEvent(new Event('input', {bubbles: true}))"
    page.evaluate(f"{element}.value = {value!r}; {element}.{event}; browser.filter()")


def open_row(page, row: int) -> list[str]:
    """Open a completion and return the texts of the cards."""
    page.evaluate(f"browser.open({row})")
    script = "[...document.querySelectorAll('.card .text')].map(x => x.textContent)"
    return page.evaluate(script)


def text(page, selector: str) -> str:
    return page.evaluate(f"document.querySelector('{selector}').textContent")


def find(page, step: int, sample: int, group: int = 0) -> int:
    """Return the number of a completion in the page's list."""
    condition = (
        f"t.step[i] == {step} && t.sample[i] == {sample} && t.group[i] == {group}"
    )
    script = f"(t => t.step.findIndex((_, i) => {condition}))(browser.tables[0])"
    return page.evaluate(script)


def test_filters_select_completions(page, run):
    assert len(rows(page)) == 48
    assert [row[0] for row in rows(page)] == ["2"] * 16 + ["1"] * 16 + ["0"] * 16
    for name, value, count in [
        ("outcome", "correct", 12),
        ("kind", "selected", 24),
        ("kind", "pairs", 24),
        ("reason", "1 is not", 12),
        ("first", "2", 16),
        ("last", "0", 16),
        ("shortest", "17", 11),
        ("longest", "13", 5),
        ("search", "problem 3", 12),
        ("search", "nowhere", 0),
        ("by", "rule", 48),
    ]:
        set_filter(page, name, value)
        assert len(rows(page)) == count, (name, value)
        set_filter(page, name, "")
    assert len(rows(page)) == 48
    page.evaluate("document.querySelector('[name=texts]').checked = true")
    set_filter(page, "search", "onerror")
    assert [row[:2] for row in rows(page)] == [["2", "incorrect"]]


def test_a_pair_is_side_by_side_with_its_texts(page, run):
    saved = read_lines(run / "trajectories/step_000002.jsonl")
    correct, incorrect = open_row(page, find(page, 2, 2))
    assert incorrect == f"a\u00b7\u00e9\U0001f600{ATTACK}<|im_end|>"
    assert correct == saved[3]["completion"] + "<|im_end|>"
    (other,) = open_row(page, find(page, 2, 0))  # not trained on
    assert other == saved[0]["completion"]


def test_tokens_are_coloured_by_their_numbers_which_show_under_the_pointer(page, run):
    line = read_lines(run / "trajectories/step_000002.jsonl")[3]
    open_row(page, find(page, 2, 3))
    choices = "[...document.querySelector('#quantity').options].map(o => o.value)"
    assert page.evaluate(choices) == [
        *("token_scores", "weight", "advantage", "entropy", "difference")
    ]
    scores = np.array(line["token_scores"])
    spans = "[...document.querySelectorAll('.card')][0].querySelectorAll('.text span')"
    colours = page.evaluate(f"[...{spans}].map(x => x.style.backgroundColor)")
    assert len(colours) == len(scores)
    for score, colour in zip(scores, colours, strict=True):
        assert ("--minus" in colour) == (score < 0), (score, colour)
    opacity = [float(colour.split(",")[-1].strip(" )")) for colour in colours]
    order = np.argsort(np.abs(scores))
    assert np.all(np.diff(np.array(opacity)[order]) >= -0.01)
    for token in range(0, len(scores), 5):
        event = "dispatchEvent(new PointerEvent('pointermove', {bubbles: true}))"
        page.evaluate(f"{spans}[{token}].{event}")
        tip = page.evaluate("document.querySelector('#tip').textContent").split("\n")
        numbers = {line.split(": ")[0]: line.split(": ")[-1] for line in tip}
        spread = (scores.max() - scores.min()) / 510
        assert float(numbers["token score"]) == pytest.approx(
            scores[token], abs=spread * 1.1
        )
        entropy = np.array(line["entropy"])
        spread = (entropy.max() - entropy.min()) / 510
        assert float(numbers["entropy"]) == pytest.approx(
            entropy[token], abs=spread * 1.1
        )
        weight = float(numbers["weight (omega)"]) * line["advantage"]
        shown = float(numbers["weight x advantage"])
        assert shown == pytest.approx(weight, rel=2e-3, abs=1e-6)
    quantity = "document.querySelector('#quantity')"
    change = "dispatchEvent(new Event('change'))"
    page.evaluate(f"{quantity}.value = 'entropy'; {quantity}.{change}")
    colours = page.evaluate(f"[...{spans}].map(x => x.style.backgroundColor)")
    assert not any("--minus" in colour for colour in colours)


def test_curves_and_tables_are_drawn(page):
    figures = page.evaluate("document.querySelectorAll('#curves polyline').length")
    assert figures == page.evaluate("browser.data.charts.length") > 10
    assert page.evaluate("document.querySelectorAll('#reward polyline').length") == 4
    assert "None." in text(page, "#warnings")
    assert "exampass@1after step 050.0%, best so far" in text(page, "#evaluations")
    assert page.evaluate("document.querySelectorAll('#evaluations figure').length") == 2


def test_runs_share_curves_and_each_has_its_list(browser, run, tmp_path):
    """One of them has no file but its settings; texts of the others are omitted."""
    begun, output = tmp_path / "begun", tmp_path / "report.html"
    begun.mkdir()
    (begun / "config.json").write_text('{"class": "oreal_jax.config.TrainConfig"}')
    item = {"set": "exam", "id": "a", "question": "q", "verdict": "correct"}
    write_lines(tmp_path / "items.jsonl", [item | {"greedy": True}])
    words = [begun, run, run, "--items", tmp_path / "items.jsonl", "--max-size", 0.08]
    assert main(["report", *map(str, words), "--output", str(output)]) == 0
    browser.errors.clear()
    browser.open(output, READY)
    assert rows(browser) == []
    lines = "document.querySelectorAll('#curves polyline').length"
    assert browser.evaluate(lines) == 2 * browser.evaluate("browser.data.charts.length")
    assert "seed" in text(browser, "#curves")  # a setting that differs
    assert "items.jsonl1100.0% (2.5% to 100.0%)" in text(browser, "#evaluations")
    browser.evaluate("browser.setRun(2)")
    assert len(rows(browser)) == 48
    last = browser.evaluate("browser.contents[2].length")
    assert last < 48
    (shown,) = open_row(browser, 47)
    assert "omitted" in shown
    assert not browser.errors


@pytest.mark.timed
def test_a_page_of_ten_megabytes_opens_in_two_seconds(browser, tmp_path):
    run = make_large_run(tmp_path / "run")
    output = tmp_path / "report.html"
    assert main(["report", str(run), "--output", str(output)]) == 0
    browser.open(output, READY)  # the browser itself starts
    assert browser.open(output, READY) < 2
    assert len(open_row(browser, find(browser, 7, 0))[0]) > 7000
