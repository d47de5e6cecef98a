"""What one process draws and judges, as bytes for the others: arrays and JSON."""

import dataclasses
import io
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from oreal_jax import distributed
from oreal_jax.data import Prompt
from oreal_jax.evaluation import VerifiedCompletion
from oreal_jax.evaluation.completions import CompletionRecord
from oreal_jax.sampling import Completion
from oreal_jax.verify import Verdict


class Judged(NamedTuple):
    """A completion, its text and its verdict."""

    completion: Completion
    text: str
    verdict: Verdict


Samples = list[Judged]  # of one prompt


def encode(groups: Sequence[Samples]) -> bytes:
    """Exact; `decode` is its inverse."""
    flat = [judged for group in groups for judged in group]
    plain = [
        (len(one.completion.tokens), one.completion.finish_reason, one.text)
        + (one.verdict.outcome, one.verdict.reason, one.verdict.by)
        for one in flat
    ]
    text = json.dumps({"groups": list(map(len, groups)), "completions": plain})
    completions = [one.completion for one in flat]
    sampled = [c.sampled_log_probs for c in completions]
    lists = {
        "tokens": [np.asarray(c.tokens, np.int32) for c in completions],
        "log_probs": [c.log_probs for c in completions],
        "sampled": [values for values in sampled if values is not None],
    }
    arrays = {name: np.concatenate(each) for name, each in lists.items() if each}
    buffer = io.BytesIO()
    plain = np.frombuffer(text.encode(), np.uint8)
    np.savez(buffer, allow_pickle=False, plain=plain, **arrays)
    return buffer.getvalue()


def decode(encoded: bytes) -> list[Samples]:
    """The completions of each prompt, as they were."""
    with np.load(io.BytesIO(encoded), allow_pickle=False) as arrays:
        plain = json.loads(arrays["plain"].tobytes())
        whole = {name: arrays[name] for name in arrays.files if name != "plain"}
    ends = np.cumsum([size for size, *_ in plain["completions"]])
    cut = {name: np.split(array, ends[:-1]) for name, array in whole.items()}
    flat = [
        Judged(
            Completion(
                cut["tokens"][i].tolist(),
                cut["log_probs"][i],
                cut["sampled"][i] if "sampled" in cut else None,
                finish_reason,
            ),
            text,
            Verdict(*verdict),
        )
        for i, (_, finish_reason, text, *verdict) in enumerate(plain["completions"])
    ]
    rest = iter(flat)
    return [[next(rest) for _ in range(size)] for size in plain["groups"]]


def all_attempts(
    problems: Sequence[Prompt], mine: Sequence[Sequence[VerifiedCompletion]]
) -> list[list[VerifiedCompletion]]:
    """The attempts of all processes at each of `problems`, of which each tried its
    share."""
    plain = [
        [(one.sample, one.record, dataclasses.astuple(one.verdict)) for one in group]
        for group in mine
    ]
    found = distributed.gather_shares(
        plain, lambda groups: json.dumps(groups).encode(), json.loads
    )
    return [
        [
            VerifiedCompletion(
                problem, sample, CompletionRecord(*record), Verdict(*verdict)
            )
            for sample, record, verdict in group
        ]
        for problem, group in zip(problems, found, strict=True)
    ]
