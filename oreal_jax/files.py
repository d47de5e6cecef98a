"""Files that are written whole or not at all."""

import concurrent.futures
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
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
