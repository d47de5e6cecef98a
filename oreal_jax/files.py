"""Reading files with clear errors, and writing them completely or not at all."""

import codecs
import concurrent.futures
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError, summarize


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        InputError: the file does not exist or is not UTF-8.
    """
    check_local(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        InputError: the file does not exist or contains something else.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a JSON or parquet file, each with "file:line" for messages.

    JSON is an object per line, or an array or sequence of objects over several lines.
    A file in an object store (gs://, s3://) is downloaded.

    Raises:
        InputError: no such file, no rows, an unknown suffix, or invalid JSON.
    """
    if url := store_url(path):
        yield from _store_rows(url)
        return
    if path.is_dir():
        raise InputError(f"{path}: a directory, expected a .jsonl or .parquet file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        rows = ((f"{path}: row {i}", row) for i, row in enumerate(table, start=1))
    elif path.suffix in (".jsonl", ".json"):
        rows = _json_rows(path)
    else:
        raise InputError(f"{path}: expected .jsonl or .parquet, not {path.suffix!r}")
    empty = True
    for place, row in rows:
        if not isinstance(row, dict):
            raise InputError(f"{place}: not a JSON object")
        empty = False
        yield place, row
    if empty:
        raise InputError(f"{path}: the file has no rows")


def _store_rows(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import fsspec

    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, url.rpartition("/")[2])
        try:
            fsspec.url_to_fs(url)[0].get_file(url, str(copy))
        except Exception as error:  # stores raise errors of many kinds
            raise InputError(f"{url}: not readable: {summarize(error)}") from None
        try:
            for place, row in read_rows(copy):
                yield place.replace(str(copy), url), row
        except InputError as error:
            raise InputError(str(error).replace(str(copy), url)) from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    number = 1
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
        if re.match(rb"\s*(\[|\{\s*\n)", content):  # not an object per line
            text, end, rows = content.decode(), 0, []
            while start := re.compile(r"\S").search(text, end):
                value, end = json.JSONDecoder().raw_decode(text, start.start())
                rows += value if isinstance(value, list) else [value]
            yield from ((f"{path}: row {i}", row) for i, row in enumerate(rows, 1))
            return
        # Bytes, so that the line of invalid UTF-8 is known.
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                yield f"{path}:{number}", json.loads(line)
    except json.JSONDecodeError as error:  # which counts lines from where it began
        line = number + error.lineno - 1
        raise InputError(f"{path}:{line}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}:{number}: not JSON: {error}") from None


def text_field(place: str, row: Mapping[str, Any], field: str) -> str:
    """Return a field that must contain text; finite numbers are converted.

    Raises:
        InputError: no such field, not text, empty, or lone surrogates, which
            tokenizers reject.
    """
    if field not in row:
        fields = ", ".join(sorted(row)) or "none"
        raise InputError(f"{place}: no field {field!r}; its fields are {fields}")
    value = row[field]
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Python's JSON parser accepts NaN and Infinity, which are not answers.
        value = str(value) if abs(value) < math.inf else value
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{place}: field {field!r} is {value!r}, expected text")
    if not is_text(value):
        raise InputError(f"{place}: field {field!r} is {value!r}, not valid Unicode")
    return value


def is_text(value: Any) -> bool:
    """Return whether a value is a string that can be encoded: no lone surrogates."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def check_local(path: Path) -> None:
    """Check that a path is not in an object store: it would be a folder named "gs:".

    Raises:
        InputError: it is.
    """
    if url := store_url(path):
        raise InputError(
            f"{url}: object stores are supported for data files only: copy it to a "
            "disk, or mount the store"
        )


def store_url(path: Path) -> str | None:
    """Return the URL of a path in an object store (gs://, s3://), None of others."""
    match = re.match(r"(\w+):/+(.+)", str(path))  # a Path has no double slash
    return f"{match[1]}://{match[2]}" if match else None


def fingerprint(value: Any) -> str:
    """Return 16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def check_writable(path: Path) -> None:
    """Check that a file or directory can be created, before hours of work.

    Raises:
        InputError: it cannot.
    """
    check_local(path)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: {parent} is no writable folder")
    if path.is_dir():
        raise InputError(f"{path}: a directory, expected a file to write")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: a device, expected a file to write")


def check_apart(outputs: Mapping[str, Any], inputs: Mapping[str, Any] = {}) -> None:
    """Check that no output is another output or an input, which would be overwritten.

    Both map an option to its path, paths or None.

    Raises:
        InputError: two are the same.
    """
    options: dict[Path, str] = {}
    for option, value in [*inputs.items(), *outputs.items()]:
        for path in value if isinstance(value, list) else [value]:
            if path is None:
                continue
            other = options.get(resolved := Path(path).resolve())
            if other and option in outputs:
                raise InputError(f"{other} and {option} are the same: {path}")
            options[resolved] = option


def check_new_directory(path: Path) -> None:
    """Raise InputError if a path exists, unless it is an empty directory."""
    check_local(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path}: exists and is not an empty directory")
    if path.is_mount():  # which cannot be replaced by a complete directory
        raise InputError(f"{path}: a mount point; name a new directory in it")


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a scratch directory that becomes `path` when the block has succeeded.

    Raises:
        InputError: `path` is not an empty or new directory, or cannot be written.
    """
    check_new_directory(path)
    target = path.resolve()  # a link to an empty directory stays one
    scratch = target.with_name(f".{target.name}.incomplete")
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed process
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield scratch
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines; like `write_bytes`."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8; like `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically, creating its parent folders and following links.

    Raises:
        InputError: the file cannot be written.
    """
    check_local(path)
    path = path.resolve()
    scratch = path.with_name(f".{path.name}.incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


class BackgroundWriter:
    """A thread that runs writes in order.

    At most one write is pending, which bounds memory. Errors of a write are raised by
    the next `submit` or by `close`.
    """

    def __init__(self):
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "writer")
        self._pending: concurrent.futures.Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Wait for the previous write, then start this one and return."""
        self.wait()
        previous, self._pending = self._pending, self._executor.submit(write)
        if previous:
            previous.result()

    def wait(self) -> None:
        """Wait until everything submitted is written or has failed."""
        if self._pending:
            concurrent.futures.wait([self._pending])

    def close(self) -> None:
        """Wait, and end the thread."""
        self._executor.shutdown()
        if self._pending:
            self._pending.result()
