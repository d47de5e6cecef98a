"""Sets of problems: files, data sets, and the paper's benchmarks by name.

A preset NAME is read from FOLDER/NAME.jsonl (or .parquet) if that file exists, else
downloaded. A local file may have our fields or the hub's.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.data import Prompt, load_prompts, read_prompts
from oreal_jax.data.builder import (
    FILE_SUFFIXES,
    download,
    is_hub_name,
    read_files,
    source_name,
    split_source,
)
from oreal_jax.data.cleaning import normalise_answer
from oreal_jax.errors import InputError
from oreal_jax.files import check_local, read_rows


def plain(value: Any) -> Any:
    """Join the answers of a list, and return 27.0 as 27."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return int(value) if isinstance(value, float) and value.is_integer() else value


def last_answer(value: Any) -> Any:
    """Return the answer at the end of a solution."""
    return normalise_answer(value) if isinstance(value, str) else value


class Preset(NamedTuple):
    """A set by name: its title, and its place on the hub.

    `files` is a pattern of file names there, without their endings; `read_answer` turns
    the value of the field `gold_answer` into the answer.
    """

    title: str
    hub: str
    files: str
    question: str = "question"
    gold_answer: str = "answer"
    read_answer: Callable[[Any], Any] = plain


PRESETS = {
    "math500": Preset("MATH-500", "HuggingFaceH4/MATH-500", "*test*", "problem"),
    "aime2024": Preset("AIME2024", "HuggingFaceH4/aime_2024", "*train-*", "problem"),
    "aime2025-i": Preset("AIME2025-I", "opencompass/AIME2025", "*aime2025-I"),
    "aime2025": Preset("AIME2025", "opencompass/AIME2025", "*aime2025*"),
    "amc23": Preset("AMC23", "math-ai/amc23", "*test*"),
    "olympiadbench": Preset(
        "Olympiad",
        "Hothan/OlympiadBench",
        "*OE_TO_maths_en_COMP*",
        gold_answer="final_answer",
    ),
    "gsm8k": Preset("GSM8K", "openai/gsm8k", "main/test*", read_answer=last_answer),
    "livemathbench": Preset("LiveMath", "opencompass/LiveMathBench", "*v202412*_en*"),
}


class ProblemSet(NamedTuple):
    """Problems under a name that is unique within an evaluation."""

    name: str
    problems: list[Prompt]


def load_sets(
    sources: Sequence[str], folder: Path, option: str = "--data"
) -> list[ProblemSet]:
    """Load presets, files, and data sets of ours or of the hub.

    `option` is the option or field that lists them, for messages.

    Raises:
        InputError: one does not exist, is invalid, or is listed twice.
    """
    sets: list[ProblemSet] = []
    for source in sources:
        name = source if source in PRESETS else source_name(source)
        if any(name == other.name for other in sets):
            raise InputError(f"{option} {source}: a second set named {name!r}")
        sets.append(ProblemSet(name, load_set(source, folder, option)))
    return sets


def load_set(source: str, folder: Path, option: str = "--data") -> list[Prompt]:
    """Load one set.

    Raises:
        InputError: it does not exist, or a row of it is invalid.
    """
    path = Path(split_source(source)[0])
    if source in PRESETS and not path.exists():
        return load_preset(source, folder)
    is_file = path.exists() or path.suffix in FILE_SUFFIXES or "://" in source
    if not is_file and not is_hub_name(source):
        raise InputError(
            f"{option} {source}: no such file, and no preset; those are "
            f"{', '.join(PRESETS)}"
        )
    return load_prompts(source)


def load_preset(name: str, folder: Path) -> list[Prompt]:
    """Load a preset from a file in `folder`, or from the hub.

    Raises:
        InputError: neither has it, or a row of it is invalid.
    """
    check_local(folder)
    preset = PRESETS[name]
    for path in (folder / f"{name}.jsonl", folder / f"{name}.parquet"):
        if path.is_file():
            return read_preset(path, preset)
    try:
        files = download(preset.hub, preset.files)
    except InputError as error:
        raise InputError(
            f"preset {name}: no {folder / name}.jsonl or .parquet, and from the hub: "
            f"{error}"
        ) from None
    return read_files(list(files), lambda path: read_preset(path, preset))


def read_preset(path: Path, preset: Preset) -> list[Prompt]:
    """Read a file that has our fields or the preset's."""
    _, first = next(read_rows(path))
    if "gold_answer" in first or "reward_model" in first:
        return read_prompts(path)
    return read_prompts(path, preset.question, preset.gold_answer, preset.read_answer)
