"""Skills that questions need, and those that a model lacks (section 3.3).

A model labels each question with skills from a given list; pass rates by skill then
show which ones training fails at, and questions that need those are added to the
rejection-sampling set. docs/data.md has the recipe.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from oreal_jax.data.prompts import Prompt
from oreal_jax.errors import InputError
from oreal_jax.files import read_text

FIELD = "skills"
REQUEST = """Skills:
{skills}

Which of these skills does the problem below need? Answer with names from the list and \
nothing else.

Problem: {question}"""


class Skill(NamedTuple):
    """A label value, the number of measured prompts with it, and their pass rate."""

    name: str
    prompts: int
    pass_rate: float


def read_skills(path: Path) -> list[str]:
    """Read the names of skills, one per line.

    Raises:
        InputError: no such file, no names, or a name twice.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: no skill in it; expected one name per line")
    for index, name in enumerate(names):
        if name.casefold() in map(str.casefold, names[:index]):
            raise InputError(f"{path}: skill {name!r} is listed twice")
    return names


def make_request(prompt: Prompt, skills: Sequence[str]) -> Prompt:
    """Return the request that makes a model label a prompt."""
    bullets = "\n".join(f"- {skill}" for skill in skills)
    text = REQUEST.format(skills=bullets, question=prompt.question)
    return dataclasses.replace(prompt, question=text)


def add_skills(prompt: Prompt, completion: str, skills: Sequence[str]) -> Prompt:
    """Label a prompt with the skills that a model's completion names."""
    text, matches = completion.casefold(), set()
    for skill in sorted(skills, key=len, reverse=True):  # "geometry" is in longer ones
        if skill.casefold() in text:
            matches.add(skill)
            text = text.replace(skill.casefold(), "\n")
    labels = {**prompt.labels, FIELD: [skill for skill in skills if skill in matches]}
    return dataclasses.replace(prompt, labels=labels)


def rank_skills(name: str, prompts: Sequence[Prompt], field: str) -> list[Skill]:
    """Return pass rates by skill, the weakest first; `name` is the file's.

    Raises:
        InputError: no prompt has both a pass rate and the field.
    """
    rates: dict[str, list[float]] = {}
    for prompt in prompts:
        if prompt.pass_rate is not None:
            for value in prompt.values(field):
                rates.setdefault(value, []).append(prompt.pass_rate)
    if not rates:
        fields = sorted({field for prompt in prompts for field in prompt.labels})
        raise InputError(
            f"{name}: no row has both a pass_rate and a field {field!r}; its fields "
            f"are {', '.join(fields) or 'none'}"
        )
    skills = [Skill(skill, len(r), sum(r) / len(r)) for skill, r in rates.items()]
    return sorted(skills, key=lambda skill: (skill.pass_rate, skill.name))


def select_prompts(
    prompts: Sequence[Prompt], field: str, skills: set[str]
) -> list[Prompt]:
    """Return the prompts that need one of the skills."""
    return [p for p in prompts if skills & set(p.values(field))]
