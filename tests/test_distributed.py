"""Exchanges between processes on one machine, and how their runs end."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from tiny_runs import ALONE

from oreal_jax.cluster import initialize_arguments
from oreal_jax.errors import InputError

PROGRAM = """
import json, os, signal, sys, time
from oreal_jax import distributed
from oreal_jax.cluster import initialize_arguments
from oreal_jax.errors import InputError
from oreal_jax.interrupts import exit_process, sigterm_as_interrupt

index, count, port, wait = json.loads(sys.argv[1])
distributed.POLL, distributed.HEARTBEAT = 0.1, 4
arguments = initialize_arguments(f"localhost:{{port}}", str(count), str(index), {{}})
try:
    with sigterm_as_interrupt(), distributed.initialized(arguments, wait):
{body}
except KeyboardInterrupt:
    exit_process(130)
except InputError as error:
    print(error, file=sys.stderr)
    exit_process(2)
exit_process(0)
"""


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def start(
    body: str,
    count: int = 3,
    *,
    indices: list[int] | None = None,
    counts: list[int] | None = None,
    wait: float = 20.0,
    port: int | None = None,
) -> list[subprocess.Popen]:
    """Start processes that run `body`; `counts` are their values of `--processes`."""
    program = PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), " " * 8))
    port = port or free_port()
    indices = list(range(count)) if indices is None else indices
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, f"[{index}, {own}, {port}, {wait}]"],
            env=ALONE | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, own in zip(indices, counts or [count] * len(indices), strict=True)
    ]


def results(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Wait for processes; return exit code, stdout and stderr of each."""
    outputs = [process.communicate(timeout=60) for process in started]
    codes = [process.returncode for process in started]
    return [(code, *each) for code, each in zip(codes, outputs, strict=True)]


def wait_for_line(process: subprocess.Popen, line: str) -> None:
    assert process.stdout and process.stdout.readline() == f"{line}\n"


def test_shares_are_gathered_in_order_and_exactly():
    body = """
    items = list(range(8))
    results = [item / 7 for item in distributed.take_share(items)]
    encode = lambda results: json.dumps(results).encode()
    gathered = distributed.gather_shares(results, encode, json.loads)
    assert gathered == [item / 7 for item in items], gathered
    parts = [bytes([i]) * (i * 5_000_000) for i in range(count)]
    assert distributed.all_gather(parts[index]) == parts
    assert distributed.gather_values({"x": 0.1 * index})[2] == {"x": 0.1 * 2}
    distributed.barrier("a file")
    print(len(results))
    """
    for index, (code, output, errors) in enumerate(results(start(body))):
        assert (code, output) == (0, f"{[3, 3, 2][index]}\n"), errors


@pytest.mark.parametrize(
    ("blow", "victim"),
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
)
def test_all_processes_exit_when_one_is_killed_or_suspended(victim, blow):
    """JAX aborts the others, with a message that names the index of the process."""
    body = """
    print("ready", flush=True)
    if index == 2:
        distributed.barrier("a file")
    time.sleep(90)
    """
    started = start(body)
    for process in started:
        wait_for_line(process, "ready")
    started[victim].send_signal(blow)
    began = time.monotonic()
    others = [process for process in started if process is not started[victim]]
    for code, _, errors in results(others):
        assert code == -signal.SIGABRT
        if victim:
            assert re.search(rf"unhealthy.*\n(.*task:)?{victim}\n", errors), errors
    assert time.monotonic() - began < 4 + 30
    started[victim].kill()
    started[victim].communicate()


@pytest.mark.parametrize(
    ("source", "error", "code", "message"),
    [
        (0, "InputError('x.jsonl:3: no answer')", 2, "x.jsonl:3: no answer"),
        (2, "ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_an_error_of_one_exits_all_with_its_message(source, error, code, message):
    body = f"""
    if index == {source}:
        raise {error}
    time.sleep(60)
    """
    for index, (exit_code, _, errors) in enumerate(results(start(body))):
        assert exit_code == code
        last = errors.splitlines()[-1]
        assert last.startswith(f"oreal: process {source} of 3 on ")
        assert last.endswith(message)
        assert ("Traceback" in errors) == (index == source and code == 1)


def test_a_process_that_misses_an_exchange_is_named():
    body = """
    if index == 1:
        time.sleep(60)
    distributed.barrier("the config", 1.0)
    """
    for code, _, errors in results(start(body, 2)):
        assert code == 1
        assert errors.startswith("oreal: process 1 of 2 on ")
        assert errors.endswith(" did not reach the config within 1 s; it may be hung\n")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([0, 2], "oreal: not all 3 processes connected to localhost:"),
        ([1], "oreal: cannot reach process 0 at localhost:"),
    ],
)
def test_processes_wait_for_each_other_for_a_limited_time(indices, message):
    """Neither process 0 nor another process is awaited longer than `--wait`."""
    began = time.monotonic()
    for code, _, errors in results(start("pass", indices=indices, wait=2.0)):
        assert code == 1
        assert errors.startswith(message)
        assert errors.endswith(" within 2 s (--wait)\n")
    assert time.monotonic() - began < 2 + 20


def test_ctrl_c_ends_the_wait_at_the_start():
    port, deadline = free_port(), time.monotonic() + 30
    (process,) = start("pass", indices=[0], wait=60.0, port=port)
    while time.monotonic() < deadline:  # until it waits
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", port)).close()
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    ((code, _, errors),) = results([process])
    assert code == 130, errors


def test_a_port_that_is_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        ((code, _, errors),) = results(start("pass", indices=[0], port=port))
    assert code == 2
    assert errors.startswith(f"--coordinator: cannot listen on port {port}: Address")


STEPS = """
step = 0
try:
    while True:
        {outside}
        with distributed.enter_together():
            time.sleep({inside})
            step += 1
            print(step, flush=True)
except KeyboardInterrupt:
    distributed.stop_all("saving")
    print("stopped", step)
    raise
"""


@pytest.mark.parametrize(
    ("blow", "where"), [(signal.SIGINT, "inside"), (signal.SIGTERM, "outside")]
)
def test_all_processes_stop_at_the_same_step(blow, where):
    """A signal arrives inside or outside a step; one process is much slower."""
    slow = "time.sleep(0.3 * (index == 2))"
    inside = "0.01 * index" if where == "outside" else "0.2"
    started = start(STEPS.format(outside=slow, inside=inside))
    for process in started:
        wait_for_line(process, "1")
    started[1].send_signal(blow)
    last = []
    for code, output, errors in results(started):
        assert code == 130, errors
        last.append(output.splitlines()[-1])
    assert len(set(last)) == 1 and last[0].startswith("stopped ")


def test_a_stop_interrupts_processes_outside_a_step():
    body = "print('ready', flush=True); time.sleep(60)"
    started = start(body)
    for process in started:
        wait_for_line(process, "ready")
    began = time.monotonic()
    started[1].send_signal(signal.SIGTERM)
    for code, _, errors in results(started):
        assert code == 130, errors
    assert time.monotonic() - began < 10


def test_different_values_are_bad_input():
    body = """
    distributed.assert_equal("seed", 7)
    distributed.assert_equal("run: newest checkpoint", [10] if index < 1 else [])
    """
    for code, _, errors in results(start(body, 2)):
        assert code == 2
        assert "run: newest checkpoint: [10] in process 0, [] in process 1" in errors


def test_different_numbers_of_processes_are_bad_input():
    for code, _, errors in results(start("pass", indices=[0, 1], counts=[2, 4])):
        assert code == 2
        assert errors.endswith("--processes: 2 in process 0, 4 in process 1\n")


def explicit(address: str, count: int, index: int) -> dict:
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


ALL_DEVICES = {"local_device_ids": []}


@pytest.mark.parametrize(
    ("options", "environment", "arguments"),
    [
        ((None, None, None), {}, None),
        ((None, "1", None), {}, None),
        ((None, "auto", None), {}, {}),
        (("here:80", "2", "1"), {}, explicit("here:80", 2, 1)),
        (("[::1]:80", "2", "0"), {}, explicit("[::1]:80", 2, 0)),
        (
            (None, None, "1"),
            {"OREAL_COORDINATOR": "here:80", "OREAL_PROCESSES": "4"},
            explicit("here:80", 4, 1),
        ),
        *(
            (
                (None, None, None),
                {
                    "SLURM_STEP_NODELIST": "n[3-4]",
                    "SLURM_NTASKS": tasks,
                    "SLURM_PROCID": "0",
                    "SLURM_STEP_NUM_NODES": nodes,
                },
                arguments,
            )
            for tasks, nodes, arguments in [
                ("2", "1", {}),
                ("2", "2", ALL_DEVICES),
                ("1", "1", None),
            ]
        ),
        *(  # ranks of Open MPI have the variables of the SLURM step of its daemons
            (
                (None, processes, None),
                {
                    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911",
                    "OMPI_COMM_WORLD_SIZE": str(ranks),
                    "OMPI_COMM_WORLD_LOCAL_SIZE": str(ranks // nodes),
                    "SLURM_STEP_NODELIST": "n[3-4]",
                    "SLURM_NTASKS": str(nodes),
                    "SLURM_PROCID": "0",
                    "SLURM_STEP_NUM_NODES": str(nodes),
                },
                arguments,
            )
            for processes in (None, "auto")
            for nodes, ranks, arguments in [
                (2, 4, {}),
                (2, 2, ALL_DEVICES),
                (1, 2, {}),
                (2, 1, None),
            ]
        ),
    ],
    ids=str,
)
def test_arguments_come_from_options_variables_or_the_cluster(
    options, environment, arguments
):
    assert initialize_arguments(*options, environment=environment) == arguments


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (("here:80", "2", None), {}, "--process (or OREAL_PROCESS) must be given too"),
        ((None, "2", None), {}, "--coordinator (or OREAL_COORDINATOR), --process"),
        (("here", "2", "0"), {}, "'here' is not HOST:PORT"),
        (("here:0", "2", "0"), {}, "'here:0': ports are 1 to 65535"),
        (("here:99999", "2", "0"), {}, "'here:99999': ports are 1 to 65535"),
        (("here:80", "two", "0"), {}, "OREAL_PROCESSES): 'two' is not a number"),
        (("here:80", "2", "2"), {}, "2, but 2 processes are numbered 0 to 1"),
        (  # Open MPI 5, whose ranks JAX would take for tasks of SLURM
            (None, None, None),
            {"OMPI_COMM_WORLD_SIZE": "4", "SLURM_NTASKS": "2"},
            "OMPI_COMM_WORLD_SIZE=4: JAX detects Open MPI up to version 4 only",
        ),
    ],
)
def test_incomplete_or_invalid_options_are_bad_input(options, environment, message):
    with pytest.raises(InputError) as caught:
        initialize_arguments(*options, environment=environment)
    assert message in str(caught.value)


def test_auto_outside_a_cluster_is_bad_input():
    program = (
        "from oreal_jax import distributed\nwith distributed.initialized({}, 1.0): pass"
    )
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={k: v for k, v in ALONE.items() if not k.startswith(("SLURM", "OMPI"))},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "InputError: --processes auto: neither a TPU pod nor" in process.stderr
