"""A verifying process: reads JSON lines, writes JSON lines.

Arguments: MODULE:FUNCTION,... DEADLINE MEMORY. It imports once, then verifies in a
forked child that the kernel kills at the deadline; the next child starts at once. A
module may define `warm_up`, which is called before the first completion.
"""

import dataclasses
import importlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from oreal_jax.verify.verdict import OUTCOMES, Verdict, Verifier

INCOMPLETE_PAIR = 3  # the child's exit code when the input ends within a line
RULE = "oreal_jax.verify.rule"


def main() -> None:
    """Verify (completion, prompt) pairs from standard input until it is closed."""
    names, deadline, memory = sys.argv[1:]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a parent, exit silently
    # A config file with a verifier imports JAX, which advises against forks.
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    # Anything printed goes elsewhere: this pipe carries verdicts only.
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    verifiers = [load(name) for name in names.split(",")]
    limit_memory(int(memory))
    send(output, {"ready": True})
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends even a loop in C
            serve(verifiers, float(deadline), output)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (0, INCOMPLETE_PAIR):
            return
        reason, by = "the worker died", "crash"
        if code == -signal.SIGALRM:
            reason, by = f"deadline of {float(deadline):g} s passed", "timeout"
        send(output, {"outcome": "undecided", "reason": reason, "by": by})


def load(name: str) -> Verifier:
    """Import a function, and prepare its module for the first completion."""
    module_name, function = name.split(":")
    module = importlib.import_module(module_name)
    getattr(module, "warm_up", lambda: None)()
    return getattr(module, function)


def serve(verifiers: Sequence[Verifier], deadline: float, output: int) -> None:
    """Verify one pair after another; the process dies at the deadline of a pair."""
    with open(0, "rb", closefd=False) as pairs:
        for line in pairs:
            try:
                pair = json.loads(line)
            except ValueError:
                os._exit(INCOMPLETE_PAIR)
            signal.setitimer(signal.ITIMER_REAL, deadline)
            verdict = decide(verifiers, pair["completion"], pair["prompt"])
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome, reason, by = verdict.outcome, verdict.reason[:300], verdict.by
            send(output, {"outcome": outcome, "reason": reason, "by": by})


def decide(
    verifiers: Sequence[Verifier], completion: str, prompt: Mapping[str, Any]
) -> Verdict:
    """Return the first verdict that is not undecided, else the last.

    A verifier that fails ends the sequence: another must not hide the failure.
    """
    verdict = Verdict("undecided", "no verifier")
    for verifier in verifiers:
        name = verifier.__name__
        try:
            outcome, reason, by = dataclasses.astuple(verifier(completion, prompt))
            if outcome not in OUTCOMES:
                raise ValueError(f"its outcome is {outcome!r}")
        except Exception as error:
            reason = f"{name} failed: {type(error).__name__}: {error}"
            return Verdict("undecided", reason, "crash")
        if by == "rule" and verifier.__module__ != RULE:
            by = name
        verdict = Verdict(outcome, str(reason), by)
        if outcome != "undecided":
            break
    return verdict


def send(output: int, message: dict) -> None:
    """Write one JSON line to the parent, in one piece."""
    os.write(output, json.dumps(message).encode() + b"\n")


def limit_memory(size: int) -> None:
    """Limit the address space where the platform can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
