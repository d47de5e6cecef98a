"""Start-up time of `oreal sample` and of ten lines of transformers, in new processes.

    python tools/bench_start.py runs/tiny_start/hf
    python tools/bench_start.py runs/demo/exported

The model is a Hugging Face directory; torch must be installed (`make test`). Each round
runs the script once and `oreal sample` twice: with an empty cache of compiled programs
and with the cache that the first run filled. Prints the medians of wall time and of CPU
time (user and system, all threads), in seconds, and the ratios of wall time to the
script's. Four completions of at most 8 tokens, float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

QUESTION = "What is 7 + 5?"
TRANSFORMERS_SCRIPT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
messages = [{"role": "user", "content": sys.argv[2]}]
form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(messages, **form)
sampling = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 4}
tokens = model.generate(**inputs, **sampling, max_new_tokens=8)
print(*tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :]))
"""
OREAL_SCRIPT = "from oreal_jax.cli import command; command()"


class Seconds(NamedTuple):
    """Wall and CPU time of a process."""

    wall: float
    cpu: float


def measure(code: str, *arguments: str, cache: str) -> Seconds:
    """Time Python code in a new process."""
    environment = os.environ | {"XDG_CACHE_HOME": cache, "TRANSFORMERS_OFFLINE": "1"}
    for name in ("JAX_COMPILATION_CACHE_DIR", "TPU_LIBRARY_PATH"):
        environment.pop(name, None)
    start, before = time.perf_counter(), os.times()
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    after = os.times()
    user = after.children_user - before.children_user
    system = after.children_system - before.children_system
    return Seconds(time.perf_counter() - start, user + system)


def compare(model: str, rounds: int) -> dict[str, Seconds]:
    """Return median times by name, over rounds in which all alternate."""
    sample = ["sample", "--model", model, "--prompt", QUESTION]
    sample += ["--n", "4", "--max-tokens", "8"]
    times: dict[str, list[Seconds]] = {"transformers": [], "cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            seconds = measure(TRANSFORMERS_SCRIPT, model, QUESTION, cache=cache)
            times["transformers"].append(seconds)
            for name in ("cold", "warm"):
                times[name].append(measure(OREAL_SCRIPT, *sample, cache=cache))
    return {
        name: Seconds(*map(statistics.median, zip(*runs, strict=True)))
        for name, runs in times.items()
    }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path, help="a Hugging Face directory")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--smoke", action="store_true", help="one round")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one JSON line."""
    args = parser().parse_args(arguments)
    medians = compare(str(args.model), 1 if args.smoke else args.rounds)
    baseline = medians["transformers"]
    print(
        json.dumps(
            {name: median._asdict() for name, median in medians.items()}
            | {
                f"{name}_ratio": medians[name].wall / baseline.wall
                for name in ("cold", "warm")
            },
            default=float,
        )
    )


if __name__ == "__main__":
    main()
