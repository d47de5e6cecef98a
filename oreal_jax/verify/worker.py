"""A judging process: reads JSON lines, answers JSON lines, dies when it is stuck.

Its arguments are MODULE:FUNCTION DEADLINE MEMORY. A module may have a `warm_up`, called
before the first pair, so that no deadline pays for an import.
"""

import importlib
import json
import os
import signal
import sys


def main() -> None:
    """Judges (completion, gold) pairs from standard input until it is closed."""
    name, deadline, memory = sys.argv[1:]
    if hasattr(signal, "SIGPIPE"):  # without a parent, go quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    # Whatever prints, prints elsewhere: this pipe carries verdicts alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    module, function = name.split(":")
    room = importlib.import_module(module)
    judge = getattr(room, function)
    getattr(room, "warm_up", lambda: None)()
    limit_memory(int(memory))
    say(answers, {"ready": True})
    for line in sys.stdin:
        pair = json.loads(line)
        # The parent kills a late worker; this one counts should the parent be gone.
        signal.setitimer(signal.ITIMER_REAL, 2 * float(deadline) + 1)
        try:
            verdict = judge(pair["completion"], pair["gold"])
            answer = {
                "outcome": verdict.outcome,
                "reason": verdict.reason[:300],
                "by": verdict.by,
            }
        except Exception as error:
            answer = {
                "outcome": "undecided",
                "reason": f"the judge failed: {type(error).__name__}",
                "by": "crash",
            }
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(answers, answer)


def say(answers, message: dict) -> None:
    """One JSON line to the parent."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def limit_memory(size: int) -> None:
    """Bounds the address space, where the platform can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass


if __name__ == "__main__":
    main()
