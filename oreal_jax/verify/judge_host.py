"""A host of the LLM judge: requests to an OpenAI-compatible API, and its health."""

import dataclasses
import re
import time
import types
from collections.abc import Callable, Mapping
from typing import Any

import httpx

from oreal_jax.verify.judge_prompt import find_verdict

MAX_REPLY = 2**20  # bytes
TOKENS = "prompt_tokens", "completion_tokens"


class RequestFailed(Exception):
    """A failed request: its kind for the counts, and whether the host is to blame.

    `tokens` are those of a reply without a verdict.
    """

    def __init__(
        self,
        kind: str,
        host: bool = True,
        retry_after: float = 0.0,
        tokens: Mapping[str, int] = types.MappingProxyType({}),
        message: str = "",
    ):
        super().__init__(message or kind)
        self.kind, self.host, self.retry_after = kind, host, retry_after
        self.tokens = tokens


@dataclasses.dataclass
class Host:
    """An API's base address (ending in /v1) and its state.

    `settings` are the fields of a request that some models reject.
    """

    url: str
    settings: Mapping[str, int]
    requests: int = 0  # under way
    failures: int = 0  # in a row
    out: bool = False
    reported: bool = False  # its failure has been logged

    def request(
        self,
        client: httpx.Client,
        body: Mapping[str, Any],
        timeout: float,
        is_closed: Callable[[], bool],
    ) -> tuple[str, dict[str, int]]:
        """Return a reply that has a verdict, and its numbers of tokens.

        Raises:
            RequestFailed: there is none.
        """
        deadline = time.monotonic() + timeout
        try:
            while True:
                settings = self.settings
                status, content = self._post(
                    client, {**body, **settings}, deadline, is_closed
                )
                if status == 200:
                    return read_reply(httpx.Response(200, content=content).json())
                if self.settings is settings:  # no other thread has changed them
                    self.settings = accepted_settings(settings, content)
                if self.settings == settings:
                    raise RequestFailed("status", host=False)
        except httpx.TimeoutException:
            raise RequestFailed("timeout") from None
        except httpx.HTTPError:
            raise RequestFailed("connection") from None
        except (ValueError, RecursionError):
            raise RequestFailed("garbage") from None
        except RuntimeError:  # the client was closed
            raise RequestFailed("closed", host=False) from None

    def _post(
        self,
        client: httpx.Client,
        body: Mapping[str, Any],
        deadline: float,
        is_closed: Callable[[], bool],
    ) -> tuple[int, bytes]:
        """Return status and content of a reply, or of a complaint about the request."""
        url = f"{self.url}/chat/completions"
        with client.stream("POST", url, json=body) as response:
            check_status(response)
            content = b""
            for chunk in response.iter_bytes():
                content += chunk
                # httpx limits the time of a chunk, not that of the whole reply.
                if time.monotonic() > deadline:
                    raise RequestFailed("timeout")
                if is_closed():
                    raise RequestFailed("closed", host=False)
                if len(content) > MAX_REPLY:
                    raise RequestFailed("garbage")
            return response.status_code, content

    def is_healthy(self, client: httpx.Client) -> bool:
        """Return whether it lists its models."""
        try:
            response = client.get(f"{self.url}/models")
            return response.status_code == 200 and isinstance(response.json(), dict)
        except (httpx.HTTPError, ValueError, RuntimeError):
            return False


def accepted_settings(settings: Mapping[str, int], complaint: bytes) -> dict[str, int]:
    """Return settings without what a complaint names, or renamed."""
    changed = dict(settings)
    if b"max_completion_tokens" in complaint and "max_tokens" in changed:
        changed["max_completion_tokens"] = changed.pop("max_tokens")
    elif b"temperature" in complaint:
        changed.pop("temperature", None)
    return changed


def check_status(response: httpx.Response) -> None:
    """Raise RequestFailed unless a reply or a complaint about the request follows."""
    status = response.status_code
    if status in (200, 400, 413, 422):  # the others are about the host
        return
    header = response.headers.get("retry-after", "")
    seconds = min(30.0, float(header)) if re.fullmatch(r"\d{1,4}", header) else 0.0
    message = f"HTTP status {status}"
    raise RequestFailed("status", retry_after=seconds, message=message)


def read_reply(reply: Any) -> tuple[str, dict[str, int]]:
    """Return the text of a complete reply with a verdict, and its numbers of tokens.

    Raises:
        RequestFailed: it has no verdict.
    """
    try:
        choice, usage = reply["choices"][0], reply.get("usage") or {}
        message, finish_reason = choice["message"], choice["finish_reason"]
        text = message["content"]
        counts = {name: usage.get(name) for name in TOKENS}
        if text is None and (
            message.get("reasoning_content") or message.get("reasoning")
        ):
            text = ""  # it has only thought
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RequestFailed("garbage") from None
    tokens = {name: n for name, n in counts.items() if type(n) is int and n > 0}
    if not isinstance(text, str):
        raise RequestFailed("garbage", tokens=tokens)
    if finish_reason != "stop":
        raise RequestFailed("cut_short", host=False, tokens=tokens)
    if not find_verdict(text):
        raise RequestFailed("no_verdict", host=False, tokens=tokens)
    return text, tokens


def is_address(url: str) -> bool:
    """Return whether a text is a web address."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)
