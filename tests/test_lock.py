"""The lock of a run directory, and what counts as one."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_runs import train
from tiny_runs import ALONE

from oreal_jax import distributed
from oreal_jax.errors import InputError
from oreal_jax.train import lock
from oreal_jax.train.lock import Holder, holder, locked

HOLD = """
import sys, time
from pathlib import Path
from oreal_jax.train.lock import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""
SINCE = 1.7e9


def write_lock(run: Path, host: str, process: int) -> None:
    run.mkdir(exist_ok=True)
    (run / "lock").write_text(json.dumps(Holder(host, process, SINCE)._asdict()))


@pytest.fixture
def without_flock(monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", fail)


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_in_use_is_refused_in_one_line(start, files, monkeypatch):
    run = files / "run"
    with locked(run):
        held = holder(run)
        assert held and held[:2] == (socket.gethostname(), os.getpid())
        code, _, errors = train(start, files, "steps=1")
        assert code == 2 and errors.count("\n") == 1
        assert f"{run}: in use by {held}" in errors and "since 20" in errors
        assert holder(run) == held
    assert not run.exists()  # nothing is left of a run that has not begun


def test_a_killed_process_holds_no_lock(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], env=ALONE, stdout=subprocess.PIPE
    )
    assert process.stdout and process.stdout.readline() == b"locked\n"
    with pytest.raises(InputError, match=f"in use by process {process.pid} on host"):
        locked(run).__enter__()
    assert (held := holder(run)) and held.process == process.pid
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (run / "lock").exists() and holder(run) is None
    with locked(run):
        assert (held := holder(run)) and held.process == os.getpid()


def test_without_flock_the_recorded_process_decides(tmp_path, without_flock):
    run = tmp_path / "run"
    write_lock(run, socket.gethostname(), os.getppid())
    assert holder(run)
    # That process may be another one, with the same id after a restart of the host.
    message = f"in use by process {os.getppid()} on host .*remove {run / 'lock'}$"
    with pytest.raises(InputError, match=message):
        locked(run).__enter__()
    write_lock(run, socket.gethostname(), ended_process())
    assert holder(run) is None
    with locked(run):
        assert json.loads((run / "lock").read_text())["process"] == os.getpid()
    assert not list(run.iterdir())


def test_a_lock_of_another_host_counts_where_hosts_do_not_share_locks(
    tmp_path, monkeypatch
):
    run = tmp_path / "run"
    write_lock(run, "elsewhere", 7)
    monkeypatch.setattr(lock, "_shares_locks", lambda _: False)
    message = f"process 7 on host elsewhere since 2023.*remove {run / 'lock'}$"
    with pytest.raises(InputError, match=message):
        locked(run).__enter__()
    assert holder(run) == Holder("elsewhere", 7, SINCE)
    # A host that was taken away left it: nobody holds the lock of the file itself.
    monkeypatch.setattr(lock, "_shares_locks", lambda _: True)
    assert holder(run) is None
    with locked(run):
        pass
    assert not list(run.iterdir())


@pytest.mark.parametrize(
    ("mount", "shared"),
    [
        ("server:/share {} nfs4 rw,relatime 0 0", True),
        ("server:/share {} nfs rw,nolock 0 0", False),
        ("server:/share {} nfs rw,local_lock=flock 0 0", False),
        ("bucket {} fuse.gcsfuse rw 0 0", False),
        ("/dev/sda1 {} ext4 rw 0 0", True),
    ],
)
def test_mounts_whose_hosts_share_locks_are_known(tmp_path, monkeypatch, mount, shared):
    text = "/dev/root / fuse rw 0 0\n" + mount.format(tmp_path) + "\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    assert lock._shares_locks(tmp_path / "run") == shared


def test_of_several_processes_only_the_first_one_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "process_index", lambda: 1)
    with locked(tmp_path / "run"):
        assert not (tmp_path / "run").exists()


def test_a_directory_of_other_files_is_no_run(start, files):
    (files / "run").mkdir()
    (files / "run" / "thesis.tex").write_text("text")
    code, _, errors = train(start, files, "steps=1")
    assert code == 2 and errors.count("\n") == 1
    assert (
        f"--run {files / 'run'}: not empty and not a run directory (thesis.tex)"
        in errors
    )
    assert [path.name for path in (files / "run").iterdir()] == ["thesis.tex"]


def test_a_model_directory_is_no_run(start):
    with pytest.raises(InputError, match="not empty and not a run"):
        locked(start / "hf").__enter__()


@pytest.mark.parametrize("name", ["train.log", "slurm-1.out", ".hydra", "logs"])
def test_files_of_a_launcher_do_not_matter(tmp_path, name):
    (tmp_path / name).write_text("")
    with locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("replaced", ["lock", "run"])
def test_a_removed_or_replaced_lock_of_another_process_is_left(tmp_path, replaced):
    """The holder of a removed lock neither removes nor shares the next one."""
    run = tmp_path / "run"
    with locked(run):
        if replaced == "run":
            run.rename(tmp_path / "moved")
        else:
            (run / "lock").unlink()
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run)], env=ALONE, stdout=subprocess.PIPE
        )
        assert process.stdout and process.stdout.readline() == b"locked\n"
    try:
        assert (held := holder(run)) and held.process == process.pid
    finally:
        process.kill()
        process.communicate()


def test_a_root_directory_that_is_no_mount_point_has_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_: "proc /proc proc rw 0 0\n")
    with locked(tmp_path / "run"):  # in a chroot
        pass
