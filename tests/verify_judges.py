"""Verifiers that misbehave on demand; workers import this module by name."""

import os
import time
from collections.abc import Mapping
from typing import Any

from oreal_jax.verify import Verdict


def misbehaving(completion: str, prompt: Mapping[str, Any]) -> Verdict:
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
    if completion == "nonsense":
        return Verdict("perhaps", completion)  # pyright: ignore[reportArgumentType]
    equal = completion == prompt["gold_answer"]
    return Verdict("correct" if equal else "incorrect", completion)


def by_label(completion: str, prompt: Mapping[str, Any]) -> Verdict:
    """Accept what the prompt's row accepts, leave the rest open."""
    outcome = "correct" if completion in prompt["accepted"] else "undecided"
    return Verdict(outcome, f"label of {prompt['id']}")


def unimportable(completion: str, prompt: Mapping[str, Any]) -> Verdict:
    """Judge nothing: no worker can import it."""
    raise AssertionError


unimportable.__module__ = "no_such_module"
