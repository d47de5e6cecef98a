"""Eight fake devices, shapes that must agree without silent broadcasting, and what
several files start from.

Nothing of oreal_jax is imported before a test runs: its shapes are checked only in what
is imported after pytest has begun.
"""

import os
import signal
from pathlib import Path

import families
import hypothesis
import jax
import pytest

# A job in a shell's background ignores Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_compilation_cache", False)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture
def double():
    """Arrays in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", params=families.FAMILIES)
def pair(request, tmp_path_factory):
    """A transformers model and ours, with the same weights."""
    from oreal_jax.checkpoints import hf

    directory = tmp_path_factory.mktemp("model")
    theirs = families.write(request.param, directory)
    return theirs, hf.read_config(directory), hf.load(directory)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with the tiny model, its prompts, and a fine-tuned run of it."""
    import tiny_runs

    return tiny_runs.fine_tuned(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def whole(tiny) -> Path:
    """A run of five steps that nothing disturbs."""
    import tiny_runs

    tiny_runs.finish(tiny_runs.train(tiny, tiny / "whole"))
    return tiny / "whole"


@pytest.fixture(scope="session")
def start(tmp_path_factory) -> Path:
    """The tiny model and its prompts "max A B?"."""
    import make_tiny

    home = tmp_path_factory.mktemp("start")
    make_tiny.write(home)
    return home


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with six problems of two levels."""
    import scripted

    monkeypatch.chdir(tmp_path)
    scripted.write_lines(
        tmp_path / "six.jsonl",
        [
            {"id": f"{a}", "question": f"max {a} 7?", "gold_answer": 7, "level": a % 2}
            for a in range(6)
        ],
    )
    return tmp_path


@pytest.fixture
def script(start, monkeypatch):
    """The model that says what `scripted.says` does, in place of every engine."""
    from scripted import Script, says

    from oreal_jax.sampling import Engine

    script = Script(start / "hf", says)
    sample = lambda engine, *given, **named: script.sample(engine, *given, **named)
    monkeypatch.setattr(Engine, "sample", sample)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # judging processes
    return script


@pytest.fixture
def oreal(start):
    """`oreal VERB ... --model tiny`."""
    from oreal_jax.cli import main

    return lambda *words: main([*map(str, words), "--model", str(start / "hf")])
