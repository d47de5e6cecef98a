"""The sets that the paper measures on, by name, from a local file or from the hub.

A preset NAME is read from FOLDER/NAME.jsonl (or .parquet) where that file exists, and
else downloaded. A local file may have our fields or the hub's.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.data import Prompt, load_prompts, read_prompts
from oreal_jax.data.builder import FILE_SUFFIXES, download, read_files
from oreal_jax.data.cleaning import normalise_answer
from oreal_jax.errors import InputError
from oreal_jax.files import read_rows


def as_it_is(value: Any) -> Any:
    """The answer is what the field holds."""
    return value


def of_solution(value: Any) -> Any:
    """The answer stands at the end of a solution."""
    return normalise_answer(value) if isinstance(value, str) else value


def of_list(value: Any) -> Any:
    """All answers of a list, as one."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def whole(value: Any) -> Any:
    """27.0 is 27."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Preset(NamedTuple):
    """A set by name: how it is titled, and where its rows are on the hub.

    `files` is a pattern of file names there, without their endings.
    """

    title: str
    hub: str
    files: str
    question: str
    gold_answer: str
    answer_of: Callable[[Any], Any] = as_it_is


PRESETS = {
    "math500": Preset("MATH-500", "HuggingFaceH4/MATH-500", "*", "problem", "answer"),
    "aime2024": Preset("AIME2024", "HuggingFaceH4/aime_2024", "*", "problem", "answer"),
    "aime2025-i": Preset(
        "AIME2025-I", "opencompass/AIME2025", "*aime2025-I", "question", "answer"
    ),
    "aime2025": Preset("AIME2025", "opencompass/AIME2025", "*", "question", "answer"),
    "amc23": Preset("AMC23", "math-ai/amc23", "*", "question", "answer", whole),
    "olympiadbench": Preset(
        "Olympiad",
        "Hothan/OlympiadBench",
        "*OE_TO_maths_en_COMP*",
        "question",
        "final_answer",
        of_list,
    ),
    "gsm8k": Preset(
        "GSM8K", "openai/gsm8k", "main/test*", "question", "answer", of_solution
    ),
    "livemathbench": Preset(
        "LiveMath", "opencompass/LiveMathBench", "*v202412*_en*", "question", "answer"
    ),
}


class ProblemSet(NamedTuple):
    """Problems under a name that tells the set from the others of an evaluation."""

    name: str
    problems: list[Prompt]


def load_sets(
    sources: Sequence[str], folder: Path, option: str = "--data"
) -> list[ProblemSet]:
    """The sets that were asked for: presets, files, data sets of ours or of the hub.

    `option` is where they were asked for, for messages.

    Raises:
        InputError: one is not there, is invalid, or is asked for twice.
    """
    sets: list[ProblemSet] = []
    for source in sources:
        name = source if source in PRESETS else Path(source).stem
        if any(name == other.name for other in sets):
            raise InputError(f"{option} {source}: a second set named {name!r}")
        sets.append(ProblemSet(name, load_set(source, folder, option)))
    return sets


def load_set(source: str, folder: Path, option: str = "--data") -> list[Prompt]:
    """One set.

    Raises:
        InputError: it is not there, or a row of it is invalid.
    """
    path = Path(source)
    if source in PRESETS and not path.exists():
        return load_preset(source, folder)
    if (
        not path.exists()
        and path.suffix not in FILE_SUFFIXES
        and source.count("/") != 1
    ):
        raise InputError(
            f"{option} {source}: no such file, and no preset; those are "
            f"{', '.join(PRESETS)}"
        )
    return load_prompts(source)


def load_preset(name: str, folder: Path) -> list[Prompt]:
    """A preset from a file of `folder`, or from the hub.

    Raises:
        InputError: it is in neither, or a row of it is invalid.
    """
    preset = PRESETS[name]
    for path in (folder / f"{name}.jsonl", folder / f"{name}.parquet"):
        if path.is_file():
            return read_either(path, preset)
    try:
        files = download(preset.hub, preset.files)
    except InputError as error:
        raise InputError(
            f"preset {name}: no {folder / name}.jsonl or .parquet, and from the hub: "
            f"{error}"
        ) from None
    return read_files(files, lambda path: read_either(path, preset))


def read_either(path: Path, preset: Preset) -> list[Prompt]:
    """The rows of a file that has our fields or the preset's."""
    _, first = next(read_rows(path))
    if "gold_answer" in first:
        return read_prompts(path)
    return read_prompts(path, preset.question, preset.gold_answer, preset.answer_of)
