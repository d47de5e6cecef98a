"""The lock of a run directory: only one process writes to it.

RUN/lock names the process that holds it, and is locked by `flock`, which the kernel (on
NFS: the server) releases when the process ends, however it ends. On other mounts (for
example object stores) locks are not shared between hosts, or not supported: there the
content of the file decides, and the lock of another host is valid until the file is
removed.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from oreal_jax import distributed
from oreal_jax.errors import InputError
from oreal_jax.files import check_local, read_json

# Files of a run, of which a directory without config.json may hold some.
RUN_FILES = {"checkpoints", "data", "evaluations", "history.jsonl", "interrupted"}
RUN_FILES |= {"lock", "metrics.jsonl", "model", "profile", "reference", "tensorboard"}
RUN_FILES |= {"trackers.json", "trajectories", "wandb"}
LAUNCHER_SUFFIXES = (".err", ".log", ".out", ".pid")  # or hidden, or a folder of logs
# Errors of file systems without `flock`.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Holder(NamedTuple):
    """The process that holds a lock; `since` in seconds since 1970."""

    host: str
    process: int
    since: float

    def __str__(self) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.process} on host {self.host} since {moment}"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Create a run directory if it is missing, and hold its lock.

    In a multi-host run, process 0 holds it for all. Directories that this created and
    that are still empty at the end are removed, so a failed start leaves nothing.

    Raises:
        InputError: another process holds it, or the directory is not a run directory.
    """
    check_local(run)
    if not distributed.is_first():
        yield
        return
    check_run_directory(run)
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = _acquire(run)
    except OSError as error:
        raise InputError(f"{run}: cannot be written: {error.strerror}") from None
    with file:
        try:
            yield
        finally:
            own = _read_holder(run)  # another's if a user has removed or moved it
            if own and own[:2] == (socket.gethostname(), os.getpid()):
                (run / "lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # unless it is a run now
                for folder in new:
                    folder.rmdir()


def check_run_directory(run: Path) -> None:
    """Check that a directory is a run directory, or has only files of a launcher.

    Raises:
        InputError: it has other files; a run would be mixed up with them.
    """
    if not run.exists():
        return
    if not run.is_dir():
        raise InputError(f"--run {run}: a file, expected a directory")
    config = run / "config.json"  # a model directory has one, too
    if config.is_file() and "class" in read_json(config):
        return
    others = sorted(
        path.name
        for path in run.iterdir()
        if path.name not in RUN_FILES
        and not path.name.startswith((".", "log", "slurm"))
        and path.suffix not in LAUNCHER_SUFFIXES
    )
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"--run {run}: not empty and not a run directory ({names}); choose another "
            "directory"
        )


def holder(run: Path) -> Holder | None:
    """Return the process that holds the lock of a run, None if none does."""
    try:
        with (run / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    return _read_holder(run)
                return _active_holder(run, is_locked=False)
            return _active_holder(run, is_locked=True)
    except FileNotFoundError:
        return None


def _acquire(run: Path) -> IO[str]:
    """Return the locked file of this process."""
    path, deadline = run / "lock", time.monotonic() + 0.5
    while True:
        file, is_locked = path.open("a+"), True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            is_locked = False
            if error.errno not in UNSUPPORTED:
                file.close()
                if time.monotonic() > deadline:  # `holder` locks it for a moment
                    _refuse(run, _read_holder(run))
                time.sleep(0.05)
                continue
        # The last holder may have removed the file between open and flock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    if other := _active_holder(run, is_locked):
        _refuse(run, other, is_recorded=True)
    file.truncate(0)
    own = Holder(socket.gethostname(), os.getpid(), time.time())
    file.write(json.dumps(own._asdict()) + "\n")
    file.flush()
    return file


def _refuse(run: Path, other: Holder | None, is_recorded: bool = False) -> None:
    """Raise an InputError; a recorded process may have ended and its id be reused."""
    message = f"{run}: in use by {other or 'another process'}"
    if other and (is_recorded or other.host != socket.gethostname()):
        message += f"; if that process has ended, remove {run / 'lock'}"
    raise InputError(message)


def _active_holder(run: Path, is_locked: bool) -> Holder | None:
    """Return the recorded process unless it has ended; `is_locked` by this process."""
    other = _read_holder(run)
    if is_locked and _shares_locks(run):
        return None
    if other is None or other.host != socket.gethostname():
        return other
    if is_locked or other.process == os.getpid():
        return None
    try:
        os.kill(other.process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        pass
    return other


def _shares_locks(path: Path) -> bool:
    """Return whether all hosts that mount the file system of a path share its locks."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:  # not Linux
        return False
    path, mounts = path.resolve(), {}
    for line in lines:
        _, point, kind, options, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        mounts[Path(point)] = kind, set(options.split(","))
    mount = next((mounts[p] for p in (path, *path.parents) if p in mounts), None)
    if mount is None:  # in a chroot
        return False
    kind, options = mount
    # Mount options of NFS and Lustre.
    local = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "noflock"}
    return not kind.startswith(("fuse", "9p", "virtiofs")) and not options & local


def _read_holder(run: Path) -> Holder | None:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Holder(**json.loads((run / "lock").read_text()))
    return None
