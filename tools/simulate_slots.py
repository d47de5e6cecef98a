"""What a cache that has not room for all rows costs an engine that draws 256 rows of
about 6,000 tokens, at most 14,000: the scheduler without a model.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from oreal_jax.sampling.simulation import heavy_tailed, simulate


def published_lengths() -> np.ndarray:
    """Like the 7B recipe's: 64 prompts x 16, mean 6,000, at most 14,000."""
    return heavy_tailed(1024, 6000, 14_000).reshape(64, 16)


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--slots", type=int, default=256, help="slots of the engine (256)"
    )
    options.add_argument(
        "--cache-tokens",
        type=int,
        nargs="+",
        default=[131_072, 262_144, 524_288, 4_194_304],
        metavar="N",
        help="sizes of the cache (131072 262144 524288 4194304)",
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each size of the cache."""
    options = parser().parse_args(arguments)
    lengths = heavy_tailed(256, 6000, 14_000).reshape(16, 16)
    page = 64
    for cache_tokens in options.cache_tokens:
        found = simulate(
            lengths,
            slots=options.slots,
            pages=cache_tokens // page + 1,
            size=page,
            prompt=200,
            longest=14_000,
        )
        print(
            f"cache_tokens={cache_tokens}: {found.steps} steps for "
            f"{found.tokens / lengths.sum():.2f} x the tokens, {found.swapped} rows "
            f"swapped out, at most {found.most_outside} tokens outside"
        )


if __name__ == "__main__":
    main()
