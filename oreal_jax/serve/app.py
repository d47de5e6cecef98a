"""The HTTP application: routes, keys, limits, replies and their cancellation."""

import asyncio
import contextlib
import hmac
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from oreal_jax.data import Chat
from oreal_jax.serve import metrics
from oreal_jax.serve.answers import final_answer, score_tokens
from oreal_jax.serve.deltas import deltas
from oreal_jax.serve.errors import ApiError
from oreal_jax.serve.protocol import Job, chat_job, completion_job
from oreal_jax.serve.replies import ChatReply, CompletionReply, Delta, Json, Reply
from oreal_jax.serve.scorer import Scorer
from oreal_jax.serve.worker import Generation, Worker

MAX_BODY = 1 << 20  # bytes of a request
CLIENT_DISCONNECTED = 499  # recorded status; no reply is sent
PAGE = Path(__file__).parent / "page"
# The page runs its own script and style, and talks to this server only.
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"

T = TypeVar("T")


@dataclass
class Service:
    """A model served as `name`; empty `keys` means no authentication.

    `scorer` scores the tokens of solutions on the page, if there is one. `hosts` are
    the names under which the API may be addressed (none: any). Without keys, any other
    name could belong to a web page whose domain resolves to this machine (DNS
    rebinding).
    """

    name: str
    chat: Chat
    worker: Worker
    keys: Sequence[str] = ()
    scorer: Scorer | None = None
    hosts: Sequence[str] = ()

    def __post_init__(self):
        self.metrics = metrics.Metrics(self.worker)
        self.created = int(time.time())

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.model)),
            *(
                Route(path, self._guarded(call), methods=["POST"])
                for path, call in (
                    ("/v1/chat/completions", self.chat_completions),
                    ("/v1/completions", self.completions),
                    ("/answers", self.answers),
                    ("/scores", self.scores),
                )
            ),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/", _file("index.html")),
            *(Route(f"/{name}", _file(name)) for name in ("page.js", "page.css")),
        ]
        handlers: Any = {
            ApiError: lambda _, error: _json(error.as_json(), error.status),
            HTTPException: _http_error,
            ClientDisconnect: lambda *_: Response(status_code=CLIENT_DISCONNECTED),
            Exception: lambda *_: _json(
                ApiError("internal error", status=500).as_json(), 500
            ),
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    def _guarded(
        self, call: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Check the host and the key of requests, and count them."""

        async def endpoint(request: Request) -> Response:
            status = 500
            try:
                self._check_host(request)
                self._check_key(request)
                response = await call(request)
                status = response.status_code
                return response
            except ApiError as error:
                status = error.status
                raise
            except ClientDisconnect:
                status = CLIENT_DISCONNECTED
                raise
            finally:
                path = request.scope["route"].path
                self.metrics.requests.labels(path, status).inc()

        return endpoint

    def _check_host(self, request: Request) -> None:
        host = request.headers.get("host", "")
        name = re.sub(r":\d*$", "", host).strip("[]").rstrip(".").lower()
        if self.hosts and name not in self.hosts:
            message = (
                f"Host {host!r}: without OREAL_API_KEYS this server answers to "
                f"{', '.join(self.hosts)} only"
            )
            raise ApiError(message, status=403)

    def _check_key(self, request: Request) -> None:
        kind, _, key = request.headers.get("authorization", "").partition(" ")
        is_key = lambda known: hmac.compare_digest(known.encode(), key.encode())
        if self.keys and not (kind.lower() == "bearer" and any(map(is_key, self.keys))):
            message = "missing or incorrect API key: Authorization: Bearer KEY"
            raise ApiError(message, status=401, code="invalid_api_key")

    async def models(self, request: Request) -> Response:
        """List the model."""
        return _json({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model."""
        self._check_model(request.path_params["name"])
        return _json(self._model())

    def _model(self) -> Json:
        length = self.worker.session.length
        model = {"id": self.name, "object": "model", "created": self.created}
        model |= {"owned_by": "oreal-jax", "max_model_len": length}
        return model | {"has_token_scores": self.scorer is not None}

    def _check_model(self, name: Any) -> None:
        if isinstance(name, str) and name != self.name:
            raise ApiError(
                f"this server only has the model {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def health(self, request: Request) -> Response:
        """Report whether the engine runs."""
        failed = self.worker.failure is not None
        return _json({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def show_metrics(self, request: Request) -> Response:
        """Return the metrics."""
        return Response(self.metrics.text(), media_type=metrics.CONTENT_TYPE)

    async def answers(self, request: Request) -> Response:
        """Return the final answers of texts, for the page: {"texts": [...]}."""
        texts = (await _read_json(request)).get("texts")
        if not isinstance(texts, list) or not all(isinstance(x, str) for x in texts):
            raise ApiError("texts: expected a list of strings", param="texts")
        find_all = lambda: [final_answer(text) for text in texts]
        return _json({"answers": await run_in_threadpool(find_all)})

    async def scores(self, request: Request) -> Response:
        """Return the texts and scores of a solution's tokens, for the page.

        The request is {"messages": [...], "text": ...}.
        """
        values = await _read_json(request)
        text, scorer = values.pop("text", None), self.scorer
        if not scorer:
            raise ApiError("this server has no token reward model", status=404)
        if not isinstance(text, str):
            raise ApiError("text: expected a string", param="text")
        values |= {"model": self.name, "max_tokens": 1}
        session = self.worker.session
        find = lambda: score_tokens(scorer, self.chat, session, values, text)
        return _json({"tokens": await run_in_threadpool(find)})

    async def chat_completions(self, request: Request) -> Response:
        """Complete a conversation."""
        return await self._complete(request, chat_job, ChatReply)

    async def completions(self, request: Request) -> Response:
        """Complete texts."""
        return await self._complete(request, completion_job, CompletionReply)

    async def _complete(
        self, request: Request, make_job: Callable[..., Job], kind: type[Reply]
    ) -> Response:
        start = time.perf_counter()
        values = await _read_json(request)
        self._check_model(values.get("model"))
        session = self.worker.session
        job = await run_in_threadpool(make_job, values, self.chat, session)
        prompt_tokens = sum(len(each.prompt) for each in job.requests)
        generation = self.worker.generate(job.requests, job.samples)
        self.metrics.prompt_tokens.inc(prompt_tokens)
        reply = kind(self.name, prompt_tokens, generation.count, job.logprobs)
        measured = self._measured(deltas(self.chat, job, generation), start)
        if job.stream:
            return Events(_events(measured, reply, job.include_usage), generation)

        async def collect() -> Json:
            async for delta in measured:
                reply.add(delta)
            return reply.complete()

        with contextlib.closing(generation):
            return _json(await _until_disconnect(collect(), request.receive))

    async def _measured(
        self, pieces: AsyncIterator[Delta], start: float
    ) -> AsyncIterator[Delta]:
        """Pass on deltas and record their times and tokens."""
        first = True
        async for delta in pieces:
            if first:
                self.metrics.first_token.observe(time.perf_counter() - start)
                first = False
            self.metrics.completion_tokens.inc(len(delta.tokens))
            yield delta
        self.metrics.seconds.observe(time.perf_counter() - start)


class Events(Response):
    """A streamed reply as server-sent events; ends if the client disconnects."""

    def __init__(self, events: AsyncIterator[bytes], generation: Generation):
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.events, self.generation = events, generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the reply."""

        async def produce() -> None:
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start"} | start)
            async for event in self.events:
                part = {"body": event, "more_body": True}
                await send({"type": "http.response.body"} | part)
            await send({"type": "http.response.body", "body": b""})

        with contextlib.closing(self.generation), contextlib.suppress(ClientDisconnect):
            await _until_disconnect(produce(), receive)


async def _events(
    pieces: AsyncIterator[Delta], reply: Reply, include_usage: bool
) -> AsyncIterator[bytes]:
    event = lambda data: b"data: " + data + b"\n\n"
    try:
        async for delta in pieces:
            yield event(orjson.dumps(reply.chunk(delta)))
        if include_usage:
            yield event(orjson.dumps(reply.usage_chunk()))
    except ApiError as error:
        yield event(orjson.dumps(error.as_json()))
    yield event(b"[DONE]")


async def _until_disconnect(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Return the result of `work`, which is cancelled if the client disconnects.

    Raises:
        ClientDisconnect: the client disconnected.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _read_json(request: Request) -> Json:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # Pages of other sites can send other types without a CORS preflight.
    if kind != "application/json":
        raise ApiError("Content-Type: must be application/json", status=415)
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(f"the body exceeds {MAX_BODY} bytes", status=413)
    try:
        values = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError("the body must be a JSON object")
    return values


def _json(values: Json, status: int = 200) -> Response:
    return Response(orjson.dumps(values), status, media_type="application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    """Reply to an unknown path or method."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return _json(
        ApiError(message, status=error.status_code).as_json(), error.status_code
    )


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}

    async def endpoint(request: Request) -> Response:
        return FileResponse(PAGE / name, headers=headers)

    return endpoint
