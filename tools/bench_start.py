"""Start-up time: `oreal sample` against ten lines of transformers, in new processes.

    python tools/bench_start.py runs/tiny_start/hf
    python tools/bench_start.py runs/demo/exported

The model is a Hugging Face directory; torch must be installed (`make test`). A round
runs the script, `oreal sample` with an empty cache of compiled programs, and again with
the one that this filled. Printed are medians of wall time and of CPU time (user and
system, all threads), in seconds, and the ratios to the script's. Four completions of at
most 8 tokens, float32.
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
THEIRS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
messages = [{"role": "user", "content": sys.argv[2]}]
form = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
inputs = tokenizer.apply_chat_template(messages, **form)
drawing = {"do_sample": True, "top_p": 0.9, "num_return_sequences": 4}
tokens = model.generate(**inputs, **drawing, max_new_tokens=8)
print(*tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :]))
"""
OURS = "import sys; from oreal_jax.cli import main; sys.exit(main())"


class Seconds(NamedTuple):
    """How long a process took."""

    wall: float
    cpu: float


def measure(code: str, *arguments: str, cache: str) -> Seconds:
    """Runs code in a process of its own."""
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
    """Medians by name, of rounds in which all take turns."""
    sample = ["sample", "--model", model, "--prompt", QUESTION]
    sample += ["--n", "4", "--max-tokens", "8"]
    found: dict[str, list[Seconds]] = {"transformers": [], "cold": [], "warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            found["transformers"].append(measure(THEIRS, model, QUESTION, cache=cache))
            for name in ("cold", "warm"):
                found[name].append(measure(OURS, *sample, cache=cache))
    return {
        name: Seconds(*map(statistics.median, zip(*runs, strict=True)))
        for name, runs in found.items()
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path, help="a Hugging Face directory")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--smoke", action="store_true", help="one round")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints one JSON line."""
    parsed = parser().parse_args(arguments)
    medians = compare(str(parsed.model), 1 if parsed.smoke else parsed.rounds)
    theirs = medians["transformers"]
    print(
        json.dumps(
            {name: each._asdict() for name, each in medians.items()}
            | {
                f"{name}_ratio": medians[name].wall / theirs.wall
                for name in ("cold", "warm")
            },
            default=float,
        )
    )


if __name__ == "__main__":
    main()
