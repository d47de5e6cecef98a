"""What processes say to each other, and what happens when one no longer does: real
processes on loopback, without JAX."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from tiny_runs import ALONE

from oreal_jax.errors import InputError
from oreal_jax.processes import Place, place_of, wire
from oreal_jax.processes.hub import joined, split

START = """
import json, os, signal, sys, time
from oreal_jax import processes
from oreal_jax.errors import InputError
from oreal_jax.processes import Place, link
processes._join_devices = lambda place, service: None
processes.CULPRIT = 0.1
me, count, port, patience = json.loads(sys.argv[1])
"""
BODY = """
with processes.joined(Place("localhost", port, count, me), patience):
"""


def free_port() -> int:
    with wire.listen(0) as door:
        return door.getsockname()[1]


def start(
    body: str,
    count: int = 3,
    *,
    only: list[int] | None = None,
    claim: int = 0,
    patience: float = 20.0,
    port: int | None = None,
) -> list[subprocess.Popen]:
    """Processes that run `body`, joined; each claims to be one of `claim`."""
    text = START + BODY + textwrap.indent(textwrap.dedent(body), "    ")
    port = port or free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                text,
                f"[{me}, {claim or count}, {port}, {patience}]",
            ],
            env=ALONE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for me in (range(count) if only is None else only)
    ]


def ends(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and complaint of each."""
    said = [process.communicate(timeout=60) for process in started]
    codes = [process.returncode for process in started]
    return [(code, *each) for code, each in zip(codes, said, strict=True)]


def test_what_is_shared_out_comes_back_in_order():
    body = """
    items = list(range(8))
    mine = [item * 10 for item in processes.share(items)]
    print(len(mine), end=" ")
    encode = lambda items: json.dumps(items).encode()
    print(processes.all_of(mine, encode, json.loads), end=" ")
    print(processes.gathered({"me": me}))
    processes.barrier("a file")
    """
    for me, (code, said, complained) in enumerate(ends(start(body))):
        assert code == 0, complained
        assert said == (
            f"{[3, 3, 2][me]} [0, 10, 20, 30, 40, 50, 60, 70] "
            "[{'me': 0}, {'me': 1}, {'me': 2}]\n"
        )


def test_parts_of_any_size_are_told_apart():
    parts = {0: b"", 1: b"abc" * 1000, 2: b"\0" * 8}
    assert split(joined(parts), 3) == [parts[0], parts[1], parts[2]]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("at", ["time.sleep(60)", "with processes.together(): pass"])
def test_the_death_of_one_ends_all_with_its_name(victim, at):
    body = f"""
    print("here", flush=True)
    if me == {victim}:
        time.sleep(60)
    {at}
    """
    started = start(body)
    for process in started:
        assert process.stdout and process.stdout.readline() == "here\n"
    started[victim].kill()
    killed = time.monotonic()
    for me, (code, _, complained) in enumerate(ends(started)):
        if me != victim:
            assert code == 1
            assert complained.startswith(f"oreal: process {victim} of 3 on ")
            assert complained.endswith(" died\n") and complained.count("\n") == 1
    assert time.monotonic() - killed < 5


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("InputError('x.jsonl:3: no answer')", 2, "x.jsonl:3: no answer"),
        ("ValueError('a bug')", 1, "ValueError: a bug"),
    ],
)
def test_an_error_of_one_is_told_by_all(error, code, said):
    body = f"""
    if me == 2:
        raise {error}
    time.sleep(60)
    """
    for me, (exit_code, _, complained) in enumerate(ends(start(body))):
        assert exit_code == code
        last = complained.splitlines()[-1]
        assert last.startswith("oreal: process 2 of 3 on ")
        assert last.endswith(said)
        assert ("Traceback" in complained) == (me == 2 and code == 1)


def test_who_is_late_at_a_barrier_is_named():
    body = """
    processes.PATIENCE = 0.3
    if me == 1:
        time.sleep(60)
    processes.barrier("the config")
    """
    for code, _, complained in ends(start(body)):
        assert code == 1
        assert complained.startswith("oreal: process 1 of 3 on ")
        assert "did not come to the config, for 0.3 s" in complained


def test_who_does_not_come_at_the_start_is_named():
    for code, _, complained in ends(start("pass", only=[0, 2], patience=1.0)):
        assert code == 1
        assert "waited 1 s for process 1 of 3 on a host unknown" in complained


def test_a_coordinator_that_is_not_there_is_named():
    ((code, _, complained),) = ends(start("pass", only=[1], patience=0.5))
    assert code == 1
    assert "--coordinator localhost:" in complained
    assert "does not answer for 0.5 s" in complained


def test_two_of_one_number_are_told_so():
    started = start("pass", only=[0, 1, 1], patience=3.0)
    complaints = [complained for *_, complained in ends(started)]
    assert sum("process 1 has come twice" in c for c in complaints) == 1


def test_processes_that_count_differently_are_told_so():
    port_holder = start("time.sleep(0)", only=[0], count=2, patience=3.0)
    port_holder[0].kill()
    body = "time.sleep(60)"
    text = START + BODY + textwrap.indent(body, "    ")
    port = free_port()
    arguments = [f"[0, 2, {port}, 2.0]", f"[1, 4, {port}, 2.0]"]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", text, argument],
            env=ALONE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for argument in arguments
    ]
    (_, _, _), (code, _, complained) = ends(started)
    assert code == 2
    assert "process 1 was told of 4 processes, process 0 of 2" in complained


def hello(body: bytes) -> bytes:
    """A first message with this body."""
    near, far = socket.socketpair()
    with near, far:
        wire.send(near, wire.Message("hello", 1, body))
        return far.recv(2**20)


STRANGERS = [
    b"GET / HTTP/1.1\r\n\r\n" * 10,
    hello(b"{")[:-1],  # which never ends
    *map(hello, [b"", b"[]", b"null", b"1", b'"x"', b"{}", b"\xff", b"[" * 60_000]),
    hello(b'{"host": 1, "count": 2}'),
    hello(b'{"host": "x", "count": null}'),
]


def test_what_strangers_send_to_the_coordinators_port_holds_up_nobody():
    """Malformed, half, or byte by byte: the processes come together all the same."""
    port = free_port()
    first = start("print(processes.gathered(me))", 2, only=[0], port=port)
    connections = [wire.connect("localhost", port, 20.0) for _ in STRANGERS]
    ended = threading.Event()

    def drip() -> None:
        with (
            wire.connect("localhost", port, 20.0) as slow,
            contextlib.suppress(OSError),
        ):
            for byte in hello(b'{"host": "' + b"x" * 1000):
                slow.send(bytes([byte]))
                if ended.wait(0.05):
                    return

    dripping = threading.Thread(target=drip)
    dripping.start()
    for connection, content in zip(connections, STRANGERS, strict=True):
        connection.sendall(content)
    second = start("print(processes.gathered(me))", 2, only=[1], port=port)
    began = time.monotonic()
    for code, said, complained in ends([*first, *second]):
        assert (code, said) == (0, "[0, 1]\n"), complained
    assert time.monotonic() - began < 8  # less than a hello may take
    ended.set()
    dripping.join()
    for connection in connections:
        connection.close()


def test_a_stream_of_refused_processes_does_not_extend_the_wait():
    port = free_port()
    (first,) = start("pass", 2, only=[0], patience=1.0, port=port)
    stranger = hello(b'{"host": "x", "count": 3}')
    stop = time.monotonic() + 8
    while first.poll() is None and time.monotonic() < stop:
        with (
            contextlib.suppress(OSError),
            wire.connect("localhost", port, 0.0) as connection,
        ):
            connection.sendall(stranger)
        time.sleep(0.002)
    assert time.monotonic() < stop
    ((code, _, complained),) = ends([first])
    assert code == 1
    assert "waited 1 s for process 1 of 2 on a host unknown" in complained


@pytest.mark.parametrize(
    ("error", "code"), [("InputError('no answer')", 2), ("ValueError('a bug')", 1)]
)
def test_who_waits_for_the_others_after_an_error_blames_nobody(error, code):
    """It has printed the error before it waits, since its wait may not end."""
    body = f"""
    processes.INTERRUPTED = 0.3
    if me == 1:
        try:
            raise {error}
        except Exception as error:
            processes.report(error)
            print("reported", file=sys.stderr, flush=True)
            try:
                processes.meet("saving")
            except TimeoutError as late:
                print(late, flush=True)
            raise
    time.sleep(60)
    """
    for me, (exit_code, said, complained) in enumerate(ends(start(body))):
        assert exit_code == code
        last = complained.splitlines()[-1]
        assert last.startswith("oreal: process 1 of 3 on ")
        before, _, after = complained.partition("reported\n")
        if me == 1:
            assert said == "not all processes came to saving within 0.3 s\n"
            assert error.split("'")[1] in before
            assert "Traceback" not in after
            assert ("Traceback" in before) == (code == 1)


@pytest.mark.parametrize("gather", ["gathered(me)", "all_of([], bytes, list)"])
def test_who_lives_and_does_not_come_to_a_gathering_is_named(gather):
    body = f"""
    processes.HUNG = 0.3
    if me == 1:
        time.sleep(60)
    processes.{gather}
    """
    for code, _, complained in ends(start(body)):
        assert code == 1
        assert complained.startswith("oreal: process 1 of 3 on ")
        assert complained.endswith(
            " did not reach the gather within 0.3 s; it may be hung\n"
        )


@pytest.mark.parametrize("at", ["gathered(me)", "barrier('x')"])
def test_process_0_is_named_where_it_stands_still(at):
    body = f"""
    processes.HUNG = processes.PATIENCE = link.ANSWER = 0.3
    processes.gathered(me)
    if me == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    processes.{at}
    """
    stopped, *others = start(body)
    for code, _, complained in ends(others):
        assert code == 1
        assert complained.startswith("oreal: process 0 of 3 on ")
        assert complained.endswith(" did not answer within 0.3 s; it may be hung\n")
    os.kill(stopped.pid, signal.SIGKILL)
    stopped.communicate()


STEPS = """
step = {step}
try:
    while True:
        {outside}
        with processes.together():
            time.sleep({inside})
            step += 1
            print(step, flush=True)
except KeyboardInterrupt:
    print("stopped", step)
    raise
"""


@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_all_stop_at_the_same_step(where, blow):
    """Whoever is asked to stop, whatever it is at: here one is much slower."""
    slow = "time.sleep(0.3 * (me == 2))"
    inside = "0.01 * me" if where == "outside" else "0.2"
    body = "with processes.preemptible():\n"
    body += textwrap.indent(STEPS.format(step=0, outside=slow, inside=inside), "    ")
    started = start(body)
    for process in started:
        assert process.stdout and process.stdout.readline() == "1\n"
    started[1].send_signal(blow)
    last = []
    for code, said, complained in ends(started):
        assert code == -signal.SIGINT, complained
        last.append(said.splitlines()[-1])
    assert len(set(last)) == 1 and last[0].startswith("stopped ")


def test_what_differs_between_processes_is_bad_input():
    body = """
    processes.agree("seed", 7)
    processes.agree("run: newest checkpoint", [10] if me < 2 else [])
    """
    for code, _, complained in ends(start(body)):
        assert code == 2
        assert "run: newest checkpoint: [10] for process 0, [] for process 2" in (
            complained
        )


@pytest.mark.parametrize(
    ("options", "environment", "place"),
    [
        ((None, None, None), {}, None),
        ((None, "1", None), {}, None),
        (("here:80", "2", "1"), {}, Place("here", 80, 2, 1)),
        (("[::1]:80", "2", "0"), {}, Place("::1", 80, 2, 0)),
        (
            (None, None, "1"),
            {"OREAL_COORDINATOR": "here:80", "OREAL_PROCESSES": "4"},
            Place("here", 80, 4, 1),
        ),
        *(
            (
                (None, None, None),
                {
                    "SLURM_JOB_ID": "4096",
                    "SLURM_STEP_NODELIST": "n[3-4]",
                    "SLURM_NTASKS": "2",
                    "SLURM_PROCID": "1",
                    "SLURM_LOCALID": "0",
                    "SLURM_STEP_NUM_NODES": nodes,
                },
                Place("n3", 61440, 2, 1, devices),
            )
            for nodes, devices in [
                ("1", (0,)),
                ("2", None),
            ]  # alone on a node: all of it
        ),
        *(  # Open MPI's ranks inherit the variables of the SLURM step of its daemons
            (
                (None, processes, None),
                {
                    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911",
                    "OMPI_COMM_WORLD_SIZE": str(ranks),
                    "OMPI_COMM_WORLD_RANK": "1",
                    "OMPI_COMM_WORLD_LOCAL_RANK": str(1 % (ranks // nodes)),
                    "OMPI_COMM_WORLD_LOCAL_SIZE": str(ranks // nodes),
                    "SLURM_JOB_ID": "4096",
                    "SLURM_STEP_NODELIST": "n[3-4]",
                    "SLURM_NTASKS": str(nodes),
                    "SLURM_PROCID": "0",
                    "SLURM_LOCALID": "0",
                    "SLURM_STEP_NUM_NODES": str(nodes),
                },
                Place("10.0.0.1", 61441, ranks, 1, devices),
            )
            for processes in (None, "auto")
            for nodes, ranks, devices in [(2, 4, (1,)), (2, 2, None), (1, 2, (1,))]
        ),
    ],
    ids=str,
)
def test_a_place_comes_from_options_variables_or_the_cluster(
    options, environment, place, monkeypatch
):
    for name, value in environment.items():  # JAX looks for itself
        monkeypatch.setenv(name, value)
    assert place_of(*options, environment=environment) == place


def test_ranks_that_jax_takes_for_tasks_of_slurm_are_bad_input(monkeypatch):
    """Open MPI 5 sets no variable that JAX knows it by; the SLURM step of its daemons
    has one task per node."""
    environment = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "SLURM_JOB_ID": "4096",
        "SLURM_STEP_NODELIST": "n[3-4]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_NODES": "2",
    }
    for name, value in environment.items():  # JAX looks for itself
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError, match="OMPI_COMM_WORLD_SIZE=4: JAX detects Open MPI"
    ):
        place_of(environment=environment)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("here:80", "2", None), "--process (or OREAL_PROCESS) must be given too"),
        ((None, "2", None), "--coordinator (or OREAL_COORDINATOR), --process"),
        (("here", "2", "0"), "'here' is not HOST:PORT"),
        (("here:0", "2", "0"), "'here:0': ports are 1 to 65535"),
        (("here:99999", "2", "0"), "'here:99999': ports are 1 to 65535"),
        (("here:80", "two", "0"), "OREAL_PROCESSES): 'two' is not a number"),
        (("here:80", "2", "2"), "2, but 2 processes are numbered 0 to 1"),
        ((None, "auto", None), "neither a TPU pod nor a SLURM step"),
    ],
)
def test_half_a_place_is_bad_input(options, said):
    with pytest.raises(InputError) as caught:
        place_of(*options, environment={})
    assert said in str(caught.value)
