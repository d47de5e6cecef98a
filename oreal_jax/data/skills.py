"""Skills: what a question asks for, and which of them a model lacks (section 3.3).

A model names the skills of each question out of a given list; the policy's pass rates
then say which skills training keeps failing at, and questions that need those go into
the rejection-sampling set once more. docs/evaluation.md has the recipe.
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


def read_skills(path: Path) -> list[str]:
    """The names of skills, one a line.

    Raises:
        InputError: there is no such file, or no name in it, or one twice.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path}: no skill in it; expected one name a line")
    for place, name in enumerate(names):
        if name.casefold() in map(str.casefold, names[:place]):
            raise InputError(f"{path}: skill {name!r} is there twice")
    return names


def request(prompt: Prompt, skills: Sequence[str]) -> Prompt:
    """What a model is asked in order to label a prompt."""
    listed = "\n".join(f"- {skill}" for skill in skills)
    text = REQUEST.format(skills=listed, question=prompt.question)
    return dataclasses.replace(prompt, question=text)


def labelled(prompt: Prompt, said: str, skills: Sequence[str]) -> Prompt:
    """The prompt with the skills that a model's answer names; perhaps none."""
    left, found = said.casefold(), set()
    for skill in sorted(skills, key=len, reverse=True):  # "geometry" is in longer ones
        if skill.casefold() in left:
            found.add(skill)
            left = left.replace(skill.casefold(), "\n")
    named = [skill for skill in skills if skill in found]
    return dataclasses.replace(prompt, labels={**prompt.labels, FIELD: named})


class Skill(NamedTuple):
    """A value of a label: how many measured prompts have it, and their pass rate."""

    name: str
    prompts: int
    pass_rate: float


def by_skill(name: str, prompts: Sequence[Prompt], field: str) -> list[Skill]:
    """Pass rates by skill, the weakest first. `name` is the file's, for messages.

    Raises:
        InputError: no prompt has a pass rate and the field.
    """
    rates: dict[str, list[float]] = {}
    for prompt in prompts:
        if prompt.pass_rate is not None:
            for value in prompt.values(field):
                rates.setdefault(value, []).append(prompt.pass_rate)
    if not rates:
        known = sorted({field for prompt in prompts for field in prompt.labels})
        raise InputError(
            f"{name}: no row has both a pass_rate and a field {field!r}; its fields "
            f"are {', '.join(known) or 'none'}"
        )
    mean = lambda values: sum(values) / len(values)
    skills = [Skill(value, len(of), mean(of)) for value, of in rates.items()]
    return sorted(skills, key=lambda skill: (skill.pass_rate, skill.name))


def needing(prompts: Sequence[Prompt], field: str, names: set[str]) -> list[Prompt]:
    """The prompts that need one of the skills."""
    return [p for p in prompts if names & set(p.values(field))]
