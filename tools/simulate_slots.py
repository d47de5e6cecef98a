"""The cost of a cache that is too small for all slots.

The scheduler runs without a model on 256 completions of 6,000 tokens on average and
14,000 at most.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from oreal_jax.sampling.simulation import heavy_tailed, simulate


def published_lengths() -> np.ndarray:
    """Return lengths like the 7B recipe's: 64 prompts x 16, mean 6,000, max 14,000."""
    return heavy_tailed(1024, 6000, 14_000).reshape(64, 16)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--slots", type=int, default=256, help="slots of the engine (256)"
    )
    parser.add_argument(
        "--cache-tokens",
        type=int,
        nargs="+",
        default=[131_072, 262_144, 524_288, 4_194_304],
        metavar="N",
        help="sizes of the cache (131072 262144 524288 4194304)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each size of the cache."""
    args = parser().parse_args(arguments)
    lengths = heavy_tailed(256, 6000, 14_000).reshape(16, 16)
    page = 64
    for cache_tokens in args.cache_tokens:
        simulated = simulate(
            lengths,
            slots=args.slots,
            pages=cache_tokens // page + 1,
            page_size=page,
            prompt=200,
            longest=14_000,
        )
        print(
            f"cache_tokens={cache_tokens}: {simulated.steps} steps for "
            f"{simulated.tokens / lengths.sum():.2f} x the tokens, "
            f"{simulated.swap_outs} rows swapped out, at most "
            f"{simulated.max_swapped_tokens} tokens outside"
        )


if __name__ == "__main__":
    main()
