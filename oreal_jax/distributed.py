"""A run in several processes: shares of the work, exchanges, and a common end.

JAX connects the processes (`jax.distributed`), and their devices form one mesh. JAX's
coordination service aborts all processes about `HEARTBEAT` seconds after one has died
or was suspended, with a message that names it. Data on the hosts is exchanged through
the key-value store of that service: collectives (`jax.experimental.multihost_utils`)
would need the devices, which each process uses at its own pace while it samples, and
cannot be interrupted.

An exchange (`all_gather` and everything built on it) completes in all processes, or
raises KeyboardInterrupt in all once one of them was asked to stop (Ctrl-C, SIGTERM).
Elsewhere KeyboardInterrupt may be raised at any time. An exchange and the computations
that follow it therefore form one `defer_interrupts` block, and all processes stop after
the same step. (At JAX's own preemption sync point each process would first finish its
step, which can take longer than the notice of a preemption.)
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn, TypeVar

import jax

# Private: there is no public access to the store, nor to the index of this process
# before the devices are initialized.
from jax._src.distributed import global_state

from oreal_jax import interrupts
from oreal_jax.errors import Failure, InputError, summarize

# Seconds without a heartbeat after which a process counts as dead. Long compilations on
# all cores delay heartbeats; JAX's default is 100.
HEARTBEAT = 60
# Limits in seconds. The slowest process may still compile, or sample and verify its
# share, before an exchange; before a barrier process 0 writes small files.
EXCHANGE_LIMIT, BARRIER_LIMIT = 3600.0, 600.0
STOP_LIMIT = 60.0  # until all processes are interrupted
POLL = 0.5  # seconds between reads of the notices of other processes

NOTICES = "oreal/notices/"
STOP, ERROR = f"{NOTICES}stop", f"{NOTICES}error"
DATA, STOPPING = b"d", b"s"  # the first byte of a process's part of an exchange

T = TypeVar("T")


@dataclasses.dataclass
class _State:
    hosts: list[str] = dataclasses.field(default_factory=lambda: [socket.gethostname()])
    exchanges: int = 0
    stop_requested: bool = False  # by a signal, an error or a notice
    stopping: bool = False  # all processes have been notified
    reported: BaseException | None = None  # the error that was printed
    exiting: bool = False  # because of an error


_state = _State()


def process_count() -> int:
    """Return the number of processes."""
    return global_state.num_processes


def process_index() -> int:
    """Return the index of this process."""
    return global_state.process_id


def is_first() -> bool:
    """Whether this is process 0, which writes plain files and the screen."""
    return process_index() == 0


def take_share(items: Sequence[T]) -> Sequence[T]:
    """Return the items of this process: every `process_count()`-th one."""
    return items[process_index() :: process_count()]


# -- exchanges


def all_gather(
    part: bytes, purpose: str = "an exchange", limit: float = EXCHANGE_LIMIT
) -> list[bytes]:
    """Return the parts of all processes by index.

    If a process does not reach it within `limit` seconds, all exit with its name.

    Raises:
        KeyboardInterrupt: a process was asked to stop; raised in all of them.
    """
    if process_count() == 1:
        return [part]
    with defer_interrupts():
        try:
            kind = STOPPING if _state.stop_requested else DATA
            parts = _exchange(kind + part, purpose, limit)
        except TimeoutError as error:
            _exit_all(1, f"{error}; it may be hung")
        if any(part.startswith(STOPPING) for part in parts):
            _state.stop_requested = _state.stopping = True
            raise KeyboardInterrupt
    return [part[1:] for part in parts]


def gather_values(value: Any) -> list[Any]:
    """Return a JSON value of every process by index; floats are exact."""
    if process_count() == 1:
        return [value]
    return [json.loads(part) for part in all_gather(json.dumps(value).encode())]


def gather_shares(
    results: list[T],
    encode: Callable[[list[T]], bytes],
    decode: Callable[[bytes], list[T]],
) -> list[T]:
    """Return what all processes computed from their shares, in the original order."""
    if process_count() == 1:
        return results
    parts = [decode(part) for part in all_gather(encode(results))]
    total = sum(map(len, parts))
    return [parts[i % len(parts)][i // len(parts)] for i in range(total)]


def barrier(purpose: str, limit: float = BARRIER_LIMIT) -> None:
    """Return when all processes have reached it; see `all_gather`."""
    all_gather(b"", purpose, limit)


def assert_equal(name: str, value: Any) -> None:
    """Raise InputError where a JSON value is not the same in all processes."""
    values = gather_values(value)
    for process, other in enumerate(values):
        if other != values[0]:
            raise InputError(
                f"{name}: {values[0]} in process 0, {other} in process {process}"
            )


def _client() -> Any:
    return global_state.client  # its class has no public name


def _exchange(part: bytes, purpose: str, limit: float) -> list[bytes]:
    """Return the parts of all; TimeoutError names a process that is missing."""
    client, index, number = _client(), process_index(), _state.exchanges
    _state.exchanges += 1
    client.key_value_set_bytes(f"oreal/{number}/{index}", part)
    deadline, parts = time.monotonic() + limit, []
    while len(parts) < process_count():
        key = f"oreal/{number}/{len(parts)}"
        try:  # at most one second, because signal handlers run between two calls
            parts.append(client.blocking_key_value_get_bytes(key, 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{_name(len(parts))} did not reach {purpose} within {limit:g} s"
                ) from None
    if number:  # all processes have read the previous one
        client.key_value_delete(f"oreal/{number - 1}/{index}")
    return parts


# -- stopping together


def defer_interrupts() -> contextlib.AbstractContextManager[None]:
    """Defer Ctrl-C to the end of the block, or to the next exchange in it."""
    return interrupts.deferred(request_stop)


@contextlib.contextmanager
def enter_together() -> Iterator[None]:
    """Defer Ctrl-C in a block that all processes enter, or none if one is to stop."""
    with defer_interrupts():
        barrier("the next step", EXCHANGE_LIMIT)
        yield


def request_stop() -> None:
    """Stop all processes at the next exchange; may be called by a signal handler."""
    _state.stop_requested = True


def stop_all(purpose: str, limit: float = BARRIER_LIMIT) -> None:
    """Stop all processes; this one is stopping. Return when all have been notified.

    Raises:
        TimeoutError: not within `limit` seconds, because they wait for this process in
            a collective.
    """
    if process_count() > 1 and not _state.stopping:
        request_stop()
        _exchange(STOPPING, purpose, limit)
        _state.stopping = True


# -- start and end


@contextlib.contextmanager
def initialized(arguments: dict[str, Any] | None, timeout: float) -> Iterator[None]:
    """Connect the processes for the block; `arguments` None is a single process.

    Enter it before JAX initializes devices. The processes wait `timeout` seconds for
    each other. An error in the block exits all processes with its message and code.

    Raises:
        InputError: JAX detects no cluster, or the port of process 0 is in use.
    """
    global _state
    if arguments is None:
        yield
        return
    _connect(arguments, timeout)
    _state, ended = _State(), threading.Event()
    threading.Thread(target=_watch, args=(ended,), daemon=True).start()
    previous = signal.signal(signal.SIGINT, _interrupt)
    try:
        try:
            assert_equal("--processes", process_count())
            _state.hosts = gather_values(socket.gethostname())
            yield
            barrier("the end of the run")
        except KeyboardInterrupt:
            with defer_interrupts():
                stop_all("the end of the run", STOP_LIMIT)
                _exchange(DATA, "the end of the run", BARRIER_LIMIT)
            raise
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        text = str(error)
        if not isinstance(error, InputError | Failure):
            report(error)
            text = summarize(error)
        code = 2 if isinstance(error, InputError) else 1
        _exit_all(code, f"{_name(process_index())}: {text}")
    finally:
        ended.set()
        signal.signal(signal.SIGINT, previous)
        jax.distributed.shutdown()


def _connect(arguments: dict[str, Any], timeout: float) -> None:
    # JAX's preemption service would replace our handler of SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    if arguments.get("process_id") == 0:
        _check_port(int(arguments["coordinator_address"].rpartition(":")[2]))
    connected: Future[None] = Future()

    def connect() -> None:
        try:
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=round(timeout) + 60,  # JAX would abort
                heartbeat_timeout_seconds=HEARTBEAT,
            )
            connected.set_result(None)
        except Exception as error:
            connected.set_exception(error)

    # In a thread, because neither Ctrl-C nor `timeout` ends the wait of JAX.
    threading.Thread(target=connect, daemon=True).start()
    try:
        connected.result(timeout)
    except TimeoutError:
        # JAX does not tell which of the other processes are missing.
        address = global_state.coordinator_address or "unknown address"
        reason = f"not all {process_count()} processes connected to {address}"
        if not _is_reachable(address):
            reason = f"cannot reach process 0 at {address}"
        _exit(1, f"{reason} within {timeout:g} s (--wait)")
    except ValueError:  # a parameter is neither given nor detected
        raise InputError(
            "--processes auto: neither a TPU pod nor a SLURM step, no Open MPI and no "
            "Kubernetes job is detected here"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise Failure(f"the processes cannot connect: {summarize(error)}") from None


def _is_reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), port), 1.0).close()
    except OSError:
        return False
    return True


def _check_port(port: int) -> None:
    """Raise InputError where the port is in use: JAX would crash, or share it."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(
            f"--coordinator: cannot listen on port {port}: {error.strerror}"
        ) from None


def _watch(ended: threading.Event) -> None:
    """Send a stop request of this process, and handle notices of the others."""
    client, interrupted = _client(), False
    while not ended.wait(POLL):
        try:
            if _state.stop_requested:
                client.key_value_set(STOP, "", allow_overwrite=True)
            notices = dict(client.key_value_dir_get(NOTICES))
        except jax.errors.JaxRuntimeError:
            continue  # if the service is gone, JAX aborts this process
        if ERROR in notices:
            _exit(*json.loads(notices[ERROR]))
        if STOP in notices and not (_state.stop_requested or interrupted):
            interrupted = True
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _interrupt(*_) -> None:
    """Handle SIGINT, which may come from `_watch` when the processes already stop."""
    request_stop()
    if not _state.stopping:
        raise KeyboardInterrupt


def _exit_all(code: int, text: str) -> NoReturn:
    """Exit all processes; where several call it, with the first one's text."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().key_value_set(ERROR, json.dumps([code, text]))
    time.sleep(20 * POLL)  # `_watch` exits this process as it exits the others
    _exit(code, text)


def _exit(code: int, text: str) -> NoReturn:
    """Exit from any thread; no clean-up can be expected to end without the others."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(f"oreal: {text}", file=sys.stderr, flush=True)
    # The others see the notice before this process fails their collectives, or, as
    # process 0, the service.
    _state.exiting = True
    time.sleep((4 if is_first() else 2) * POLL)
    os._exit(code)


# -- messages


def _name(process: int) -> str:
    host = _state.hosts[process] if process < len(_state.hosts) else "an unknown host"
    return f"process {process} of {process_count()} on {host}"


def warn(message: str) -> None:
    """Print a message with the name of this process on stderr."""
    print(f"oreal: {_name(process_index())}: {message}", file=sys.stderr, flush=True)


def report(error: BaseException) -> None:
    """Print an error of this process before it waits for the others, which may fail.

    The error of a single process is printed by `cli.main`.
    """
    if process_count() == 1 or _state.exiting or error is _state.reported:
        return
    _state.reported = error
    if isinstance(error, InputError | Failure):
        warn(str(error))
    else:
        traceback.print_exception(error)
