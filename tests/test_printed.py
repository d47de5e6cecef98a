"""Every printed command and Python snippet works.

`printed.py` collects them, bash splits them, and each program has a rule here. Bash
runs stand-in programs that record their arguments. `oreal` and the tools then run in
this process, in a folder with small files under all printed names. Decoding and
training have stand-ins too, except in the slow tests.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import printed
import pytest
from printed import ROOT, Printed
from scripted import read_lines, write_lines
from test_loss_lab import two_groups

from oreal_jax import config as configuration
from oreal_jax import config_loading
from oreal_jax.cli import main, parser
from oreal_jax.errors import Failure, InputError

ALL = printed.collect_all(parser())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
# Values of placeholder names.
PLACEHOLDERS = {
    "CONFIG": "configs/tiny.py",
    "CONFIG.py": "configs/tiny.py",
    "FILE": "runs/demo/run/trajectories/step_000005.jsonl",
    "T": "v5p:2x2x4",
}
OUTPUTS = ("out", "items", "json", "removed", "picture", "run", "destination")
SMALL = {
    "train": (
        *("steps=2", "freeze_steps=0", "prompts_per_step=2", "samples_per_prompt=2"),
        *("sampling.max_tokens=8", "decode_rows=4", "packing.rows=1"),
    ),
    "sft": ("steps=2", "examples_per_step=4", "packing.rows=1"),
}
# Tools that complete in a few seconds; the others run with `--smoke`, as slow tests.
QUICK = {"make_tiny", "plot_run", "simulate_slots"}
SMOKES = [
    "ablation.py runs/ablation",
    "bench_eight_bits.py runs/demo/start",
    "bench_sampling.py runs/demo/start",
    "bench_start.py runs/tiny_start/hf",
    "bench_train.py runs/demo/start",
    "bench_train.py runs/demo/start --compile",
    "bench_verify.py math500.jsonl --solutions gsm8k_test.jsonl",
    "demo.py",
    "gradient_error.py",
]
# Models that are not on this machine: paths on pods, and names on the hub.
REMOTE = re.compile(r"/mnt/|(internlm|deepseek-ai)/")

RECORD = """#!/bin/bash
{ printf '%d\\0' $#; printf '%s\\0' "${0##*/}" "$@"; env | grep ^OREAL_ || :
  printf '\\0'; } >> "$CALLS"
"""
STAND_INS = {
    **dict.fromkeys(("oreal", "python", "make", "pip", "ruff", "pyright"), RECORD),
    **dict.fromkeys(("python3", "python3.11", "hf", "mkdocs", "curl"), RECORD),
    "lm_eval": RECORD,
    **dict.fromkeys(("sudo", "git", "tar", "scancel", "scontrol"), "#!/bin/bash\n"),
    "gcloud": """#!/bin/bash
[[ "$*" != *describe* ]] || echo ACTIVE
for word; do [[ $word != --command=* ]] || bash -euc "${word#--command=}"; done
""",
    "sbatch": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
SLURM_JOB_ID=1 exec bash "$@"
""",
    "srun": """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
""",
}


# -- files under all printed names


@pytest.fixture(scope="module")
def judges() -> Iterator[Any]:
    """One pool of judging processes for all commands."""
    from oreal_jax.verify import Pool

    with Pool(1) as pool:
        yield pool


def stand_in(engine, weights, requests, samples, **options) -> list[list]:
    """Replace `Engine.sample`: every second completion answers 7."""
    import make_tiny

    from oreal_jax.sampling import Completion

    tokenizer, groups = make_tiny.tokenizer(), []
    for place, _ in enumerate(requests):
        texts = [f"It is {7 if (place + k) % 2 else 8}" for k in range(samples)]
        tokens = [[*tokenizer.encode(t), tokenizer.eos_token_id] for t in texts]
        group = [Completion(t, np.zeros(len(t)), None, "stop") for t in tokens]
        for sample, completion in enumerate(group):
            options.get("on_finished", lambda *_: None)(place, sample, completion)
            options.get("on_progress", lambda *_: None)(len(completion.tokens), 1)
        groups.append(group)
    return groups


def lay_out(home: Path, hf: Path) -> None:
    """Write a small file or model under every printed name."""
    from oreal_jax import config
    from oreal_jax.checkpoints.source import import_model
    from oreal_jax.data import load_prompts
    from oreal_jax.data.builder import write_prompts
    from oreal_jax.mesh import MeshShape, make_mesh

    demo, steps = home / "runs/demo", home / "runs/pass"
    for folder in (demo, steps, home / "data", home / "docs"):
        folder.mkdir(parents=True)
    import_model(
        hf, demo / "start", lambda m: make_mesh(MeshShape(), m), np.dtype("float32")
    )
    shutil.copytree(demo / "start", demo / "run")
    settings = config.TrainConfig(model="runs/demo/start", prompts="prompts")
    (demo / "run/config.json").write_text(json.dumps(config.as_json(settings)))
    (demo / "run/trajectories").mkdir()
    for step in (5, 9):
        two_groups(demo / f"run/trajectories/step_{step:06d}.jsonl")
    metrics = {"step": 0, "critic/score/mean": 0.5, "response_length/mean": 4}
    write_lines(demo / "run/metrics.jsonl", [metrics])
    starts = ("sft", "tiny_sft", "my_run", "pass/rft", "pass/oreal/best")
    for name in starts:
        add_link(demo / "start", home / "runs" / name)
    (home / "runs/tiny_start").mkdir()
    for name in (
        "runs/tiny_start/hf",
        "runs/demo/exported",
        "models/qwen",
        "DIR",
        "SRC",
        "STRONG",
    ):
        add_link(hf, home / name)
    add_link(demo / "run", home / "RUN")

    def rows(what: str, count: int, **fields) -> list[dict]:
        return [
            {"id": f"{what}{i}", "question": f"{what} {i}?", "gold_answer": "7"}
            | {"solution": "It is 7"}
            | fields
            for i in range(count)
        ]

    measured = {"pass_rate": 0.25, "skills": ["addition"], "level": 1}
    for name, content in {
        "runs/demo/train.jsonl": rows("train", 72),
        "runs/demo/heldout.jsonl": rows("held", 64),
        "runs/tiny_start/prompts.jsonl": rows("tiny", 8),
        "runs/tiny_start/solutions.jsonl": rows("tiny", 8),
        "runs/pass/raw.jsonl": rows("raw", 4),
        "runs/pass/exam.jsonl": rows("exam", 4),
        "runs/pass/again.jsonl": rows("again", 4, **measured),
        "runs/pass/solutions.jsonl": rows("raw", 8),
        "data/math500.jsonl": rows("math", 8, level=1),
        "raw.jsonl": rows("raw", 4),
        "heldout.jsonl": rows("held", 4),
        "measured.jsonl": rows("raw", 4, **measured),
        "weak.jsonl": rows("weak", 4),
        "all.jsonl": rows("raw", 8),
        "math500.jsonl": rows("math", 4, level=1),
        "olympiadbench.jsonl": rows("olympiad", 4),
        "gsm8k_test.jsonl": rows("gsm", 21),
    }.items():
        write_lines(home / name, content)
    for name in ("prompts", *(f"runs/pass/{x}" for x in ("clean", "prompts", "train"))):
        write_prompts(load_prompts(str(home / "weak.jsonl")), home / name)
    (snippet,) = (
        i for i in ALL if (i.file, i.kind) == ("docs/quickstart.md", "snippet")
    )
    (home / "my_run.py").write_text(snippet.text)
    for name in ("skills.txt", "runs/pass/skills.txt"):
        (home / name).write_text("addition\nmultiplication\n")


def add_link(target: Path, link: Path) -> None:
    """Links a name to another part of the layout."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent))


@pytest.fixture(scope="module")
def layout(start, judges, tmp_path_factory) -> Path:
    """Return the folder that each command starts in."""
    home = tmp_path_factory.mktemp("printed") / "home"
    home.mkdir()
    shutil.copytree(start / "hf", home / "tiny")
    config = json.loads((home / "tiny/config.json").read_text())
    config["max_position_embeddings"] = 4096  # room for the printed --max-tokens
    (home / "tiny/config.json").write_text(json.dumps(config))
    lay_out(home, home / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        share_pool(patch, judges)
        without_decoding(patch)
        judged = ["--completions", "judged.jsonl", "--out", "measured_again.jsonl"]
        model = ["--model", "runs/demo/start", "--data", "weak.jsonl", "--k", "4"]
        assert main(["data", "pass-rate", *model, *judged]) == 0
        assert main(["eval", *model, "--greedy", "--items", "before.jsonl"]) == 0
    for name in ("after.jsonl", "runs/pass/start.jsonl", "runs/pass/best.jsonl"):
        shutil.copy(home / "before.jsonl", home / name)
    shutil.copy(home / "judged.jsonl", home / "runs/pass/judged.jsonl")
    (home / ".venv").mkdir()
    (home / ".venv/bin").mkdir()
    for name, text in STAND_INS.items():
        (home / ".venv/bin" / name).write_text(text)
        (home / ".venv/bin" / name).chmod(0o755)
    (home / "oreal-jax").symlink_to(".")  # the checkout on a host of a pod
    for name in ("configs", "tools", "tests"):
        (home / name).symlink_to(ROOT / name)
    return home


# -- stand-ins for minutes of work


def share_pool(patch: pytest.MonkeyPatch, judges) -> None:
    """Make all commands use one pool of judging processes."""
    from oreal_jax.verify import Pool

    patch.setattr(Pool, "__init__", lambda *_, **__: None)
    patch.setattr(Pool, "__enter__", lambda _: judges)
    patch.setattr(Pool, "__exit__", lambda *_: None)


def without_decoding(patch: pytest.MonkeyPatch) -> None:
    """Replace decoding and the copy of weights."""
    from oreal_jax.sampling import Engine

    patch.setattr(Engine, "sample", stand_in)
    patch.setattr(Engine, "check_length", lambda *_: None)
    patch.setattr(Engine, "weights", lambda engine, params: params)


def without_training(patch: pytest.MonkeyPatch) -> None:
    """End runs after reading their config and files, and plans before compiling."""
    from oreal_jax import distributed, plan
    from oreal_jax.checkpoints.source import open_model
    from oreal_jax.data import load_prompts, read_examples
    from oreal_jax.evaluation import load_sets
    from oreal_jax.plan import compiler, gpus
    from oreal_jax.sampling import session
    from oreal_jax.serve import scorer, server

    def read_model(config) -> None:
        if not REMOTE.match(config.model):
            open_model(config.model)

    def train(config, run, screen, profile=0) -> None:
        read_model(config)
        if not REMOTE.match(config.prompts):
            load_prompts(config.prompts)
        load_sets(config.evaluation.data, Path(config.evaluation.folder))

    def sft(config, run, screen, profile=0) -> None:
        read_model(config)
        read_examples(Path(config.examples))

    def make_plan(config, topology, mean_tokens, on_program):
        plan.load_shape(config)
        if topology.split(":")[0] in gpus.GPUS:
            gpus.gpu_devices(topology)
        elif not re.fullmatch(r"v(4|5p|5e|6e):\d+x\d+(x\d+)?", topology):
            raise InputError(f"--topology {topology}: no such topology")
        elif util.find_spec("libtpu"):
            compiler.tpu_devices(topology)
        return types.SimpleNamespace(fits=True)

    for module, name, work in [
        ("oreal_jax.train.loop", "train_oreal", train),
        ("oreal_jax.train.sft", "train_sft", sft),
    ]:
        patch.setattr(importlib.import_module(module), name, work)
    real = plan.make_plan
    patch.setattr(plan, "make_plan", functools.wraps(real)(make_plan))
    patch.setattr("oreal_jax.plan.show.show", lambda *_: None)
    real_scorer = scorer.Scorer
    stand_in_session = mock.MagicMock(spec=session.Session, slots=1)
    patch.setattr(session, "Session", lambda *_: stand_in_session)
    for name in ("warm_up", "Server"):
        patch.setattr(server, name, mock.MagicMock())
    patch.setattr(scorer, "Scorer", lambda *_: mock.MagicMock(spec=real_scorer))
    patch.setattr(server, "listen", lambda *_: contextlib.nullcontext())
    patch.setattr(distributed, "initialized", lambda *_: contextlib.nullcontext())


def without_hub(patch: pytest.MonkeyPatch) -> None:
    """Replace downloads and uploads."""
    from oreal_jax import hub

    def fetch(repository, *, revision, output):
        return hub.Download(output or Path(repository), "model", [], "0")

    patch.setattr(hub, "fetch", fetch)
    patch.setattr(hub, "create_repository", lambda *_, **__: None)
    patch.setattr(hub, "upload", lambda *_: "")


# -- rules


class Check:
    """Runs a printed command by its rule; fails if it does not work."""

    def __init__(self, home: Path, patch: pytest.MonkeyPatch, nodes: dict, deep=False):
        self.home, self.patch, self.nodes, self.deep = home, patch, nodes, deep
        self.programs: dict[str, Callable[[list[str]], None]] = {
            "oreal": self.oreal,
            "make": self.make,
            "pip": self.pip,
            **dict.fromkeys(("python", "python3", "python3.11"), self.python),
            **dict.fromkeys(("ruff", "pyright", "mkdocs"), lambda words: None),
            "hf": self.hf,
            "curl": self.curl,
            "lm_eval": self.lm_eval,
        }
        self.complete = True

    def __call__(self, item: Printed) -> None:
        rules = {
            "options": self.options,
            "path": self.path,
            "message": check_message,
        }
        if item.kind in rules:
            rules[item.kind](item.text)
        elif item.kind in ("block", "inline"):
            self.complete = item.kind == "block"
            self.shell(item.text, variables(item.file))
        else:
            pytest.fail(f"no rule for a block: {item.text}")

    def shell(self, text: str, prelude: str = "") -> None:
        """Lets bash find programs and their arguments; applies the rule of each."""
        calls = self.home / ".calls"
        calls.write_bytes(b"")
        environment = os.environ | {"CALLS": str(calls), "PAUSE": "0"}
        environment["PATH"] = f"{self.home / '.venv/bin'}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{prelude}\n{text}"],
            cwd=self.home,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, f"no rule for it, or it failed: {result.stderr}"
        fields = iter(calls.read_text().split("\0")[:-1])
        recorded = [
            ([next(fields) for _ in range(int(count) + 1)], next(fields))
            for count in fields
        ]
        for (program, *words), exported in recorded:
            for line in exported.splitlines():
                name, _, value = line.partition("=")
                assert name in documented_variables(), f"{name} is read nowhere"
                self.patch.setenv(name, value)
            self.programs[program](words)

    def oreal(self, words: list[str]) -> None:
        """Run the verb; in prose, where arguments may be omitted, only parse them."""
        words = [PLACEHOLDERS.get(word, word) for word in words]
        if words[0] == "sft":
            words = [
                word.replace("configs/tiny.py", "configs/tiny_sft.py") for word in words
            ]
        try:
            parsed = parser().parse_args(words)
        except SystemExit as end:
            if end.code == 0:  # --help
                return
            assert not self.complete, f"oreal {shlex.join(words)}: not accepted"
            parsed = relaxed(parser()).parse_args(words)
            for word in words:
                assert not word.endswith(".py") or (self.home / word).is_file(), word
            return
        for name in OUTPUTS:
            self.remove(vars(parsed).get(name))
        if parsed.call.__name__ == "pass_rate":
            self.remove(parsed.completions)
        if parsed.call.__name__ in SMALL and self.deep:
            self.remove(parsed.run or Path("runs") / parsed.config.stem)
            small = SMALL[parsed.call.__name__]
            words += [word for setting in small for word in ("--set", setting)]
        elif self.deep and "max_tokens" in parsed:
            words += ["--max-tokens", "8"]
        parsed = parser().parse_args(words)
        try:
            parsed.call(parsed)
        except (InputError, Failure) as error:
            omitted = not self.complete and "takes either" in str(error)
            assert omitted, f"oreal {shlex.join(words)}: {error}"

    def remove(self, output: Any) -> None:
        """Remove what an earlier command wrote."""
        path = self.home / output if isinstance(output, Path) else None
        if path and (path.is_symlink() or path.is_file()):
            path.unlink()
        elif path and path.is_dir():
            shutil.rmtree(path)

    def make(self, words: list[str]) -> None:
        """Check that targets exist and the commands of their recipes work."""
        targets = (ROOT / "Makefile").read_text().split(".PHONY:")[1].split("\n")[0]
        assert set(words) <= set(targets.split()), f"make {words}: no such target"
        # Not with the variables of the `make` that these tests may run under.
        outer = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "VENV")
        result = subprocess.run(
            ["make", "-n", "-C", ROOT, "--no-print-directory", *words],
            env={k: v for k, v in os.environ.items() if k not in outer},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        # The matrix is `make test` with Pythons that this machine may not have.
        matrix = words == ["test-matrix"]
        self.shell("make test" if matrix else result.stdout)

    def python(self, words: list[str]) -> None:
        """Apply the rules of tools, pytest, pip and make's recipes."""
        match words:
            case ["-m", "pytest", *rest]:
                self.pytest(rest)
            case ["-m", "pip", *rest]:
                self.pip(rest)
            case ["-m", "venv", _]:
                pass
            case ["-c", source]:
                compile(source, "-c", "exec")
            case ["docs/hooks.py"]:  # tests/test_docs.py
                assert (ROOT / "docs" / "hooks.py").exists()
            case [path, *rest] if path.startswith("tools/"):
                self.tool(path, rest)
            case _:
                pytest.fail(f"no rule for python {words}")

    def tool(self, path: str, words: list[str]) -> None:
        """Run a quick tool; check options and input files of the others."""
        assert (self.home / path).is_file(), f"{path}: no such tool"
        module = importlib.import_module(Path(path).stem)
        parsed = module.parser().parse_args(words)
        for name, value in vars(parsed).items():
            for file in value if isinstance(value, list) else [value]:
                if isinstance(file, Path) and name not in ("directory", "picture"):
                    assert (self.home / file).exists(), f"{path}: no {file}"
        if Path(path).stem in QUICK:
            self.remove(vars(parsed).get("directory"))
            assert not module.main(words)

    def pytest(self, words: list[str]) -> None:
        """Check that markers are declared and that files and test names exist."""
        options = argparse.ArgumentParser()
        options.add_argument("-m", default="")
        options.add_argument("-k", default="")
        options.add_argument("-n")
        options.add_argument("--no-loadscope-reorder", action="store_true")
        options.add_argument("files", nargs="*")
        parsed = options.parse_args(words)
        declared = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
        known = {marker.split(":")[0] for marker in declared} | {"not", "and", "or"}
        assert set(parsed.m.split()) <= known, f"-m {parsed.m}: no such marker"
        names = [name for file in parsed.files for name in self.nodes_of(file)]
        assert not parsed.k or any(parsed.k in name for name in names), parsed.k

    def nodes_of(self, file: str) -> list[str]:
        """Return the tests of a file, as pytest collects them."""
        assert (ROOT / file).is_file(), f"{file}: no such file"
        return self.nodes[file]

    def path(self, text: str) -> None:
        """Check that a file, folder or test of this repository exists."""
        file, _, name = text.partition("::")
        candidates = [ROOT / file, *(ROOT / "oreal_jax").glob(f"**/{file}")]
        exists = any(candidate.exists() for candidate in candidates)
        assert exists, f"{file}: no such file"
        if name:
            tests = [node.partition("::")[2] for node in self.nodes_of(file)]
            assert name in [test.partition("[")[0] for test in tests], text

    def pip(self, words: list[str]) -> None:
        """Check pip's options, and that extras are declared."""
        from pip._internal.commands import create_command

        assert words[0] == "install"
        _, requirements = create_command("install").parser.parse_args(words[1:])
        editable = [word for word in words[1:] if word.startswith((".", "oreal-jax"))]
        for requirement in {*requirements, *editable}:
            name, extra = re.match(r"([\w.-]+)(?:\[(\w+)\])?", requirement).groups()  # pyright: ignore
            if extra and name in (".", "oreal-jax"):
                assert extra in EXTRAS, f"{requirement}: no such extra"
            elif extra:
                provided = metadata.metadata(name).get_all("Provides-Extra") or []
                assert extra in provided, f"{requirement}: no such extra"

    def hf(self, words: list[str]) -> None:
        """Check the options of the Hugging Face client; download nothing."""
        verb, *rest = words
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", verb, "--help"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        for word in rest:
            known = not word.startswith("--") or word in result.stdout
            assert known, f"hf {verb}: no option {word}"

    def curl(self, words: list[str]) -> None:
        """Check the path and the body of a request to `oreal serve`."""
        from oreal_jax.serve import protocol

        options = argparse.ArgumentParser()
        options.add_argument("url")
        for name in ("-H", "-d"):
            options.add_argument(name)
        parsed = options.parse_args(words)
        address, _, path = parsed.url.removeprefix("http://").partition("/")
        assert address == "127.0.0.1:8000", parsed.url
        kinds = {"v1/chat/completions": protocol.ChatFields}
        if parsed.d is None:
            assert path in ("v1/models", "metrics", "health"), path
        else:
            assert parsed.H == "Content-Type: application/json"
            protocol._parse(kinds[path], json.loads(parsed.d))

    def lm_eval(self, words: list[str]) -> None:
        """Check the address of the server; a slow test runs such a command."""
        arguments = words[words.index("--model_args") + 1]
        model, url, _ = arguments.split(",")
        assert words[:3] == ["run", "--model", "local-chat-completions"]
        assert model == "model=demo"
        assert url == "base_url=http://127.0.0.1:8000/v1/chat/completions"

    def options(self, text: str) -> None:
        """Check that a verb or tool has the options, or a config the setting."""
        words = shlex.split(text)
        if words in (["--help"], ["--set"]):
            return
        if words[0] == "--set":
            return check_setting(words[1])
        values = {"N": "1", "FIELD": "level", "FILE": "x.jsonl"}
        words = [values.get(word, word) for word in words]
        parsers = [relaxed(verb) for verb in verbs(parser())]
        takes = lambda command: (
            accepts(command, words) or accepts(command, [*words, "1"])
        )
        if not any(map(takes, parsers)):
            sources = [
                path.read_text()
                for path in (ROOT / "tools").iterdir()
                if path.is_file()
            ]
            quoted = re.compile(rf"""["| ]{re.escape(words[0])}["| )]""")
            assert any(map(quoted.search, sources)), f"{text}: no verb or tool has it"
            assert len(words) == 1, f"no rule for {text}"


def verbs(command: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Return the parsers of all verbs."""
    inner = [a for a in command._actions if isinstance(a, argparse._SubParsersAction)]
    if not inner:
        yield command
    for action in inner:
        for verb in action.choices.values():
            yield from verbs(verb)


def relaxed(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make all arguments of a parser optional, for parts of commands."""
    for action in command._actions:
        action.required = False
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                relaxed(verb)
        elif not action.option_strings:
            action.nargs = "*" if action.nargs == "+" else action.nargs or "?"
    for group in command._mutually_exclusive_groups:
        group.required = False
    return command


def accepts(command: argparse.ArgumentParser, words: Sequence[str]) -> bool:
    """Whether a parser accepts these words."""
    try:
        command.parse_args(words)
    except SystemExit:
        return False
    return True


def check_setting(setting: str) -> None:
    """Fails unless a config has the field, with a value of that type."""
    errors = []
    for path in sorted((ROOT / "configs").glob("*.py")):
        kinds = (configuration.TrainConfig, configuration.SftConfig)
        for kind in kinds:
            try:
                return config_loading.load(path, kind, [setting])
            except InputError as error:
                errors.append(str(error))
    pytest.fail(errors[0])


@functools.cache
def strings() -> list[str]:
    """Return the texts of the program, with "..." in place of values."""

    def text(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=str(literal)):
                return literal
            case ast.JoinedStr(values=parts):
                return "".join(map(text, parts))
        return "..."

    trees = [ast.parse(path.read_text()) for path in (ROOT / "oreal_jax").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return [
        text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)
    ]


def check_message(text: str) -> None:
    """Fail unless a text of the program has these parts in this order."""
    parts = [re.escape(part) for part in re.split(r"(?:\.{3})+", text)]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    assert any(map(pattern.search, strings())), f"no such message: {text}"


@functools.cache
def documented_variables() -> set[str]:
    """Return the environment variables that the program reads."""
    sources = [path.read_text() for path in (ROOT / "oreal_jax").rglob("*.py")]
    return {name for text in sources for name in re.findall(r"\bOREAL_\w+", text)}


def variables(file: str) -> str:
    """Return assignments of shell variables in a document, for its commands."""
    lines = [item.text for item in ALL if item.file == file and item.kind == "block"]
    return "\n".join(line for line in lines if re.match(r"[A-Z]+=\S+;", line))


def run_snippet(item: Printed) -> None:
    """Run a Python snippet with the names that its document assumes."""
    assert item.file in ASSUMED_NAMES, f"no rule for Python in {item.file}"
    name = f"snippet_{Path(item.file).stem}"
    module = types.ModuleType(name)
    vars(module).update(ASSUMED_NAMES[item.file]())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)  # dataclasses look up their module
        exec(compile(item.text, item.file, "exec"), vars(module))


def names_for_sampling() -> dict[str, Any]:
    """Return a tiny model of the length that the snippet needs, and a prompt."""
    import make_tiny

    from oreal_jax import model
    from oreal_jax.mesh import MeshShape, make_mesh

    config = dataclasses.replace(make_tiny.CONFIG, max_length=1024)
    return {
        "config": config,
        "mesh": make_mesh(MeshShape(), config, jax.devices()[:1]),
        "params": model.init(config, jax.random.key(0)),
        "stop_tokens": [256],
        "tokens": [1, 2, 3],
    }


def names_for_losses() -> dict[str, Any]:
    """Return the imports of the config file that the snippet is taken from."""
    tree = ast.parse((ROOT / "configs/my_loss.py").read_text())
    kinds = (ast.Import, ast.ImportFrom)
    imports: list[ast.stmt] = [n for n in tree.body if isinstance(n, kinds)]
    names: dict[str, Any] = {}
    exec(compile(ast.Module(imports, []), "my_loss.py", "exec"), names)
    return names


ASSUMED_NAMES: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": dict,
    "docs/configuration.md": dict,
    "docs/generation.md": names_for_sampling,
    "docs/losses.md": names_for_losses,
    "docs/quickstart.md": dict,
    "docs/verification.md": dict,
}


# -- tests


@pytest.fixture(scope="module")
def nodes() -> dict[str, list[str]]:
    """Return tests of the files named in printed commands, as pytest collects them."""
    names = re.compile(r"(tests/\w+\.py)(?:::| -k)|-m slow (tests/\w+\.py)")
    texts = "\n".join(item.text for item in ALL)
    files = {a or b for a, b in names.findall(texts)}
    command = ["-m", "pytest", "--collect-only", "-q", "-o", "addopts=", *sorted(files)]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    return {file: [x for x in lines if x.startswith(f"{file}::")] for file in files}


@pytest.fixture
def home(layout, tmp_path, monkeypatch) -> Path:
    """Return a copy of the layout to work in."""
    home = tmp_path / "home"
    shutil.copytree(layout, home, symlinks=True)
    monkeypatch.chdir(home)
    return home


@pytest.fixture
def check(home, nodes, judges, monkeypatch) -> Check:
    """Return the rules, with stand-ins for decoding and training."""
    share_pool(monkeypatch, judges)
    without_decoding(monkeypatch)
    without_training(monkeypatch)
    without_hub(monkeypatch)
    return Check(home, monkeypatch, nodes)


@pytest.mark.parametrize("item", [i for i in ALL if i.kind != "snippet"], ids=str)
def test_printed_commands_work(item, check):
    check(item)


@pytest.mark.parametrize("item", [i for i in ALL if i.kind == "snippet"], ids=str)
def test_printed_python_runs(item, home, judges, monkeypatch):
    share_pool(monkeypatch, judges)
    run_snippet(item)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\noreal verify --golden 7 --answer 7\n```", "not accepted"),
        ("```\noreal judge --gold 7 --answer 7\n```", "not accepted"),
        ("```\noreal compare before.jsonl nowhere.jsonl\n```", "nowhere.jsonl: "),
        ("```\noreal train configs/nowhere.py\n```", "no such config file"),
        ("```\noreal train configs/tiny.py --set stepz=3\n```", "no field 'stepz'"),
        (
            "```\noreal train configs/tiny.py --set model=NOWHERE\n```",
            "NOWHERE: no such model",
        ),
        ("```\noreal plan configs/tiny.py --topology v9:2x2\n```", "v9:2x2"),
        ("```\n$ oreal verify --gold 7\n7\n```", "takes either"),
        ("```\norael train configs/tiny.py\n```", "orael: command not found"),
        ("```\nOREAL_PLACES=2 oreal train configs/tiny.py\n```", "read nowhere"),
        ("```\nmake demos\n```", "no such target"),
        ("```\npython tools/nowhere.py\n```", "no such tool"),
        ("```\npython tools/plot_run.py NOWHERE x.png\n```", "no NOWHERE"),
        ("```\npython -m pytest -m slower\n```", "no such marker"),
        ("```\npython -m pytest tests/nowhere.py\n```", "no such file"),
        ("```\npython -m http.server\n```", "no rule for python"),
        ("```\npip install 'oreal-jax[everything]'\n```", "no such extra"),
        ("```\ntools/launch_pod.sh up --name a --zone z\n```", "--nfs is missing"),
        ("```\nsbatch tools/slurm.sh configs/nowhere.py\n```", "no such config file"),
        ("```console\n$ oreal\n```", "no rule for a block"),
        ("x\n\n    oreal train\n", "no rule for a block"),
        ("say `oreal trains CONFIG.py`", "SystemExit"),
        ("say `oreal losses --lose grpo`", "SystemExit"),
        ("say `orael train --run x`", "orael: command not found"),
        ("say `make\ndemos`", "no such target"),
        ("```\nhf download A/B --into DIR\n```", "no option --into"),
        ("say `--golden`", "no verb or tool has it"),
        ("say `--weights int4`", "no verb or tool has it"),
        ("say `--set policy.rate=1`", "no field"),
        ("say `configs/nowhere.py`", "no such file"),
        ("say `tests/test_loss_lab.py::test_nothing`", "test_nothing"),
        ("see [there](docs/nowhere.md)", "no such file"),
    ],
    ids=lambda text: " ".join(text.split()),
)
def test_broken_commands_fail(text, message, check):
    items = list(printed.in_markdown("README.md", text))
    assert items
    failures = (AssertionError, pytest.fail.Exception, SystemExit)
    with pytest.raises(failures) as raised:
        for item in items:
            check(item)
    assert message in f"{raised.typename} {raised.value}"


def test_python_in_a_document_without_a_rule_fails():
    with pytest.raises(AssertionError, match="no rule for Python in docs/new.md"):
        run_snippet(Printed("docs/new.md", 1, "snippet", "pass"))


def test_broken_python_fails():
    before = "from oreal_jax.sampling import Engine, Sampling\n"
    for source, message in [
        (before + "Engine(config, mesh, Sampling(max_token=1), [])", "max_token"),
        ("from oreal_jax.sampling import Engines", "Engines"),
    ]:
        with pytest.raises((TypeError, ImportError), match=message):
            run_snippet(Printed("docs/generation.md", 1, "snippet", source))


def test_a_message_that_the_program_never_prints_fails():
    check_message("...: no such config file")
    with pytest.raises(AssertionError, match="no such message"):
        check_message("...: no such config file ... here")


def test_docstrings_scripts_and_help_are_read():
    source = '"""Does.\n\n    oreal x    # y\n\nsay `make\nz`\n"""\n'
    items = [(i.line, i.kind, i.text) for i in printed.in_docstrings("a.py", source)]
    assert items == [(3, "block", "oreal x    # y"), (5, "inline", "make z")]
    source = (
        "#!/bin/sh\n# so:\n#     sbatch a.sh\ncat <<X\nexample\n  run \\\n    b\nX\n"
    )
    items = [(i.line, i.text) for i in printed.in_script("a.sh", source)]
    assert items == [(3, "sbatch a.sh"), (6, "run \\\n    b")]
    files = {item.file for item in printed.in_help(parser())}
    assert {path.name for path in (ROOT / "oreal_jax/cli").glob("*.py")} - {
        Path(file).name for file in files
    } == {"__init__.py", "options.py"}


def test_every_tool_runs_in_a_test():
    smoke_tested = {smoke.split(".")[0] for smoke in SMOKES}
    assert not smoke_tested & QUICK
    assert {path.stem for path in (ROOT / "tools").glob("*.py")} == smoke_tested | QUICK


def test_scripts_parse():
    for script in (ROOT / "tools").glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def test_completions_without_a_stop_token_fill_every_slot(start):
    import bench_sampling
    import make_tiny

    from oreal_jax.checkpoints import hf
    from oreal_jax.mesh import MeshShape, make_mesh
    from oreal_jax.sampling import Engine, Request, Sampling

    config = make_tiny.CONFIG
    mesh = make_mesh(MeshShape(), config, jax.devices()[:1])
    engine = Engine(config, mesh, [256], rows=4)
    request = Request([1, 2, 3], Sampling(max_tokens=1), 0)
    endless = bench_sampling.without_end([request], [256], 24)
    (group,) = bench_sampling.sample(engine, hf.load(start / "hf"), endless, 4, seed=0)
    assert [c.finish_reason for c in group] == ["length"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("words", SMOKES)
def test_tools_complete(words, home):
    shutil.rmtree(home / "runs/demo/run")
    if words == "demo.py":
        shutil.rmtree(home / "runs/demo/start")
    tool, *rest = words.split()
    command = [sys.executable, str(ROOT / "tools" / tool), *rest, "--smoke"]
    subprocess.run(command, check=True)
    for metrics in (home / "runs").rglob("metrics.jsonl"):  # every run made an update
        assert any(row.get("actor/grad_norm") for row in read_lines(metrics))
    trains = tool in ("ablation.py", "demo.py")
    assert trains == any((home / "runs").rglob("metrics.jsonl"))


REAL = [
    item
    for item in ALL
    if item.file in ("README.md", "configs/tiny.py", "configs/my_loss.py")
    and item.kind == "block"
    and re.search(r"oreal (train|sft|sample|eval|data pass-rate)", item.text)
    and "oreal_7b" not in item.text
]


@pytest.mark.slow
@pytest.mark.parametrize("item", REAL, ids=str)
def test_commands_work_with_real_decoding_and_training(item, home, nodes, monkeypatch):
    Check(home, monkeypatch, nodes, deep=True)(item)
