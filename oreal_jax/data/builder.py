"""Prompts as a TFDS data set: built once from a file or the hub, then read in place.

The format is array_record, which tensorflow-datasets writes and reads without
TensorFlow. A run keeps its prompts this way, so that it goes on with the same ones
whatever becomes of the file they came from.
"""

import contextlib
import dataclasses
import fnmatch
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oreal_jax.data.prompts import (
    Prompt,
    read_prompts,
)
from oreal_jax.errors import InputError
from oreal_jax.files import check_writable, write_lines

SPLIT = "train"
FILES = (".jsonl", ".json", ".parquet")


def load_prompts(
    source: str, question: str = "question", gold_answer: str = "gold_answer"
) -> list[Prompt]:
    """The prompts of a jsonl or parquet file, of a data set that `build` wrote, or of a
    Hugging Face data set by name. `question` and `gold_answer` are the fields of a file
    that hold them.

    Raises:
        InputError: the source is not there or a row of it is invalid.
    """
    path = Path(source)
    if (path / "dataset_info.json").is_file():
        try:
            return list(map(_prompt, open_data_set(path)))
        except Exception as error:  # TFDS and array_record raise errors of many kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise InputError(f"{path}: not a data set of prompts: {reason}") from None
    # A hub name may hold a dot ("MATH-v1.5"), so only known endings make a file.
    read = lambda file: read_prompts(file, question, gold_answer)
    if path.exists() or path.suffix in FILES or source.count("/") != 1:
        return read(path)
    return read_files(download(source), read)


def load_all(
    sources: Sequence[str], question: str = "question", gold_answer: str = "gold_answer"
) -> list[Prompt]:
    """The prompts of several sources; their ids begin with the source's name.

    Raises:
        InputError: a source is not there, a row of it is invalid, or two have one name.
    """
    if len(sources) == 1:
        return load_prompts(sources[0], question, gold_answer)
    names = [Path(source).stem for source in sources]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise InputError(f"{sources[place]}: a second source named {name!r}")
    return [
        dataclasses.replace(prompt, id=f"{name}/{prompt.id}")
        for name, source in zip(names, sources, strict=True)
        for prompt in load_prompts(source, question, gold_answer)
    ]


def build(
    prompts: Sequence[Prompt],
    directory: Path,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Writes prompts as a TFDS data set; `directory` appears when it is whole.

    `statistics` are plain JSON values, kept as the data set's `metadata.json`.

    Raises:
        InputError: the directory cannot be written.
    """
    import tensorflow_datasets as tfds
    from absl import logging

    class Prompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Questions with gold answers."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                metadata=tfds.core.MetadataDict(statistics or {}),
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "question": tfds.features.Text(),
                        "gold_answer": tfds.features.Text(),
                        # As bytes: plain numbers are stored in 32 bits, and 0.7 would
                        # come back below 0.7, in another difficulty band.
                        "pass_rate": tfds.features.Tensor(
                            shape=(),
                            dtype=np.float64,
                            encoding=tfds.features.Encoding.BYTES,
                        ),
                        "labels": tfds.features.Text(),  # as JSON
                    }
                ),
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
    scratch = directory.with_name(f".{directory.name}.incomplete")
    # What a killed build left there would be taken for this one.
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        builder = Prompts(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints where it writes
            builder.download_and_prepare()
        Path(builder.data_dir).rename(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_prompts_writable(out: Path) -> None:
    """Raises InputError where `write_prompts` could not write, before the work."""
    if out.suffix in (".json", ".parquet", ".csv", ".txt"):
        raise InputError(f"{out}: expected a .jsonl file or the name of a data set")
    if out.suffix != ".jsonl" and out.exists():
        raise InputError(f"{out}: exists; a data set is never written over")
    check_writable(out)


def write_prompts(
    prompts: Sequence[Prompt],
    out: Path,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a .jsonl file, or a TFDS data set where `out` is named otherwise.

    Raises:
        InputError: `out` cannot be written.
    """
    if out.suffix == ".jsonl":
        write_lines(out, [prompt.as_json() for prompt in prompts])
    else:
        build(prompts, out, statistics)


def open_data_set(directory: Path) -> Any:
    """A built data set: `len` and random access to rows, no TensorFlow involved."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(directory)
    # Its decorator hides the signature from pyright.
    return builder.as_data_source(split=SPLIT)  # pyright: ignore[reportCallIssue]


def _prompt(row: dict[str, Any]) -> Prompt:
    rate = float(row["pass_rate"])
    text = lambda field: row[field].decode()
    return Prompt(
        text("id"),
        text("question"),
        text("gold_answer"),
        None if math.isnan(rate) else rate,
        # Data sets of before there were labels have none.
        json.loads(text("labels")) if "labels" in row else {},
    )


def download(source: str, pattern: str = "*") -> list[Path]:
    """The parquet and jsonl files of a Hugging Face data set that match a pattern.

    Raises:
        InputError: the data set cannot be downloaded or has no such files.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            source,
            repo_type="dataset",
            allow_patterns=[pattern + ".parquet", pattern + ".jsonl"],
        )
    except Exception as error:  # the hub client raises its own and its HTTP client's
        raise InputError(
            f"{source}: neither a file nor a data set that could be downloaded "
            f"({type(error).__name__})"
        ) from None
    files = sorted(
        path
        for path in Path(folder).rglob("*")
        if path.suffix in (".parquet", ".jsonl")
        # The folder keeps what was downloaded earlier for another pattern.
        and fnmatch.fnmatch(
            path.relative_to(folder).with_suffix("").as_posix(), pattern
        )
    )
    if not files:
        wanted = "" if pattern == "*" else f" that match {pattern!r}"
        raise InputError(
            f"{source}: the data set has no parquet or jsonl files{wanted}"
        )
    return files


def read_files(
    files: Sequence[Path], read: Callable[[Path], list[Prompt]]
) -> list[Prompt]:
    """The prompts of several files; ids begin with what tells the files apart.

    Subsets have files of the same name in folders of their own.
    """
    folder = os.path.commonpath([file.parent for file in files])
    place = lambda file: file.relative_to(folder).with_suffix("").as_posix()
    return [
        dataclasses.replace(prompt, id=f"{place(file)}/{prompt.id}")
        for file in files
        for prompt in read(file)
    ]
