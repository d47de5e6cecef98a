"""Judges that misbehave on demand; workers import this module by name."""

import os
import time

from oreal_jax.verify import Verdict


def misbehaving(completion: str, gold: str) -> Verdict:
    """Hangs, dies or raises when the completion says so; else compares text."""
    if completion == "hang":
        time.sleep(600)
    if completion == "die":
        os._exit(1)
    if completion == "raise":
        raise ValueError(completion)
    if completion == "eat":
        return Verdict("correct", str(len(bytearray(2**31))))
    if completion == "devices":
        seen = os.environ["CUDA_VISIBLE_DEVICES"], os.environ["JAX_PLATFORMS"]
        return Verdict("correct", "{!r} {}".format(*seen))
    if completion == "count":
        return Verdict("correct", str(os.getpid()) + str(time.monotonic_ns()))
    return Verdict("correct" if completion == gold else "incorrect", completion)


def unimportable(completion: str, gold: str) -> Verdict:
    """A judge that no worker can import."""
    raise AssertionError


unimportable.__module__ = "no_such_module"
