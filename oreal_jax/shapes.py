"""Rounding of sizes, so that arrays have few shapes and few programs are compiled."""


def bucket(size: int, smallest: int = 1) -> int:
    """Return the next power of two, at least `smallest`."""
    return max(smallest, 1 << max(0, size - 1).bit_length())
