"""Shared fixtures; eight simulated devices, quick compilation, no rank promotion.

Nothing of oreal_jax is imported before a test runs: its shapes are checked only in what
is imported after pytest has begun.
"""

import fcntl
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.version import Version

# The tests spend nearly all their time on compilation. Without LLVM's optimization and
# with XLA's older emitters it takes far less; programs are the same up to rounding.
# Compiling a program in one part instead of 32 takes 7% less CPU time.
# `XLA_FLAGS= pytest ...` compiles with full optimization.
QUICK = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# Later ones do not know this flag, and end a process that has it.
if Version(metadata.version("jaxlib")) < Version("0.11"):
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Tests, workers and the processes they start share one cache of compiled programs:
    # they inherit the environment of the first process.
    PROGRAM_CACHE = tempfile.TemporaryDirectory(prefix="oreal_compiled_")
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": PROGRAM_CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

import families
import hypothesis
import jax
import pytest

# A job in a shell's background ignores Ctrl-C, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


# The tests of these files are independent and go to whichever worker is free.
SPREAD = {"tests/test_run.py"}
# The longest files start first, so that both workers finish together.
FIRST = [
    "test_processes",
    "test_sampling_invariance",  # while the other worker makes the fixtures of runs
    "test_run",
    "test_train_step",
    "test_sampling",
    "test_cli",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Send a file to one of several workers (`make test`), for its fixtures.

    `--dist loadgroup` does not work: pytest 9.2 ignores the groups of xdist 3.8.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if file in SPREAD else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    rank = {name: index for index, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(FIRST)))


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """Return `build_once(name, build)`, which returns a folder.

    The first worker to request it fills it by `build(folder)`; all others reuse it.
    """
    top = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        top = top.parent

    def get(name: str, build: Callable[[Path], object]) -> Path:
        folder, finished = top / name, top / f"{name}.finished"
        with (top / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a failed build
                build(folder)
                finished.touch()
        return folder

    return get


@pytest.fixture
def double():
    """Arrays in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", params=families.FAMILIES)
def pair(request, tmp_path_factory):
    """Return a transformers model and ours, with the same weights."""
    from oreal_jax.checkpoints import hf

    directory = tmp_path_factory.mktemp("model")
    theirs = families.write(request.param, directory)
    return theirs, hf.read_config(directory), hf.load(directory)


@pytest.fixture(scope="session")
def params():
    """Return the weights of tiny_engine.py's model."""
    import tiny_engine

    return tiny_engine.make_params()


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Five prompts for tiny_engine.py's model."""
    import tiny_engine

    return tiny_engine.make_prompts()


@pytest.fixture(scope="session")
def completions(params, prompts):
    """Three completions of each prompt by tiny_engine.py's model."""
    import tiny_engine

    return tiny_engine.sample(params, prompts)


@pytest.fixture(scope="session")
def tiny(build_once) -> Path:
    """Return a folder with the tiny model, its prompts, and a fine-tuned run of it."""
    import tiny_runs

    return build_once("tiny", tiny_runs.fine_tuned)


@pytest.fixture(scope="session")
def whole(tiny, build_once) -> Path:
    """Return an undisturbed run of five steps, from a separate process.

    The last bits of its numbers depend on the threads of the process, and so on its
    number of devices.
    """
    import tiny_runs

    return build_once("whole", lambda run: tiny_runs.finish(tiny_runs.train(tiny, run)))


@pytest.fixture(scope="session")
def start(build_once) -> Path:
    """Return the tiny model and its prompts "max A B?"."""
    import make_tiny

    return build_once("start", make_tiny.write)


@pytest.fixture(scope="session")
def shared_pool():
    """One pool of judging processes for the session, which `close` does not end."""
    from oreal_jax.verify import Pool

    class SharedPool(Pool):
        def close(self) -> None:
            pass

    pool = SharedPool(1)
    yield pool
    Pool.close(pool)


@pytest.fixture
def judges(shared_pool, monkeypatch):
    """Shares one pool among all code that judges: each takes a second to start."""
    from oreal_jax import verify
    from oreal_jax.train import loop

    for module in (verify, loop):
        monkeypatch.setattr(module, "Pool", lambda *_: shared_pool)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Return a folder to work in, with six problems of two levels."""
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
    """Return the model that answers as `scripted.answer`, in place of every engine."""
    from scripted import Script, answer

    from oreal_jax.sampling import Engine

    script = Script(start / "hf", answer)
    sample = lambda engine, *given, **named: script.sample(engine, *given, **named)
    monkeypatch.setattr(Engine, "sample", sample)
    check = Engine.check_length  # the script's answers are short
    short = lambda engine, prompt, new: check(engine, prompt, min(new, 99))
    monkeypatch.setattr(Engine, "check_length", short)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # judging processes
    return script


@pytest.fixture
def policy(start, monkeypatch):
    """Return a scripted policy in place of every engine (scripted_runs.py)."""
    from scripted_runs import Policy

    from oreal_jax.sampling import Engine

    policy = Policy(start / "hf")
    sample = lambda engine, *given, **named: policy.sample(engine, *given, **named)
    monkeypatch.setattr(Engine, "sample", sample)
    return policy


@pytest.fixture
def files(tmp_path) -> Path:
    """Return a folder with prompts, solutions and an exam."""
    from scripted_runs import write_files

    return write_files(tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """Return the run directory that reports are tested with."""
    from report_runs import make_run

    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "run")


@pytest.fixture
def config_file(tmp_path) -> Path:
    """Return the config file of a small run to plan."""
    from plans import write_config

    return write_config(tmp_path)


@pytest.fixture
def oreal(start):
    """`oreal VERB ... --model tiny`."""
    from oreal_jax.cli import main

    return lambda *words: main([*map(str, words), "--model", str(start / "hf")])
