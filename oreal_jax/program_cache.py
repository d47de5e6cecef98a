"""Compiled programs on disk: what one process compiled, the next one loads.

They are stored in `oreal_jax/programs` of the user's cache directory (`XDG_CACHE_HOME`,
else `~/.cache`). JAX's own variables move the cache (`JAX_COMPILATION_CACHE_DIR=DIR`),
bound it (`JAX_COMPILATION_CACHE_MAX_SIZE`, in bytes) and switch it off
(`JAX_ENABLE_COMPILATION_CACHE=0`).

JAX's key of a program covers the program, its options, the versions of jaxlib and of
the device's compiler, and the devices, for a CPU with its instruction set. JAX's files
are not safe, though: a process that is killed while it writes leaves half an entry,
which is then reported and compiled again in every run and never replaced; with a
maximum size, entries of a read-only directory cannot be read, and a process that is
killed between an entry and its time stamp ends all writing. `Entries` is that directory
with the same names and contents, written atomically and without locks.
"""

import contextlib
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

MAX_BYTES = 4 * 2**30
# Loading the smallest program takes 5 ms, compiling it 30.
SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # XLA's own files there would be neither bounded nor safe.
    "jax_persistent_cache_enable_xla_caches": "none",
}
SUFFIX = "-cache"  # as JAX names entries
UNFINISHED = ".unfinished"
HOUR = 3600.0

_jax_file_cache = compilation_cache.get_file_cache


def enable() -> None:
    """Has JAX keep compiled programs; settings that the user made are left alone.

    To be called once the devices of all processes are known.
    """
    chosen = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if not chosen and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", default_directory())
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    # An entry that cannot be read is compiled again, and replaced.
    for action in ("reading", "writing"):
        message = f"Error {action} persistent compilation cache entry"
        warnings.filterwarnings("ignore", message)
    compilation_cache.get_file_cache = _file_cache


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """No program is looked for or kept in the block."""
    before = jax.config.values["jax_enable_compilation_cache"]
    _switch(False)
    try:
        yield
    finally:
        _switch(before)


def default_directory() -> str | None:
    """The directory of a user who did not choose one; None: nothing is kept.

    Only process 0 writes (JAX's rule). Where another does not see that directory, it
    compiles what process 0 loads, and on GPUs it would wait for ever: there processes
    share the search for the fastest kernels.
    """
    if jax.distributed.is_initialized() and jax.default_backend() == "gpu":
        return None
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # as the XDG standard has it, that is no path
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # a user without a home
        return None
    return os.path.join(root, "oreal_jax", "programs")


class Entries(CacheInterface):
    """A directory of programs. Errors of the file system are misses.

    Two processes that write an entry write the same one; who reads meanwhile reads the
    first or the second, whole. Over `max_bytes`, what was not read for longest goes.
    """

    def __init__(self, directory: Path, max_bytes: int):
        self._path = directory
        self._max_bytes = max_bytes
        self._bytes: int | None = None  # known from the first write on

    def get(self, key: str) -> bytes | None:  # pyright: ignore  # JAX's says None
        """The entry, None if there is none."""
        path = self._path / (key + SUFFIX)
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # not ours, but readable
            os.utime(path)
        return entry

    def put(self, key: str, value: bytes) -> None:
        """Writes an entry whole or not at all."""
        if len(value) > self._max_bytes:
            return
        unfinished = None
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            # Not of `tempfile`: a group that shares the directory may read its files.
            unfinished = self._path / (secrets.token_hex(8) + UNFINISHED)
            unfinished.write_bytes(value)
            unfinished.replace(self._path / (key + SUFFIX))
            self._make_room(len(value))
        except OSError:
            if unfinished:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)

    def _make_room(self, added: int) -> None:
        if self._bytes is not None and self._bytes + added <= self._max_bytes:
            self._bytes += added
            return
        entries = []
        killed = time.time() - HOUR  # a writer that has not finished since
        for file in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                stat = file.stat()
                if file.name.endswith(SUFFIX):
                    entries.append((stat.st_mtime, stat.st_size, file.path))
                elif file.name.endswith(UNFINISHED) and stat.st_mtime < killed:
                    os.unlink(file.path)
        total = sum(size for _, size, _ in entries)
        # Some more than needed: the directory is not read again for the next one.
        limit = self._max_bytes if total <= self._max_bytes else 0.9 * self._max_bytes
        for _, size, path in sorted(entries):
            if total <= limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        self._bytes = total


def _file_cache(path: str) -> tuple[CacheInterface, str] | None:
    """The cache of a directory; JAX's own where that is not on a file system."""
    if "://" in path or jax.config.values["jax_compilation_cache_check_contents"]:
        return _jax_file_cache(path)
    max_bytes = jax.config.values["jax_compilation_cache_max_size"]
    if max_bytes == -1:
        # Other programs may use a directory that the user chose.
        max_bytes = MAX_BYTES if path == default_directory() else sys.maxsize
    return Entries(Path(path), max_bytes), path


def _switch(on: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", on)
    compilation_cache.reset_cache()  # JAX looks once, unless reset
