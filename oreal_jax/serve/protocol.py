"""Requests of the API: from JSON values to prompts and sampling parameters.

Types are checked by pydantic, ranges by `Sampling`. Fields of OpenAI's API that
are not supported here are rejected unless their value has no effect.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import pydantic

from oreal_jax.data import Chat
from oreal_jax.errors import InputError
from oreal_jax.sampling import Request, Sampling
from oreal_jax.sampling.session import Session
from oreal_jax.serve.errors import ApiError

MAX_N, MAX_STOPS, MAX_STOP_LENGTH = 128, 16, 256
COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` for `/v1/completions`
# Fields that have no effect here, and those that are accepted with these values only.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier"}
IGNORED |= {"prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "top_logprobs": (0,),
    **dict.fromkeys(("audio", "prediction", "reasoning_effort", "verbosity"), ()),
    "web_search_options": (),
}
STRICT = pydantic.ConfigDict(extra="forbid", strict=True)


class StreamOptions(pydantic.BaseModel):
    """Options of a streamed reply."""

    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Fields(pydantic.BaseModel):
    """Fields that both kinds of requests have."""

    model_config = STRICT
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = pydantic.Field(None, ge=1, le=MAX_N)
    seed: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None


class TextPart(pydantic.BaseModel):
    """A part of a message; images and sounds are not supported."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)
    type: Literal["text"]
    text: str


class Message(pydantic.BaseModel):
    """A message of a conversation; other fields of it are ignored."""

    model_config = pydantic.ConfigDict(extra="ignore", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]


class ChatFields(Fields):
    """The fields of `/v1/chat/completions`."""

    messages: list[Message] = pydantic.Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None


class CompletionFields(Fields):
    """The fields of `/v1/completions`."""

    prompt: Any
    logprobs: int | None = pydantic.Field(None, ge=0)


class Job(NamedTuple):
    """A valid request of the API: `samples` completions of each engine request."""

    requests: list[Request]
    samples: int
    stops: list[str]
    logprobs: bool
    stream: bool
    include_usage: bool


def chat_job(values: dict[str, Any], chat: Chat, session: Session) -> Job:
    """Return the job of a request to `/v1/chat/completions`.

    Raises:
        ApiError: the request is invalid.
    """
    fields = _parse(ChatFields, values)
    messages = []
    for message in fields.messages:
        content = message.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": content})
    try:
        prompt = chat.encode_messages(messages)
    except Exception as error:  # templates raise errors of many kinds
        message = f"messages: the chat template rejects them: {error}"
        raise ApiError(message[:500], param="messages") from None
    limit = fields.max_completion_tokens
    if limit is None:
        limit = fields.max_tokens
    if limit is None:
        limit = max(1, session.length - len(prompt))
    return _make_job(fields, [prompt], limit, bool(fields.logprobs), session)


def completion_job(values: dict[str, Any], chat: Chat, session: Session) -> Job:
    """Return the job of a request to `/v1/completions`.

    Raises:
        ApiError: the request is invalid.
    """
    fields = _parse(CompletionFields, values)
    if fields.logprobs:
        message = "use logprobs=0 for the sampled token alone"
        raise ApiError(
            f"logprobs={fields.logprobs}: log-probabilities of other tokens are not "
            f"supported; {message}",
            param="logprobs",
        )
    prompts = [
        chat.encode_text(prompt, special=True) if isinstance(prompt, str) else prompt
        for prompt in _prompts(fields.prompt)
    ]
    limit = COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens
    return _make_job(fields, prompts, limit, fields.logprobs is not None, session)


def _parse(kind: type[pydantic.BaseModel], values: dict[str, Any]) -> Any:
    """Check the names and types of fields."""
    remaining = {}
    for name, value in values.items():
        neutral = NEUTRAL.get(name)
        if neutral is None or name in kind.model_fields:
            remaining[name] = value
        elif value is not None and value not in neutral:
            raise ApiError(f"{name} is not supported by this server", param=name)
    remaining = {k: v for k, v in remaining.items() if k not in IGNORED}
    try:
        return kind.model_validate(remaining)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(map(str, first["loc"]))[:200]
        if first["type"] == "extra_forbidden":
            message = f"Unrecognized request argument supplied: {path}"
        else:
            message = f"{path}: {first['msg']}"
        raise ApiError(message, param=path) from None


def _prompts(value: Any) -> Sequence[str | list[int]]:
    """Return the prompts of a request: one or several, texts or tokens."""
    is_tokens = lambda x: isinstance(x, list) and all(type(t) is int for t in x)
    prompts = [value] if isinstance(value, str) or is_tokens(value) else value
    if isinstance(prompts, list) and len(prompts) <= MAX_N:
        if all(isinstance(prompt, str) for prompt in prompts):
            return prompts
        if all(is_tokens(prompt) for prompt in prompts):
            return prompts
    raise ApiError(
        f"prompt: expected a string, a list of token ids, or a list of at most {MAX_N} "
        f"strings or {MAX_N} such lists",
        param="prompt",
    )


def _make_job(
    fields: Fields,
    prompts: Sequence[list[int]],
    max_tokens: int,
    logprobs: bool,
    session: Session,
) -> Job:
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stops) > MAX_STOPS:
        raise ApiError(f"stop: at most {MAX_STOPS} strings", param="stop")
    for text in stops:
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            message = f"each string must have 1 to {MAX_STOP_LENGTH} characters"
            raise ApiError(f"stop: {message}", param="stop")
    sampling = _make_sampling(fields, max_tokens, session)
    requests = []
    for prompt in prompts:
        _check_length(len(prompt), max_tokens, session)
        # Seeds of the engine have 31 bits.
        seed = secrets.randbits(31) if fields.seed is None else fields.seed % 2**31
        requests.append(Request(prompt, sampling, key=0, seed=seed))
        try:
            session.engine.check_prompt(requests[-1])
        except InputError as error:
            raise ApiError(str(error), param="prompt") from None
    options = fields.stream_options
    return Job(
        requests,
        fields.n or 1,
        stops,
        logprobs,
        stream=bool(fields.stream),
        include_usage=bool(options and options.include_usage),
    )


def _make_sampling(fields: Fields, max_tokens: int, session: Session) -> Sampling:
    names = (
        *("temperature", "top_p", "top_k", "min_p"),
        *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    )
    values = {name: x for name in names if (x := getattr(fields, name)) is not None}
    biases = fields.logit_bias or {}
    if len(biases) > session.biases:
        message = f"logit_bias: at most {session.biases} tokens"
        raise ApiError(message, param="logit_bias")
    if not all(re.fullmatch("[0-9]{1,9}", token) for token in biases):
        message = "logit_bias: keys must be token ids"
        raise ApiError(message, param="logit_bias")
    pairs = tuple((int(token), bias) for token, bias in biases.items())
    try:
        sampling = Sampling(max_tokens=max_tokens, logit_bias=pairs, **values)
        session.engine.check_sampling(sampling)
    except InputError as error:
        message = str(error).removeprefix("sampling: ")
        param = re.match(r"\w*", message)
        raise ApiError(message, param=param and param[0]) from None
    return sampling


def _check_length(prompt_tokens: int, max_tokens: int, session: Session) -> None:
    if prompt_tokens + max_tokens > session.length:
        raise ApiError(
            f"This model's maximum context length is {session.length} tokens. The "
            f"prompt has {prompt_tokens} tokens and {max_tokens} are requested for the "
            "completion",
            code="context_length_exceeded",
            param="max_tokens",
        )
