"""`oreal runs`: every run with its step, its last score and its state."""

import json
import os
import time
from pathlib import Path

import pytest
from scripted import write_lines

from oreal_jax import metrics
from oreal_jax.cli import main
from oreal_jax.metrics import MetricsLog
from oreal_jax.train.history import record_end, record_start
from oreal_jax.train.lock import locked

FIELDS = ("state", "reason", "step", "steps", "score", "score_step", "method")


def write_run(run: Path, finished: int, steps: int = 4, data: str = "prompts") -> Path:
    run.mkdir(parents=True)
    config = {"class": "oreal_jax.config.TrainConfig", "steps": steps, data: "d"}
    (run / "config.json").write_text(json.dumps(config))
    write_lines(run / "metrics.jsonl", [{"step": step} for step in range(finished)])
    return run


def listed(capsys, folder: Path) -> dict[str, tuple]:
    assert main(["runs", str(folder), "--json"]) == 0
    rows = map(json.loads, capsys.readouterr().out.splitlines())
    return {row["path"]: tuple(row[name] for name in FIELDS) for row in rows}


def test_every_state_is_recognised(tmp_path, capsys):
    finished = write_run(tmp_path / "a" / "finished", 4)
    record_start(finished, 0, {})
    record_end(finished, 4, "finished")
    write_lines(
        finished / "evaluations.jsonl",
        [{"step": 0, "score": 0.1}, {"step": 4, "score": 0.5}],
    )
    write_run(finished / "best", 4)  # a part of the run
    failed = write_run(tmp_path / "failed", 2)
    record_start(failed, 0, {})
    record_end(failed, 2, "failed", "Diverged: nan")
    stopped = write_run(tmp_path / "stopped", 1, steps=0, data="examples")
    record_end(stopped, 1, "stopped")
    killed = write_run(tmp_path / "killed", 3)
    record_start(killed, 0, {})
    older = [write_run(tmp_path / f"older{n}", n) for n in (3, 4)]
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert listed(capsys, tmp_path) == {
        str(finished): ("finished", "", 4, 4, 0.5, 4, "train"),
        str(failed): ("failed", "Diverged: nan", 2, 4, None, None, "train"),
        str(stopped): ("stopped", "", 1, None, None, None, "sft"),
        str(killed): ("killed", "", 3, 4, None, None, "train"),
        str(older[0]): ("stopped", "", 3, 4, None, None, "train"),
        str(older[1]): ("finished", "", 4, 4, None, None, "train"),
    }
    with locked(killed):
        assert listed(capsys, killed)[str(killed)][0] == "running"


def test_the_table_begins_with_the_newest_run(tmp_path, capsys):
    for name, seconds in (("old", 300), ("new", 20)):
        run = write_run(tmp_path / name, 2)
        for path in run.iterdir():
            os.utime(path, (0, time.time() - seconds))
    assert main(["runs", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.index("20 s") < printed.index("5 min")
    assert "stopped" in printed and "2/4" in printed


@pytest.mark.parametrize(
    ("folder", "message"),
    [("gone", "no such directory"), (".", "no run directories found")],
)
def test_a_folder_without_runs_is_named(tmp_path, capsys, folder, message):
    assert main(["runs", str(tmp_path / folder)]) == 2
    errors = capsys.readouterr().err
    assert message in errors and errors.count("\n") == 1


FOREIGN = (
    *('{"a": 1}', "[]", "null", "[" * 99_999, '{"step": null, "event": "end"}'),
    *('{"step": "x", "score": []}', f'{{"step": {10**400}, "score": {10**400}}}'),
)


@pytest.mark.parametrize("line", FOREIGN)
@pytest.mark.parametrize("name", ["metrics", "history", "evaluations"])
def test_foreign_lines_are_omitted_and_a_run_resumes(tmp_path, capsys, name, line):
    run = write_run(tmp_path / "run", 2)
    record_end(run, 2, "stopped")
    rows = [{"step": 0, "score": 0.5, "val-core/s/avg@2": 0.5}]
    write_lines(run / "evaluations.jsonl", rows)
    with (run / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    assert listed(capsys, run)[str(run)][:5] == ("stopped", "", 2, 4, 0.5)
    for words in (["show"], ["report", "--output", str(tmp_path / "page.html")]):
        assert main([*words, str(run)]) == 0
    MetricsLog(run, 1).close()
    assert [row["step"] for row in metrics.read(run / "metrics.jsonl")] == [0]


def test_a_damaged_run_does_not_hide_others(tmp_path, capsys):
    run, damaged = write_run(tmp_path / "a", 2), write_run(tmp_path / "b", 2)
    (damaged / "config.json").write_text("[" * 99_999)
    assert list(listed(capsys, tmp_path)) == [str(run)]
    assert main(["runs", str(tmp_path)]) == 0
    errors = capsys.readouterr().err
    assert f"{damaged / 'config.json'}: not readable as JSON" in errors
    assert errors.endswith("; this run is omitted\n") and errors.count("\n") == 1
