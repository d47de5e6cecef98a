"""Attempts at problems: completions drawn from a model and judged.

A completion is a function of (weights, sampling, seed, prompt, sample) and of nothing
else, so one that is on disk need not be drawn again: what was interrupted goes on, and
16 samples begin with the 4 that are there.
"""

import collections
import contextlib
import dataclasses
import datetime
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from oreal_jax.checkpoints.run import newest_policy
from oreal_jax.checkpoints.source import ModelSource
from oreal_jax.data import Chat, Prompt
from oreal_jax.errors import InputError
from oreal_jax.files import write_text
from oreal_jax.model.decoding import Weights
from oreal_jax.rollout import judged
from oreal_jax.sampling import Completion, Engine, Request, Sampling
from oreal_jax.verify import Pool, Verdict
from oreal_jax.verify.llm_judge import Case, Judge


class Drawn(NamedTuple):
    """A completion's text, how many tokens it has, and how it ended."""

    completion: str
    tokens: int
    finish_reason: str


Key = tuple[str, str, int]  # (part, prompt id, sample)
Finished = MutableMapping[Key, Drawn]


class Attempt(NamedTuple):
    """A judged completion of a prompt."""

    prompt: Prompt
    sample: int
    drawn: Drawn
    verdict: Verdict

    @property
    def correct(self) -> bool:
        """Undecided counts as not correct."""
        return self.verdict.outcome == "correct"

    def as_json(self) -> dict[str, Any]:
        """One JSON line."""
        return {
            "id": self.prompt.id,
            "sample": self.sample,
            "question": self.prompt.question,
            "gold_answer": self.prompt.gold_answer,
            **self.drawn._asdict(),
            "verdict": self.verdict.outcome,
            "reason": self.verdict.reason,
            "by": self.verdict.by,
        }


class Journal(collections.UserDict):
    """Drawn completions that are on disk as soon as they are set.

    The first line of the file says how they are drawn, each further line is one.
    """

    def __init__(self, path: Path, drawing: dict[str, Any]):
        """Reads what an interrupted command left in `path`. Nothing is written before
        the first completion.

        Raises:
            InputError: the file is of another drawing, or none of ours.
        """
        super().__init__()
        self.path = path
        self._header = {"drawing": json.loads(json.dumps(drawing))}
        if path.exists():
            self._read()

    def __setitem__(self, key: Key, drawn: Drawn) -> None:
        """Keeps a completion."""
        row = [*key, *drawn]
        lines = [row] if self.path.exists() else [self._header, row]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}"
            ) from None
        super().__setitem__(key, drawn)

    def remove(self) -> None:
        """Once what is made of it is whole."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]  # a kill cuts one
            read: list[Any] = list(map(json.loads, whole)) or [self._header]
            header, rows = read[0], read[1:]
            found = {(row[0], row[1], row[2]): Drawn(*row[3:]) for row in rows}
            old, new = header["drawing"], self._header["drawing"]
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            raise InputError(f"{self.path}: not a file of unfinished work") from None
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                raise InputError(
                    f"{self.path}: the unfinished work had {name}={old.get(name)!r}, "
                    f"now it is {new.get(name)!r}; remove the file to begin anew"
                )
        if whole != lines:
            write_text(self.path, "".join(whole))
        self.data.update(found)


@contextlib.contextmanager
def kept_beside(
    out: Path | None, drawing: dict[str, Any], say: Callable[[str], None]
) -> Iterator[Finished]:
    """Finished completions, kept in `OUT.unfinished` while the work goes on.

    The file goes away when the block ends well. Without `out` they are in memory.
    """
    if out is None:
        try:
            yield {}
        except KeyboardInterrupt:
            say("nothing is kept where no file is named for the results")
            raise
        return
    journal = Journal(out.with_name(out.name + ".unfinished"), drawing)
    if journal:
        say(f"{journal.path}: going on after {len(journal)} completions")
    try:
        yield journal
    except KeyboardInterrupt:
        kept = f"{len(journal)} completions are in {journal.path}"
        said = kept if journal else "nothing is finished yet"
        say(f"{said}; go on with the same command")
        raise
    journal.remove()


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """What tells one list of questions from another."""
    asked = [(prompt.id, prompt.question) for prompt in prompts]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def drawing(
    source: ModelSource,
    chat: Chat,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All that completions depend on, as plain JSON values; `options` are those of the
    command that say how they are drawn."""
    of_run = source.files != source.path
    weights = newest_policy(source.path) if of_run else source.path
    newest = max(p.stat().st_mtime for p in weights.rglob("*") if p.is_file())
    return dict(options) | {
        "model": str(weights),
        "model of": datetime.datetime.fromtimestamp(newest).isoformat(),
        "system_prompt": chat.system_prompt,
        "questions": fingerprint(prompts),
    }


def draw(
    engine: Engine,
    weights: Weights,
    sampling: Sampling,
    chat: Chat,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    seed: int,
    finished: Finished,
    part: str = "",
    on_progress: Callable[[int, int], None] = lambda tokens, finished: None,
) -> list[list[Drawn]]:
    """`samples` completions of each prompt, those in `finished` not drawn again.

    `weights` are the engine's; `part` tells apart what shares `finished`.

    Raises:
        InputError: a prompt and its completion exceed the model.
    """
    missing = lambda prompt: [
        k for k in range(samples) if (part, prompt.id, k) not in finished
    ]
    whole = [prompt for prompt in prompts if len(missing(prompt)) == samples]
    rest = [(p, k) for p in prompts for k in missing(p) if len(missing(p)) < samples]
    present = samples * (len(prompts) - len(whole)) - len(rest)
    on_progress(0, present)

    def complete(firsts: list[tuple[Prompt, int]], count: int) -> None:
        def keep(request: int, sample: int, done: Completion) -> None:
            prompt, first = firsts[request]
            text = chat.decode(done.tokens)
            drawn = Drawn(text, len(done.tokens), done.finish_reason)
            finished[part, prompt.id, first + sample] = drawn

        engine.sample(
            weights,
            [
                Request(chat.encode(p.question), sampling, p.key, first, seed)
                for p, first in firsts
            ],
            count,
            on_progress=on_progress,
            on_finished=keep,
        )

    complete(rest, 1)
    complete([(prompt, 0) for prompt in whole], samples)
    return [[finished[part, p.id, k] for k in range(samples)] for p in prompts]


def judge(
    pool: Pool,
    prompts: Sequence[Prompt],
    drawn: Sequence[Sequence[Drawn]],
    on_done: Callable[[int], None] = lambda count: None,
    second: Judge | None = None,
) -> list[list[Attempt]]:
    """The completions of each prompt with their verdicts, by the pool's rule and, where
    it does not say correct, by the `second` judge."""
    flat = list(itertools.chain.from_iterable(drawn))
    golds = [
        p.gold_answer for p, group in zip(prompts, drawn, strict=True) for _ in group
    ]
    pairs = [(one.completion, gold) for one, gold in zip(flat, golds, strict=True)]
    verdicts = judged(pool, flat, pairs, on_done)
    if second:
        asked = [p for p, group in zip(prompts, drawn, strict=True) for _ in group]
        verdicts = second.verdicts(
            [
                Case(prompt.question, prompt.gold_answer, one.completion, verdict)
                for prompt, one, verdict in zip(asked, flat, verdicts, strict=True)
            ]
        )
    told = iter(verdicts)
    return [
        [Attempt(prompt, k, one, next(told)) for k, one in enumerate(group)]
        for prompt, group in zip(prompts, drawn, strict=True)
    ]


def with_pass_rates(attempts: Sequence[Sequence[Attempt]]) -> list[Prompt]:
    """Each prompt with the share of its attempts that are correct."""
    share = lambda group: sum(attempt.correct for attempt in group) / len(group)
    return [
        dataclasses.replace(group[0].prompt, pass_rate=share(group))
        for group in attempts
    ]
