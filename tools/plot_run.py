"""Plot a run's share of correct completions and their length, by step.

python tools/plot_run.py RUN PICTURE.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt

from oreal_jax.metrics import read


def plot(run: Path, picture: Path) -> None:
    """Plot RUN/metrics.jsonl to the file `picture`."""
    rows = read(run / "metrics.jsonl")
    steps = [row["step"] + 1 for row in rows]
    figure, score = plt.subplots(figsize=(6, 3), layout="constrained")
    score.plot(steps, [100 * row["critic/score/mean"] for row in rows], "o-")
    score.set(xlabel="step", ylim=(0, 100))
    score.set_ylabel("correct completions, %", color="tab:blue")
    length = score.twinx()
    lengths = [row["response_length/mean"] for row in rows]
    length.plot(steps, lengths, "s--", color="tab:orange")
    length.set(ylim=(0, None))
    length.set_ylabel("tokens per completion", color="tab:orange")
    figure.savefig(picture, dpi=120)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("picture", type=Path)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot the run on the command line."""
    args = parser().parse_args(arguments)
    if not (args.run / "metrics.jsonl").is_file():
        parser().error(f"{args.run}: not a run directory: it has no metrics.jsonl")
    plot(args.run, args.picture)


if __name__ == "__main__":
    main()
