"""The package: its version, its wheel, and the container that installs it."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from test_versions import PROJECT, ROOT

from oreal_jax.cli import parser

VERSION = PROJECT["version"]


def test_every_document_has_the_version_of_the_package():
    assert metadata.version("oreal-jax") == VERSION
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {VERSION}\n" in citation
    versions = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == VERSION


def run(*words, **options) -> subprocess.CompletedProcess:
    """Run a command as a user would: without the packages of this checkout."""
    names = ("PYTHONPATH", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.run(
        list(map(str, words)),
        env=environment,
        capture_output=True,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel and check it; skips without `build`, `twine` or an index."""
    home = tmp_path_factory.mktemp("package")
    run(sys.executable, "-m", "venv", home / "tools", check=True)
    python = home / "tools/bin/python"
    if run(python, "-m", "pip", "install", "build", "twine").returncode:
        pytest.skip("build and twine cannot be installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (home / "source").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, home / "source")
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "oreal_jax", home / "source/oreal_jax", ignore=unwanted)
    run(python, "-m", "build", home / "source", "-o", home / "dist", check=True)
    files = sorted((home / "dist").iterdir())
    checked = run(python, "-m", "twine", "check", "--strict", *files)
    assert checked.returncode == 0, checked.stdout
    (path,) = (file for file in files if file.suffix == ".whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_every_module_and_its_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [
        p for p in (ROOT / "oreal_jax").rglob("*") if p.suffix in (".py", ".typed")
    ]
    assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert "oreal_jax/py.typed" in names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel, start, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env", check=True)
    program = tmp_path / "env/bin/oreal"
    installed = run(tmp_path / "env/bin/pip", "install", wheel)
    assert installed.returncode == 0, installed.stderr
    oreal = lambda *words: run(program, *words, cwd=tmp_path, check=True).stdout
    assert "pass-rate" in oreal("data", "--help")
    answer = oreal("verify", "--gold", "0.5", "--answer", r"\boxed{\frac{1}{2}}")
    assert answer.startswith("correct")
    assert "wrote run" in oreal("convert", "from-hf", start / "hf", "run")
    assert "wrote back" in oreal("convert", "to-hf", "run", "back")
    weights = "model.safetensors"
    same = (tmp_path / "back" / weights).read_bytes()
    assert same == (start / "hf" / weights).read_bytes()


# The container


# A list of [instruction, arguments]; the comments apart, without continuations.
TEXT = (ROOT / "Dockerfile").read_text()
INSTRUCTIONS = [line.split(" ", 1) for line in TEXT.splitlines() if line[:1].isalpha()]
EXTRAS = PROJECT["optional-dependencies"]


def arguments(instruction: str) -> list[str]:
    return [rest for word, rest in INSTRUCTIONS if word == instruction]


def test_the_container_copies_and_installs_what_exists():
    (image,) = re.findall(r"python:(\S+)-slim", "".join(arguments("FROM")))
    assert f"{image}.0" in SpecifierSet(PROJECT["requires-python"])
    sources = [path for rest in arguments("COPY") for path in rest.split()[:-1]]
    assert all((ROOT / path).exists() for path in sources)
    allowed = re.findall("^!(.*)", (ROOT / ".dockerignore").read_text(), re.M)
    assert set(sources) == set(allowed)
    assert arguments("ARG")[0].removeprefix("EXTRA=") in EXTRAS
    assert arguments("ENTRYPOINT") == ['["oreal"]'] and "oreal" in PROJECT["scripts"]


def test_the_commands_of_the_container_are_accepted():
    comments = "\n".join(re.findall("^#(.*)", TEXT, re.M)).replace("\\\n", "")
    builds = re.findall(r"docker build --build-arg EXTRA=(\w+)", comments)
    runs = re.findall(r"docker run .* oreal-jax (.*)", comments)
    assert len(builds) == len(runs) == 2 and set(builds) <= set(EXTRAS)
    for line in runs:
        args = parser().parse_args(shlex.split(line))
        assert (ROOT / args.config).is_file()
