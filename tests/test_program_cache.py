"""Cached programs are loaded by the next process, however the last one ended."""

import json
import os
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import ALONE, ROOT

from oreal_jax import metrics, program_cache
from oreal_jax.program_cache import Entries

# Three programs, one of them on four devices; prints JAX's counts of cache hits and
# misses and the exact results.
PROGRAM = """
from oreal_jax import hardware
hardware.hide_absent_devices()
import collections, json, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 4)
from oreal_jax import program_cache
program_cache.enable()
count = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: count.update([event]))
mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
split = jax.NamedSharding(mesh, jax.P("x", None))
x = np.random.default_rng(0).normal(size=(64, 64)).astype("float32")
loss = lambda x: (jax.nn.log_softmax(x @ x.T) ** 2).sum()
results = [
    jax.jit(jax.grad(loss))(x),
    jax.jit(jax.grad(loss))(jax.device_put(x, split)),
    jax.random.normal(jax.random.key(1), (5,)),
]
print(json.dumps([
    count["/jax/compilation_cache/cache_hits"],
    count["/jax/compilation_cache/cache_misses"],
    [np.asarray(y).tobytes().hex() for y in results],
]))
"""
# A user's environment: without the tests' cache and what JAX sets for libtpu.
USER = {
    name: value
    for name, value in ALONE.items()
    if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "TPU_"))
}


def launch(environment, program: str = PROGRAM) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=USER | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, int, list[str]]:
    """Numbers of programs loaded and written, and their results."""
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, "")
    return json.loads(output)


def run(environment) -> tuple[int, int, list[str]]:
    return finish(launch(environment))


def entries(directory: Path) -> list[Path]:
    return sorted(directory.glob("*-cache"))


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, list[str]]:
    """Fill a user's cache directory in a process; also return what that computed."""
    home = tmp_path_factory.mktemp("cache")
    loaded, written, numbers = run({"XDG_CACHE_HOME": str(home)})
    assert loaded == 0 and written == len(entries(home / "oreal_jax/programs")) > 4
    return home, numbers


def test_loaded_programs_give_the_same_numbers_bit_for_bit(filled):
    home, numbers = filled
    count = len(entries(home / "oreal_jax/programs"))
    assert run({"XDG_CACHE_HOME": str(home)}) == [count, 0, numbers]


def test_a_truncated_or_corrupt_entry_is_recompiled_and_replaced(filled):
    environment = {"XDG_CACHE_HOME": str(filled[0])}
    paths = entries(filled[0] / "oreal_jax/programs")
    paths[0].write_bytes(paths[0].read_bytes()[:100])
    paths[1].write_bytes(b"no program")
    paths[2].write_bytes(b"")
    paths[3].write_bytes(zlib.compress(b"0000 no program"))
    assert run(environment) == [len(paths) - 4, 4, filled[1]]
    assert run(environment) == [len(paths), 0, filled[1]]


def test_concurrent_processes_share_one_cache(filled, tmp_path):
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    for result in [finish(p) for p in [launch(environment), launch(environment)]]:
        assert result[2] == filled[1]
    count = len(entries(filled[0] / "oreal_jax/programs"))
    assert len(list((tmp_path / "oreal_jax/programs").iterdir())) == count
    assert run(environment) == [count, 0, filled[1]]


@pytest.mark.parametrize(
    "name, value",
    [("JAX_ENABLE_COMPILATION_CACHE", "0"), ("JAX_COMPILATION_CACHE_DIR", "")],
)
def test_the_cache_can_be_disabled(filled, tmp_path, name, value):
    environment = {"XDG_CACHE_HOME": str(tmp_path), name: value}
    assert run(environment) == [0, 0, filled[1]]
    assert not list(tmp_path.iterdir())


def test_the_cache_can_be_moved(filled, tmp_path):
    moved = {
        "XDG_CACHE_HOME": str(tmp_path / "a"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "b"),
    }
    run(moved)
    assert not (tmp_path / "a").exists()
    count = len(entries(filled[0] / "oreal_jax/programs"))
    assert len(entries(tmp_path / "b")) == count


def test_a_directory_that_cannot_be_created_is_ignored(filled, tmp_path):
    (tmp_path / "file").touch()
    environment = {"XDG_CACHE_HOME": str(tmp_path / "file")}
    assert run(environment)[2] == filled[1]


def test_without_a_home_nothing_is_cached(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert program_cache.default_directory() is None


@pytest.mark.parametrize("method", ["write", "replace", "utime", "read"])
def test_a_full_or_read_only_file_system_is_a_miss(tmp_path, monkeypatch, method):
    def fail(*_, **__):
        raise OSError(28, "no space left on device")

    cache = Entries(tmp_path, 1000)
    cache.put("old", b"program")
    with monkeypatch.context() as patch:
        if method == "write":
            patch.setattr(Path, "write_bytes", fail)
        elif method == "read":
            patch.setattr(Path, "read_bytes", fail)
        else:
            patch.setattr(os, method, fail)
        cache.put("new", b"program")
        read = cache.get("old")
    assert read == (None if method == "read" else b"program")
    assert cache.get("new") == (b"program" if method in ("utime", "read") else None)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_directory_that_the_user_chose_is_not_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bound = lambda path: program_cache._file_cache(str(path))[0]._max_bytes  # pyright: ignore
    assert bound(tmp_path / "oreal_jax/programs") == program_cache.MAX_BYTES
    assert bound(tmp_path) > 2**40


def test_the_least_recently_read_entries_are_evicted(tmp_path):
    cache = Entries(tmp_path, 1000)
    for age, key in enumerate(["a", "b", "c"]):
        cache.put(key, bytes(300))
        os.utime(tmp_path / f"{key}-cache", (age, age))
    assert cache.get("a")
    Entries(tmp_path, 1000).put("d", bytes(300))
    assert [path.name[0] for path in entries(tmp_path)] == ["a", "c", "d"]
    cache.put("too large", bytes(1001))
    assert cache.get("too large") is None


def test_the_file_of_a_killed_writer_is_removed(tmp_path):
    (tmp_path / "tmp1.unfinished").write_bytes(bytes(300))
    (tmp_path / "tmp2.unfinished").write_bytes(bytes(300))
    os.utime(tmp_path / "tmp1.unfinished", (1, 1))  # long ago
    Entries(tmp_path, 1000).put("a", bytes(300))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["a-cache", "tmp2.unfinished"]


def test_a_concurrent_reader_gets_a_complete_entry(tmp_path):
    contents = {bytes([i]) * 100_000 for i in range(4)}
    done = threading.Event()

    def write(content: bytes) -> None:
        cache = Entries(tmp_path, 10**9)
        while not done.is_set():
            cache.put("key", content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    reader = Entries(tmp_path, 10**9)
    entries_read = {reader.get("key") for _ in range(2000)}
    done.set()
    for writer in writers:
        writer.join()
    assert entries_read <= contents | {None} and entries_read & contents


def test_no_program_is_cached_while_disabled(filled, tmp_path):
    program = PROGRAM.replace(
        "results = [", "with program_cache.disabled(): results = ["
    )
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    assert finish(launch(environment, program)) == [0, 0, filled[1]]
    assert not list(tmp_path.iterdir())


def in_a_process(words, cache: Path) -> tuple[int, str]:
    environment = USER | {"XDG_CACHE_HOME": str(cache)}
    process = tiny_runs.oreal(*words, environment=environment)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def in_this_process(words, cache: Path) -> tuple[int, str]:
    """With the tests' cache: no other run has rows of this length."""
    metrics.compilations.take()  # those between runs
    result = tiny_runs.oreal_in_process(*words, "--set", "packing.row_length=136")
    return result.code, result.errors


def metrics_of_two_runs(start, folder: Path, call) -> list[list[dict[str, float]]]:
    """Return the metrics of two equal runs, the second with the cache of the first."""
    rows = []
    for run in (folder / "first", folder / "second"):
        words = (
            *("sft", ROOT / "configs/tiny_sft.py", "--run", run),
            *("--set", f"model={start / 'hf'}"),
            *("--set", f"examples={start / 'solutions.jsonl'}"),
            *("--set", "steps=2"),
        )
        assert call(words, folder / "cache") == (0, "")
        rows.append(metrics.read(run / "metrics.jsonl"))
    return rows


@pytest.mark.parametrize(
    "call", [in_this_process, pytest.param(in_a_process, marks=pytest.mark.slow)]
)
def test_a_second_run_compiles_nothing_and_reports_it(start, tmp_path, call):
    first, second = metrics_of_two_runs(start, tmp_path, call)
    assert first[0]["perf/compilations"] > 0 < first[0]["perf/compile_seconds"]
    assert all(step["perf/compilations"] == 0 for step in second)
    assert second[0]["perf/compile_seconds"] > 0  # of tracing and loading


@pytest.mark.slow
@pytest.mark.timed
def test_a_second_run_takes_less_time_to_compile(start, tmp_path):
    first, second = metrics_of_two_runs(start, tmp_path, in_a_process)
    seconds = [step["perf/compile_seconds"] for step in (first[0], second[0])]
    assert 0 < seconds[1] < 0.7 * seconds[0]
    assert first[1]["perf/compile_seconds"] < 0.1 * seconds[0]
    losses = [[step["actor/loss"] for step in run] for run in (first, second)]
    assert losses[0] == losses[1]
