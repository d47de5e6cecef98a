"""Prompts from files, the Hugging Face hub or TFDS data sets, and writing the last.

Data sets are array_record files, which tensorflow-datasets reads and writes without
TensorFlow. A run copies its prompts into one, so that it resumes with the same prompts
when the original file has changed.

A source is a file, SET or SET:SPLIT, where SET is a directory or OWNER/NAME on the hub.
The split may be left out if there is only one.
"""

import contextlib
import dataclasses
import fnmatch
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oreal_jax.data.prompts import Prompt, make_prompts, read_prompts
from oreal_jax.errors import InputError, summarize
from oreal_jax.files import check_writable, new_directory, write_lines

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def load_prompts(
    source: str, question: str = "question", gold_answer: str = "gold_answer"
) -> list[Prompt]:
    """Load the prompts of a file, a data set in TFDS format, or a set of the hub.

    `question` and `gold_answer` name the fields that contain them.

    Raises:
        InputError: the source does not exist or has an invalid row, or it has several
            splits of which none is named.
    """
    read = lambda file: read_prompts(file, question, gold_answer)
    name, _ = split_source(source)
    if Path(name, "dataset_info.json").is_file():
        return make_prompts(_tfds_rows(source), question, gold_answer)
    if is_hub_name(source):
        files = download(name)
        splits = select_splits(source, files.values())
        return read_files([path for path in files if files[path] in splits], read)
    return read(Path(source))


def split_source(source: str) -> tuple[str, str]:
    """Return a source without its split, and the split; "" if none is named."""
    name, separator, split = source.partition(":")
    if Path(source).exists() or not separator or split.startswith("//"):
        return source, ""
    return name, split


def source_name(source: str) -> str:
    """Return a short name of a source, without folders and suffixes."""
    name, split = split_source(source)
    return "-".join([Path(name).stem, *filter(None, split.split("/"))])


def is_hub_name(source: str) -> bool:
    """Return whether a source is a set of the hub: OWNER/NAME or OWNER/NAME:SPLIT."""
    name, _ = split_source(source)
    # A name may contain a dot ("MATH-v1.5"): only known suffixes mark a file.
    is_file = Path(source).exists() or Path(name).suffix in FILE_SUFFIXES
    return not is_file and name.count("/") == 1


def select_splits(source: str, splits: Iterable[str]) -> set[str]:
    """Return which of the splits of a data set a source names: "train" or "main/train".

    Raises:
        InputError: none of them; or none is named, and there are several.
    """
    name, split = split_source(source)
    known = sorted(set(splits))
    matches = {each for each in known if split in (each, each.rpartition("/")[2])}
    if len(known) == 1 and not split:
        return set(known)
    if not matches:
        raise InputError(
            f"{source}: name one of its splits ({', '.join(known)}), as in "
            f"{name}:{known[-1]}"
        )
    return matches


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
        name = source_name(source)
        if name in prompts:
            raise InputError(f"{source}: a second source named {name!r}")
        prompts[name] = load_prompts(source, question, gold_answer)
    return _with_prefixes(prompts.items())


def _tfds_rows(source: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a split, with their names and with texts instead of bytes."""
    import tensorflow_datasets as tfds

    path = Path(split_source(source)[0])
    try:
        builder = tfds.builder_from_directory(path)
        (split,) = select_splits(source, builder.info.splits)
        # Its decorator hides the signature from pyright.
        rows = list(builder.as_data_source(split=split))  # pyright: ignore
    except InputError:
        raise
    except Exception as error:  # TFDS and array_record raise errors of many kinds
        reason = summarize(error)
        raise InputError(f"{path}: not a data set of prompts: {reason}") from None
    return [(f"{path}: row {i}", _plain(row)) for i, row in enumerate(rows, start=1)]


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in plain values, without a missing pass rate."""
    values = {
        name: value.decode() if isinstance(value, bytes) else np.asarray(value).tolist()
        for name, value in row.items()
    }
    if "gold_answer" in values:  # as `build` writes; older sets have no labels
        values |= json.loads(values.pop("labels", "{}"))
    return {name: value for name, value in values.items() if value == value}


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
            return {"train": self._generate_examples()}

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


def check_prompts_writable(out: Path) -> None:
    """Raise InputError if `write_prompts` would, before the work."""
    if out.suffix in (".json", ".parquet", ".csv", ".txt"):
        raise InputError(f"{out}: expected a .jsonl file or the name of a data set")
    if out.suffix != ".jsonl" and out.exists():
        raise InputError(f"{out}: exists; a data set is never overwritten")
    check_writable(out)


def write_prompts(
    prompts: Sequence[Prompt], out: Path, statistics: Mapping[str, Any] | None = None
) -> None:
    """Write prompts as a .jsonl file, or as a data set if the suffix is another.

    Raises:
        InputError: `out` cannot be written.
    """
    if out.suffix == ".jsonl":
        write_lines(out, [prompt.as_json() for prompt in prompts])
    else:
        build(prompts, out, statistics)


def download(source: str, pattern: str = "*") -> dict[Path, str]:
    """Return the parquet and jsonl files of a hub data set, each with its split.

    The split is the path without the number of a shard. Only files that match the
    pattern are downloaded.

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
    names = sorted(
        path.relative_to(folder)
        for path in Path(folder).rglob("*")
        if any(
            fnmatch.fnmatch(path.relative_to(folder).as_posix(), p) for p in patterns
        )
    )
    if not names:
        condition = "" if pattern == "*" else f" that match {pattern!r}"
        raise InputError(
            f"{source}: the data set has no parquet or jsonl files{condition}"
        )
    split = lambda name: re.sub(r"[-_/]\d{4,}.*", "", name.with_suffix("").as_posix())
    return {Path(folder, name): split(name) for name in names}


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
