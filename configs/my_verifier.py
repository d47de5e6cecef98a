"""A verifier of your own: a function in a config file, without registration.

    oreal train configs/my_verifier.py                       # after `make demo`

This one refuses completions that ramble, and leaves the others to the rule. A worker
imports this file by name and can be killed: it may loop, crash or use memory without
harm to the run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import smollm2_arithmetic  # the config next to this one

from oreal_jax.verify import Verdict, by_rule

MAX_WORDS = 12


def is_brief(completion: str, prompt: Mapping[str, Any]) -> Verdict:
    """Refuse long completions; `prompt` is the row of the prompts file."""
    words = len(completion.split())
    if words > MAX_WORDS:
        return Verdict("incorrect", f"{words} words on {prompt['question']!r}")
    return Verdict("undecided", "brief")


base = smollm2_arithmetic.config
config = dataclasses.replace(
    base,
    # The first verdict that is not undecided counts.
    verification=dataclasses.replace(base.verification, verifiers=(is_brief, by_rule)),
)
