"""Files that are written whole or not at all."""

import concurrent.futures
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from oreal_jax.errors import InputError


def check_writable(path: Path) -> None:
    """Raises InputError where a file or directory could not be made: before hours of
    work, not after."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise InputError(f"{path}: cannot be written: {above} is no folder to write in")
    if path.is_dir():
        raise InputError(f"{path}: a directory, expected a file to write")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: a device, expected a file to write")


def check_apart(outputs: Mapping[str, Any], inputs: Mapping[str, Any] = {}) -> None:
    """Raises InputError where an output is another or an input: both would be lost.
    Mappings of an option to its path, paths or None."""
    seen: dict[Path, str] = {}
    for option, given in [*inputs.items(), *outputs.items()]:
        for path in given if isinstance(given, list) else [given]:
            if path is None:
                continue
            place = Path(path).resolve()
            if option in outputs and place in seen:
                raise InputError(f"{seen[place]} and {option} are the same: {path}")
            seen[place] = option


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that tell one JSON value from another."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON lines; like `write_text`."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def write_text(path: Path, text: str) -> None:
    """Text in UTF-8; like `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; folders on the way are made, links followed.

    Raises:
        InputError: the file cannot be written.
    """
    path = path.resolve()
    scratch = path.with_name(f".{path.name}.incomplete")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        scratch.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


class BackgroundWriter:
    """Runs writes in one thread, in order, each after the one before has ended.

    At most one write is pending, so that memory is bounded. What a write raises is
    raised by the next `submit` or by `close`.
    """

    def __init__(self):
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "writer")
        self._pending: concurrent.futures.Future[None] | None = None

    def submit(self, write: Callable[[], None]) -> None:
        """Waits for the write before, then starts this one and returns."""
        self.wait()
        before, self._pending = self._pending, self._executor.submit(write)
        if before:
            before.result()

    def wait(self) -> None:
        """Returns when all that was submitted is written or has failed."""
        if self._pending:
            concurrent.futures.wait([self._pending])

    def close(self) -> None:
        """Waits, and ends the thread."""
        self._executor.shutdown()
        if self._pending:
            self._pending.result()


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of a jsonl or parquet file with a name for messages, "file:line".

    Raises:
        InputError: no such file, no rows, another kind of file, or a line not JSON.
    """
    if path.is_dir():
        raise InputError(f"{path}: a directory, expected a .jsonl or .parquet file")
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a parquet file: {error}") from None
        named = ((f"{path}: row {i}", row) for i, row in enumerate(rows, start=1))
    elif path.suffix in (".jsonl", ".json"):
        named = _json_lines(path)
    else:
        raise InputError(f"{path}: expected .jsonl or .parquet, not {path.suffix!r}")
    empty = True
    for name, row in named:
        empty = False
        yield name, row
    if empty:
        raise InputError(f"{path}: the file has no rows")


def read_text(path: Path) -> str:
    """The text of a file, or InputError naming it."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text: {error}") from None


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Bytes, so that a line that is not UTF-8 is known by its number.
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                # The parser's own message would count lines from this one.
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{path}:{number}: not JSON: {reason}") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: not a JSON object")
            yield f"{path}:{number}", row


def text_field(name: str, row: dict[str, Any], field: str) -> str:
    """A field that must hold text; a finite number is taken as Python prints it.

    Raises:
        InputError: it holds something else, or half of a surrogate pair, which no
            tokenizer accepts.
    """
    value = row.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Python's JSON reader takes NaN and Infinity, which are no answers.
        value = str(value) if abs(value) < math.inf else value
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name}: field {field!r} is {value!r}, expected text")
    if not is_text(value):
        raise InputError(f"{name}: field {field!r} is {value!r}, not valid Unicode")
    return value


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written: no half of a surrogate pair."""
    surrogate = lambda letter: "\ud800" <= letter <= "\udfff"
    return isinstance(value, str) and not any(map(surrogate, value))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or InputError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value
