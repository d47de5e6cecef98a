"""Replies of the API: JSON objects of OpenAI's two kinds of completions."""

import abc
import secrets
import time
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

Json = dict[str, Any]


class Token(NamedTuple):
    """A sampled token: its text and its log-probability."""

    text: str
    log_prob: float


class Delta(NamedTuple):
    """New text of a choice, with its tokens; `finish_reason` ends the choice."""

    choice: int
    text: str
    tokens: list[Token]
    finish_reason: str | None


class Reply(abc.ABC):
    """A reply, complete or in chunks. `logprobs` adds those of sampled tokens."""

    prefix: ClassVar[str]
    name: ClassVar[str]
    chunk_name: ClassVar[str]

    def __init__(self, model: str, prompt_tokens: int, count: int, logprobs: bool):
        self.prompt_tokens, self.logprobs = prompt_tokens, logprobs
        self.completion_tokens = 0
        self._begun: set[int] = set()  # choices with a chunk
        self._choices: list[list[Delta]] = [[] for _ in range(count)]
        self._header = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @abc.abstractmethod
    def _choice(self, text: str, tokens: Sequence[Token] | None) -> Json:
        """Return the part of a complete choice that depends on the kind."""

    @abc.abstractmethod
    def _chunk(self, delta: Delta, offset: int, first: bool) -> Json:
        """Return the part of a chunk's choice that depends on the kind."""

    def count(self, delta: Delta) -> None:
        """Count the tokens of a delta."""
        self.completion_tokens += len(delta.tokens)

    def add(self, delta: Delta) -> None:
        """Record a delta for `complete`."""
        self.count(delta)
        self._choices[delta.choice].append(delta)

    def complete(self) -> Json:
        """Return the reply with the recorded choices."""
        choices = []
        for index, deltas in enumerate(self._choices):
            tokens = [token for delta in deltas for token in delta.tokens]
            text = "".join(delta.text for delta in deltas)
            content = self._choice(text, tokens if self.logprobs else None)
            reason = deltas[-1].finish_reason
            choices.append({"index": index, "finish_reason": reason, **content})
        return self._object(self.name, choices) | {"usage": self._usage()}

    def chunk(self, delta: Delta) -> Json:
        """Return the chunk of a streamed reply for a delta."""
        self.count(delta)
        earlier = self._choices[delta.choice]
        offset = sum(len(token.text) for each in earlier for token in each.tokens)
        if self.logprobs:
            earlier.append(delta)
        choice = {"index": delta.choice, "finish_reason": delta.finish_reason}
        choice |= self._chunk(delta, offset, delta.choice not in self._begun)
        self._begun.add(delta.choice)
        return self._object(self.chunk_name, [choice])

    def usage_chunk(self) -> Json:
        """Return the last chunk, with the number of tokens."""
        return self._object(self.chunk_name, []) | {"usage": self._usage()}

    def _object(self, name: str, choices: list[Json]) -> Json:
        return self._header | {"object": name, "choices": choices}

    def _usage(self) -> Json:
        prompt, completion = self.prompt_tokens, self.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class ChatReply(Reply):
    """A reply of `/v1/chat/completions`."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _choice(self, text: str, tokens: Sequence[Token] | None) -> Json:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": _chat_logprobs(tokens)}

    def _chunk(self, delta: Delta, offset: int, first: bool) -> Json:
        logprobs = _chat_logprobs(delta.tokens) if self.logprobs else None
        role = {"role": "assistant"} if first else {}
        return {"delta": role | {"content": delta.text}, "logprobs": logprobs}


class CompletionReply(Reply):
    """A reply of `/v1/completions`."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def _choice(self, text: str, tokens: Sequence[Token] | None) -> Json:
        return {"text": text, "logprobs": _completion_logprobs(tokens, 0)}

    def _chunk(self, delta: Delta, offset: int, first: bool) -> Json:
        tokens = delta.tokens if self.logprobs else None
        logprobs = _completion_logprobs(tokens, offset)
        return {"text": delta.text, "logprobs": logprobs}


def _chat_logprobs(tokens: Sequence[Token] | None) -> Json | None:
    if tokens is None:
        return None
    entry = lambda token: {
        "token": token.text,
        "logprob": token.log_prob,
        # The text of a token that is part of a character does not have its bytes.
        "bytes": None if "\ufffd" in token.text else list(token.text.encode()),
        "top_logprobs": [],
    }
    return {"content": [entry(token) for token in tokens], "refusal": None}


def _completion_logprobs(tokens: Sequence[Token] | None, offset: int) -> Json | None:
    if tokens is None:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.log_prob for token in tokens],
        "top_logprobs": None,
        "text_offset": offsets,
    }
