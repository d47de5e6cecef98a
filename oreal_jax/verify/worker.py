"""A judging process: reads JSON lines, answers JSON lines.

Its arguments are MODULE:FUNCTION DEADLINE MEMORY. It imports once, then judges in a
forked child that the kernel ends at the deadline; the next child is there at once. A
module may have a `warm_up`, called before the first pair.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable

NOT_A_PAIR = 3  # the child's exit code when it has read half a message


def main() -> None:
    """Judges (completion, gold) pairs from standard input until it is closed."""
    name, deadline, memory = sys.argv[1:]
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a parent, go quietly
    # Whatever prints, prints elsewhere: this pipe carries verdicts alone.
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, function = name.split(":")
    room = importlib.import_module(module)
    judge = getattr(room, function)
    getattr(room, "warm_up", lambda: None)()
    limit_memory(int(memory))
    say(answers, {"ready": True})
    while True:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends even what never looks
            serve(judge, float(deadline), answers)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code in (0, NOT_A_PAIR):
            return
        if code == -signal.SIGALRM:
            reason, by = f"deadline of {float(deadline):g} s passed", "timeout"
        else:
            reason, by = "the worker died", "crash"
        say(answers, {"outcome": "undecided", "reason": reason, "by": by})


def serve(judge: Callable, deadline: float, answers: int) -> None:
    """Judges one pair after the other; dies at the deadline of one."""
    with open(0, "rb", closefd=False) as pairs:
        for line in pairs:
            try:
                pair = json.loads(line)
            except ValueError:
                os._exit(NOT_A_PAIR)
            signal.setitimer(signal.ITIMER_REAL, deadline)
            try:
                verdict = judge(pair["completion"], pair["gold"])
                said = verdict.outcome, verdict.reason[:300], verdict.by
            except Exception as error:
                reason = f"the judge failed: {type(error).__name__}"
                said = "undecided", reason, "crash"
            signal.setitimer(signal.ITIMER_REAL, 0)
            say(answers, dict(zip(("outcome", "reason", "by"), said, strict=True)))


def say(answers: int, message: dict) -> None:
    """One JSON line to the parent, in one piece."""
    os.write(answers, json.dumps(message).encode() + b"\n")


def limit_memory(size: int) -> None:
    """Bounds the address space, where the platform can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
