"""Prompts from files, the Hugging Face hub or TFDS data sets, and writing the last.

Data sets are array_record files, which tensorflow-datasets reads and writes without
TensorFlow. A run copies its prompts into one, so that it resumes with the same prompts
when the original file has changed.
"""

import contextlib
import dataclasses
import fnmatch
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oreal_jax.data.prompts import Prompt, read_prompts
from oreal_jax.errors import InputError, summarize
from oreal_jax.files import check_writable, new_directory, write_lines

SPLIT = "train"
FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def load_prompts(
    source: str, question: str = "question", gold_answer: str = "gold_answer"
) -> list[Prompt]:
    """Load the prompts of a file, a data set that `build` wrote, or a hub data set.

    `question` and `gold_answer` name the fields of a file that contain them.

    Raises:
        InputError: the source does not exist or has an invalid row.
    """
    path = Path(source)
    if (path / "dataset_info.json").is_file():
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(path)
            # Its decorator hides the signature from pyright.
            rows = builder.as_data_source(split=SPLIT)  # pyright: ignore
            return list(map(_prompt, rows))
        except Exception as error:  # TFDS and array_record raise errors of many kinds
            raise InputError(
                f"{path}: not a data set of prompts: {summarize(error)}"
            ) from None
    read = lambda file: read_prompts(file, question, gold_answer)
    # A hub name may contain a dot ("MATH-v1.5"): only known suffixes mark a file.
    if path.exists() or path.suffix in FILE_SUFFIXES or source.count("/") != 1:
        return read(path)
    return read_files(download(source), read)


def load_all(
    sources: Sequence[str], question: str = "question", gold_answer: str = "gold_answer"
) -> list[Prompt]:
    """Load the prompts of several sources; their ids begin with the source's name.

    Raises:
        InputError: as `load_prompts`, or two sources have the same name.
    """
    if len(sources) == 1:
        return load_prompts(sources[0], question, gold_answer)
    prompts: dict[str, list[Prompt]] = {}
    for source in sources:
        name = Path(source).stem
        if name in prompts:
            raise InputError(f"{source}: a second source named {name!r}")
        prompts[name] = load_prompts(source, question, gold_answer)
    return _with_prefixes(prompts.items())


def build(
    prompts: Sequence[Prompt],
    directory: Path,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Write prompts as a TFDS data set, with `statistics` as its `metadata.json`.

    Raises:
        InputError: the directory is not empty or cannot be written.
    """
    import tensorflow_datasets as tfds
    from absl import logging

    texts = ("id", "question", "gold_answer", "labels")  # labels as JSON
    features: dict[str, Any] = {name: tfds.features.Text() for name in texts}
    # As bytes: numbers are stored in 32 bits, and 0.7 would become less than 0.7, which
    # is in another difficulty band.
    features["pass_rate"] = tfds.features.Tensor(
        shape=(), dtype=np.float64, encoding=tfds.features.Encoding.BYTES
    )

    class Prompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Questions with gold answers."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                metadata=tfds.core.MetadataDict(statistics or {}),
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager: Any):
            return {SPLIT: self._generate_examples()}

        def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
            for index, prompt in enumerate(prompts):
                row = dataclasses.asdict(prompt)
                row["labels"] = json.dumps(row["labels"])
                if prompt.pass_rate is None:
                    row["pass_rate"] = math.nan
                yield index, row

    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    with new_directory(directory) as scratch:
        builder = Prompts(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints file names
            builder.download_and_prepare()
        for file in Path(builder.data_dir).iterdir():
            file.rename(scratch / file.name)
        shutil.rmtree(scratch / builder.name)


def _prompt(row: dict[str, Any]) -> Prompt:
    rate = float(row["pass_rate"])
    text = lambda field: row[field].decode()
    return Prompt(
        text("id"),
        text("question"),
        text("gold_answer"),
        None if math.isnan(rate) else rate,
        json.loads(text("labels")) if "labels" in row else {},  # not in old data sets
    )


def check_prompts_writable(out: Path) -> None:
    """Raise InputError where `write_prompts` would, before the work."""
    if out.suffix in (".json", ".parquet", ".csv", ".txt"):
        raise InputError(f"{out}: expected a .jsonl file or the name of a data set")
    if out.suffix != ".jsonl" and out.exists():
        raise InputError(f"{out}: exists; a data set is never overwritten")
    check_writable(out)


def write_prompts(
    prompts: Sequence[Prompt], out: Path, statistics: Mapping[str, Any] | None = None
) -> None:
    """Write prompts as a .jsonl file, or as a data set where the suffix is another.

    Raises:
        InputError: `out` cannot be written.
    """
    if out.suffix == ".jsonl":
        write_lines(out, [prompt.as_json() for prompt in prompts])
    else:
        build(prompts, out, statistics)


def download(source: str, pattern: str = "*") -> list[Path]:
    """Return the parquet and jsonl files of a hub data set that match a pattern.

    Raises:
        InputError: the data set cannot be downloaded or has no such files.
    """
    import huggingface_hub

    patterns = [pattern + ".parquet", pattern + ".jsonl"]
    try:
        folder = huggingface_hub.snapshot_download(
            source, repo_type="dataset", allow_patterns=patterns
        )
    except Exception as error:  # the hub client raises its own and its HTTP client's
        raise InputError(
            f"{source}: neither a file nor a data set that could be downloaded "
            f"({type(error).__name__})"
        ) from None
    # The folder also contains earlier downloads for other patterns.
    matches = lambda path: any(fnmatch.fnmatch(path, pattern) for pattern in patterns)
    files = sorted(
        path
        for path in Path(folder).rglob("*")
        if matches(path.relative_to(folder).as_posix())
    )
    if not files:
        condition = "" if pattern == "*" else f" that match {pattern!r}"
        raise InputError(
            f"{source}: the data set has no parquet or jsonl files{condition}"
        )
    return files


def read_files(
    files: Sequence[Path], read: Callable[[Path], list[Prompt]]
) -> list[Prompt]:
    """Read several files; the ids begin with the part of the path that differs."""
    folder = os.path.commonpath([file.parent for file in files])
    name = lambda file: file.relative_to(folder).with_suffix("").as_posix()
    return _with_prefixes((name(file), read(file)) for file in files)


def _with_prefixes(named: Iterable[tuple[str, list[Prompt]]]) -> list[Prompt]:
    """Join prompts, with the name before the id, so that ids stay unique."""
    return [
        dataclasses.replace(prompt, id=f"{name}/{prompt.id}")
        for name, prompts in named
        for prompt in prompts
    ]
