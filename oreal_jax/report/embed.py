"""The compact form of completions in a page, which decodes them one at a time.

A completion is deflated JSON (question, answer, text), a zero byte, the length of each
token's text in UTF-16 units (LEB128), and a byte per token for each of its quantities:
value = low + byte / 255 * (high - low).
"""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from oreal_jax.report.alignment import align
from oreal_jax.report.runs import SavedCompletion

LEVELS = 255
MAX_LISTED = 50_000  # rows of the list; completions trained on come first
MAX_QUESTION, MAX_REASON = 300, 200  # characters in the list


class Quantity(NamedTuple):
    """A number per token: its name in the data, its label and its meaning."""

    name: str
    label: str
    meaning: str


QUANTITIES = (
    Quantity("token_scores", "token score", "raw output of the token reward model"),
    Quantity("weight", "weight (omega)", "factor of the token in the loss, 0 to 1"),
    Quantity(
        "advantage",
        "weight x advantage",
        "how much the update raises (above 0) or lowers the token",
    ),
    Quantity("entropy", "entropy", "of the policy at the token, nats"),
    Quantity(
        "difference",
        "trainer - sampler",
        "probability of the token in the trainer minus that in the sampler",
    ),
)


def quantities(
    completion: SavedCompletion, weight: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Return the per-token numbers to store; the page derives the others."""
    saved = completion.per_token
    values = {
        name: saved[name] for name in ("token_scores", "entropy") if name in saved
    }
    if weight is not None:
        values["weight"] = weight
    if "log_probs" in saved and "old_log_probs" in saved:
        trainer, sampler = saved["log_probs"], saved["old_log_probs"]
        values["difference"] = np.exp(trainer) - np.exp(sampler)
    return values


def quantise(values: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Return low, high and a byte per value; errors are at most (high - low) / 510."""
    low, high = float(values.min()), float(values.max())
    scale = LEVELS / (high - low) if high > low else 0.0
    codes = np.rint((values.astype(np.float64) - low) * scale)
    return low, high, codes.astype(np.uint8)


def pack(completion: SavedCompletion, weight: np.ndarray | None) -> bytes:
    """Return a completion with its numbers, deflated.

    Numbers are omitted if the file has no text per token. If the token texts do not add
    up to the completion's text, they are stored instead of it (`exact` is false).
    """
    header: dict[str, Any] = {
        "question": completion.question,
        "gold": completion.gold_answer,
        "text": completion.text,
        "reason": completion.reason,
    }
    body = b""
    if completion.pieces:
        texts = align(completion.pieces, completion.text)
        header["exact"] = texts is not None
        texts = list(completion.pieces) if texts is None else texts
        header["text"] = "".join(filter(None, texts))
        header["omitted"] = [
            [index, completion.pieces[index]]
            for index, text in enumerate(texts)
            if text is None
        ]
        planes = quantities(completion, weight)
        coded = {name: quantise(values) for name, values in planes.items()}
        header["planes"] = [[name, low, high] for name, (low, high, _) in coded.items()]
        header["tokens"] = len(texts)
        lengths = (len(text or "") + _astral(text or "") for text in texts)
        body = b"".join(map(_leb128, lengths))
        body += b"".join(codes.tobytes() for _, _, codes in coded.values())
    text = json.dumps(header, ensure_ascii=False).encode(errors="replace")
    return zlib.compress(text + b"\0" + body, 6)


def _astral(text: str) -> int:
    """Count characters that are two units in UTF-16, as JavaScript counts."""
    return sum(letter > "\uffff" for letter in text) if not text.isascii() else 0


def _leb128(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    return bytes([*result, value])


class Entry(NamedTuple):
    """A row of the list; `content` is None if it was not packed."""

    completion: SavedCompletion
    content: bytes | None


class Embedded(NamedTuple):
    """Part of a page: the list of completions, and the content of the first of them.

    rows: base64 of the deflated list of `listed` completions; contents: base64 of each.
    """

    rows: str
    contents: list[str]
    listed: int


def embed(entries: Sequence[Entry], size: int) -> Embedded:
    """Return the list of `entries` and their content, as far as they fit.

    Earlier entries come first; the list has at most half of the `size` in bytes.
    """
    entries = entries[:MAX_LISTED]
    while len(rows := _encode(_table(entries))) > size / 2 and entries:
        entries = entries[: len(entries) // 2]
    remaining = size - len(rows)
    contents: list[str] = []
    for entry in entries:
        coded = base64.b64encode(entry.content or b"").decode()
        remaining -= len(coded) + 1
        if entry.content is None or remaining < 0:
            break
        contents.append(coded)
    return Embedded(rows, contents, len(entries))


def _encode(table: dict[str, Any]) -> str:
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode()


def _table(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the list as columns; texts are indices into tables of texts."""
    each = [entry.completion for entry in entries]
    questions, question = _number((c.question or c.id)[:MAX_QUESTION] for c in each)
    reasons, reason = _number(c.reason[:MAX_REASON] for c in each)
    outcomes, outcome = _number(c.outcome for c in each)
    finishes, finish = _number(c.finish_reason for c in each)
    verifiers, by = _number(c.by for c in each)
    return {
        "questions": questions,
        "reasons": reasons,
        "outcomes": outcomes,
        "finishes": finishes,
        "verifiers": verifiers,
        "question": question,
        "reason": reason,
        "outcome": outcome,
        "finish": finish,
        "by": by,
        "step": [c.step for c in each],
        "group": [c.group for c in each],
        "sample": [c.sample for c in each],
        "tokens": [c.tokens for c in each],
        "selected": [int(c.selected) for c in each],
        "advantage": [round(c.advantage, 6) for c in each],
    }


def _number(texts: Iterable[str]) -> tuple[list[str], list[int]]:
    numbers: dict[str, int] = {}
    column = [numbers.setdefault(text, len(numbers)) for text in texts]
    return list(numbers), column
