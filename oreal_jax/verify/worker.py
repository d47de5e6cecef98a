"""A judging process: reads JSON lines, writes JSON lines.

Arguments: MODULE:FUNCTION DEADLINE MEMORY. It imports once, then judges in a forked
child that the kernel kills at the deadline; the next child starts at once. A module may
define `warm_up`, which is called before the first pair.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable

INCOMPLETE_PAIR = 3  # the child's exit code when the input ends within a line


def main() -> None:
    """Judge (completion, gold) pairs from standard input until it is closed."""
    name, deadline, memory = sys.argv[1:]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a parent, exit silently
    # Anything printed goes elsewhere: this pipe carries verdicts only.
    output = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module_name, function = name.split(":")
    module = importlib.import_module(module_name)
    judge = getattr(module, function)
    getattr(module, "warm_up", lambda: None)()
    limit_memory(int(memory))
    send(output, {"ready": True})
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends even a loop in C
            serve(judge, float(deadline), output)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (0, INCOMPLETE_PAIR):
            return
        reason, by = "the worker died", "crash"
        if code == -signal.SIGALRM:
            reason, by = f"deadline of {float(deadline):g} s passed", "timeout"
        send(output, {"outcome": "undecided", "reason": reason, "by": by})


def serve(judge: Callable, deadline: float, output: int) -> None:
    """Judge one pair after another; the process dies at the deadline of a pair."""
    with open(0, "rb", closefd=False) as pairs:
        for line in pairs:
            try:
                pair = json.loads(line)
            except ValueError:
                os._exit(INCOMPLETE_PAIR)
            signal.setitimer(signal.ITIMER_REAL, deadline)
            try:
                verdict = judge(pair["completion"], pair["gold"])
                outcome, reason, by = verdict.outcome, verdict.reason[:300], verdict.by
            except Exception as error:
                reason = f"the judge failed: {type(error).__name__}"
                outcome, by = "undecided", "crash"
            signal.setitimer(signal.ITIMER_REAL, 0)
            send(output, {"outcome": outcome, "reason": reason, "by": by})


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
