"""What pyproject.toml says of versions."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("text", PROJECT["dependencies"])
def test_a_dependency_is_bounded_by_what_was_tested(text):
    dependency = Requirement(text)
    assert any(s.operator in ("<", "==") for s in dependency.specifier)
    assert metadata.version(dependency.name) in dependency.specifier


def test_the_matrix_has_every_python_that_may_be_used():
    makefile = (ROOT / "Makefile").read_text()
    (tested,) = re.findall(r"^MATRIX := (.*)$", makefile, re.MULTILINE)
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert tested.split() == [f"3.{n}" for n in range(30) if f"3.{n}" in allowed]
