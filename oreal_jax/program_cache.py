"""The on-disk cache of compiled programs, shared by successive processes.

It is `oreal_jax/programs` in the user's cache directory (`XDG_CACHE_HOME`, else
`~/.cache`). JAX's own variables move the cache (`JAX_COMPILATION_CACHE_DIR=DIR`), bound
it (`JAX_COMPILATION_CACHE_MAX_SIZE`, in bytes) and disable it
(`JAX_ENABLE_COMPILATION_CACHE=0`).

JAX's key of a program covers the program, its options, the versions of jaxlib and of
the device's compiler, and the devices, including a CPU's instruction set. JAX's own
directory is not crash-safe, though: a process killed during a write leaves a truncated
entry, which is reported and recompiled in every run and never replaced; with a maximum
size, entries of a read-only directory cannot be read, and a process killed between
writing an entry and its time stamp blocks all later writes. `Entries` is the same
directory, names and contents, written atomically and without locks.
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
# Loading the smallest program takes 5 ms, compiling it 30 ms.
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
    """Enable the cache; the user's settings take precedence.

    Call it once the devices of all processes are known.
    """
    user_choice = "JAX_COMPILATION_CACHE_DIR" in os.environ
    if not user_choice and jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", default_directory())
    for name, value in SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    # An unreadable entry is recompiled and replaced.
    for action in ("reading", "writing"):
        message = f"Error {action} persistent compilation cache entry"
        warnings.filterwarnings("ignore", message)
    compilation_cache.get_file_cache = _file_cache


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Neither read nor write the cache inside the block."""
    before = jax.config.values["jax_enable_compilation_cache"]
    _set_enabled(False)
    try:
        yield
    finally:
        _set_enabled(before)


def default_directory() -> str | None:
    """Return the default directory; None: nothing is cached.

    Only process 0 writes (JAX's rule). A process without access to that directory
    compiles what process 0 loads, and on GPUs it would wait forever: there processes
    share the search for the fastest kernels.
    """
    if jax.distributed.is_initialized() and jax.default_backend() == "gpu":
        return None
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # the XDG standard ignores relative paths
        root = os.path.expanduser("~/.cache")
    if not os.path.isabs(root):  # a user without a home
        return None
    return os.path.join(root, "oreal_jax", "programs")


class Entries(CacheInterface):
    """A cache directory of programs. File system errors count as misses.

    Processes that write an entry write the same contents; a concurrent reader gets one
    of them, complete. Above `max_bytes`, the least recently read entries are evicted.
    """

    def __init__(self, directory: Path, max_bytes: int):
        self._path = directory
        self._max_bytes = max_bytes
        self._bytes: int | None = None  # counted at the first write

    def get(self, key: str) -> bytes | None:  # pyright: ignore  # JAX's: None
        """Return the entry, None if it is missing."""
        path = self._path / (key + SUFFIX)
        try:
            entry = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # readable, but owned by another user
            os.utime(path)
        return entry

    def put(self, key: str, value: bytes) -> None:
        """Write an entry atomically; skip one larger than the limit."""
        if len(value) > self._max_bytes:
            return
        unfinished = None
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            # Not of `tempfile`: a group that shares the directory may read its files.
            unfinished = self._path / (secrets.token_hex(8) + UNFINISHED)
            unfinished.write_bytes(value)
            unfinished.replace(self._path / (key + SUFFIX))
            self._free_space(len(value))
        except OSError:
            if unfinished:
                with contextlib.suppress(OSError):
                    unfinished.unlink(missing_ok=True)

    def _free_space(self, added: int) -> None:
        if self._bytes is not None and self._bytes + added <= self._max_bytes:
            self._bytes += added
            return
        entries = []
        oldest_write = time.time() - HOUR  # writers older than this have died
        for file in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                stat = file.stat()
                if file.name.endswith(SUFFIX):
                    entries.append((stat.st_mtime, stat.st_size, file.path))
                elif file.name.endswith(UNFINISHED) and stat.st_mtime < oldest_write:
                    os.unlink(file.path)
        total = sum(size for _, size, _ in entries)
        # Evict more than needed, so that the next write does not scan the directory.
        limit = self._max_bytes if total <= self._max_bytes else 0.9 * self._max_bytes
        for _, size, path in sorted(entries):
            if total <= limit:
                break
            Path(path).unlink(missing_ok=True)
            total -= size
        self._bytes = total


def _file_cache(path: str) -> tuple[CacheInterface, str] | None:
    """Return the cache of a directory; JAX's own for remote storage."""
    if "://" in path or jax.config.values["jax_compilation_cache_check_contents"]:
        return _jax_file_cache(path)
    max_bytes = jax.config.values["jax_compilation_cache_max_size"]
    if max_bytes == -1:
        # Other programs may use a directory that the user chose.
        max_bytes = MAX_BYTES if path == default_directory() else sys.maxsize
    return Entries(Path(path), max_bytes), path


def _set_enabled(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX reads the setting once, unless reset
