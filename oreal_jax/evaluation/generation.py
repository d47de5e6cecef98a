"""Resumable generation: a journal of completions, each written once it is finished.

A completion depends only on (weights, sampling, seed, prompt, sample). Those that are
recorded are not generated again: an interrupted command resumes, and 16 samples begin
with 4 that exist.
"""

import contextlib
import datetime
import json
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from oreal_jax.checkpoints.source import ModelSource
from oreal_jax.data import Chat, Prompt
from oreal_jax.errors import InputError
from oreal_jax.evaluation.completions import TOO_LONG, CompletionRecord
from oreal_jax.files import fingerprint, write_text
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling import Completion, Engine, Request, Sampling

Key = tuple[str, str, int]  # (part, prompt id, sample)
Records = MutableMapping[Key, CompletionRecord]


class Journal(dict[Key, CompletionRecord]):
    """Records of completions, each written to disk when it is set.

    The first line of the file has the settings of their generation, each further line
    one record.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        """Read the records of an interrupted command, if `path` exists.

        The file is created by the first record.

        Raises:
            InputError: the file is not a journal, or has other settings.
        """
        super().__init__()
        self.path = path
        # The key is that of existing files.
        self._header = {"drawing": json.loads(json.dumps(settings))}
        if path.exists():
            self._read()

    def __setitem__(self, key: Key, record: CompletionRecord) -> None:
        """Append a record."""
        row = [*key, *record]
        lines = [row] if self.path.exists() else [self._header, row]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written: {error.strerror}"
            ) from None
        super().__setitem__(key, record)

    def _read(self) -> None:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            # A kill may have cut the last line.
            complete = [line for line in lines if line.endswith("\n")]
            header, *rows = list(map(json.loads, complete)) or [self._header]
            for part, id, sample, *record in rows:
                super().__setitem__((part, id, sample), CompletionRecord(*record))
            old, new = header["drawing"], self._header["drawing"]
        except (OSError, ValueError, TypeError, KeyError, IndexError):
            raise InputError(f"{self.path}: not a file of unfinished work") from None
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name):
                raise InputError(
                    f"{self.path}: the unfinished work had {name}={old.get(name)!r}, "
                    f"now it is {new.get(name)!r}; remove the file to start over"
                )
        if complete != lines:
            write_text(self.path, "".join(complete))


def journal_path(out: Path | None) -> Path | None:
    """Return the path of the journal of a command that writes `out`."""
    return out and out.with_name(f"{out.name}.unfinished")


def unfinished_date(out: Path | None) -> datetime.date | None:
    """Return the date in the prompts of unfinished work, None if there is none."""
    if not (path := journal_path(out)):
        return None
    try:
        with path.open(encoding="utf-8") as file:
            settings = json.loads(file.readline())["drawing"]
        return settings["date"] and datetime.date.fromisoformat(settings["date"])
    except (OSError, ValueError, TypeError, KeyError):
        return None  # `Journal` reports an invalid file


@contextlib.contextmanager
def resumable(
    out: Path | None, settings: Mapping[str, Any], log: Callable[[str], None]
) -> Iterator[Records]:
    """Yield the records of finished completions, a journal in `OUT.unfinished`.

    The journal is removed when the block ends without error. Without `out` the records
    are in memory only.
    """
    path = journal_path(out)
    records = Journal(path, settings) if path else {}
    if records:
        log(f"{path}: resuming after {len(records)} completions")
    try:
        yield records
    except KeyboardInterrupt:
        log(
            f"{len(records)} completions are in {path}; resume with the same command"
            if path
            else "no completions are kept because no output file is named"
        )
        raise
    if path:
        path.unlink(missing_ok=True)


def generation_settings(
    source: ModelSource,
    chat: Chat,
    prompts: Sequence[Prompt],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that completions depend on, as JSON values.

    `options` are the generation options of a command.
    """
    weights = source.weights
    newest = max(p.stat().st_mtime for p in weights.rglob("*") if p.is_file())
    return dict(options) | {
        "model": str(weights),
        "model of": datetime.datetime.fromtimestamp(newest).isoformat(),
        "system_prompt": chat.system_prompt,
        "chat_template": options.get("chat_template") and fingerprint(chat.template),
        "template_vars": chat.template_vars or None,
        "date": chat.date.isoformat() if chat.prints_date else None,
        "stop_strings": list(chat.stop_strings),
        "stop_words": list(source.settings.get("stop_words", ())),
        "questions": fingerprint([(p.id, p.question) for p in prompts]),
    }


def generate(
    engine: Engine,
    weights: Weights,
    sampling: Sampling,
    chat: Chat,
    prompts: Sequence[Prompt],
    samples: int,
    *,
    seed: int,
    records: Records,
    part: str = "",
    on_progress: Callable[[int, int], None] = lambda tokens, finished: None,
    log: Callable[[str], None] = lambda text: None,
) -> list[list[CompletionRecord]]:
    """Generate `samples` completions of each prompt that are not in `records` yet.

    `weights` are the engine's; `part` names the evaluation within `records`. A prompt
    that is too long is logged, and its completions are `TOO_LONG`.

    Raises:
        InputError: every prompt with its completion exceeds the model.
    """
    encoded = {prompt: chat.encode(prompt.question) for prompt in prompts}
    too_long: dict[Prompt, InputError] = {}
    for prompt, tokens in encoded.items():
        try:
            engine.check_length(len(tokens), sampling.max_tokens)
        except InputError as error:
            too_long[prompt] = error
    if prompts and len(too_long) == len(encoded):
        raise next(iter(too_long.values()))
    where = f"{part}: " if part else ""
    for prompt, error in too_long.items():
        log(f"{where}problem {prompt.id!r} is too long for a completion: {error}")
    missing = {
        p: [k for k in range(samples) if (part, p.id, k) not in records]
        for p in prompts
        if p not in too_long
    }
    new = [(prompt, 0) for prompt in missing if len(missing[prompt]) == samples]
    partial = [
        (prompt, k)
        for prompt in missing
        if len(missing[prompt]) < samples
        for k in missing[prompt]
    ]
    on_progress(0, samples * (len(prompts) - len(new)) - len(partial))

    def complete(first_samples: list[tuple[Prompt, int]], count: int) -> None:
        def record(request: int, sample: int, completion: Completion) -> None:
            prompt, first = first_samples[request]
            records[part, prompt.id, first + sample] = CompletionRecord(
                chat.decode(completion.tokens),
                len(completion.tokens),
                completion.finish_reason,
            )

        requests = [
            Request(encoded[prompt], sampling, prompt.key, first, seed)
            for prompt, first in first_samples
        ]
        engine.sample(
            weights, requests, count, on_progress=on_progress, on_finished=record
        )

    complete(partial, 1)
    complete(new, samples)
    return [
        [
            TOO_LONG if prompt in too_long else records[part, prompt.id, k]
            for k in range(samples)
        ]
        for prompt in prompts
    ]
