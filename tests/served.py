"""A server of a model in this process, for tests, and requests to it."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import orjson


class Served:
    """A client of a server, and the server's parts."""

    def __init__(self, url: str, server):
        self.url, self.server = url, server
        self.service = server.service
        self.session = server.service.worker.session
        self.client = httpx.Client(base_url=url, timeout=120)

    def post(self, path: str, **fields) -> httpx.Response:
        return self.client.post(path, json={"model": "tiny"} | fields)

    def chat(self, question: str = "max 3 4?", **fields) -> dict[str, Any]:
        messages = [{"role": "user", "content": question}]
        reply = self.post("/v1/chat/completions", messages=messages, **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def complete(self, prompt: Any = "max 3 4?", **fields) -> dict[str, Any]:
        reply = self.post("/v1/completions", prompt=prompt, **fields)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def error(self, path: str = "/v1/completions", **fields) -> tuple[int, dict]:
        defaults = {"prompt": "?"} if path == "/v1/completions" else {}
        reply = self.post(path, **defaults | fields)
        return reply.status_code, reply.json()["error"]

    def metric(self, name: str) -> float:
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith(name))

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until no slot is used and no completion waits."""
        deadline = time.monotonic() + seconds
        while self.metric("oreal_slots_used") or self.metric("oreal_waiting"):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def events(lines: Iterator[str]) -> list[dict[str, Any]]:
    """Return the objects of a streamed reply, which must end with [DONE]."""
    data = [line.removeprefix("data: ") for line in lines if line]
    assert data.pop() == "[DONE]"
    return [orjson.loads(text) for text in data]


@contextlib.contextmanager
def serving(
    directory: Path, *, rows=32, length=160, queue=64, keys=(), token_scores=False
) -> Iterator[Served]:
    """Serve a model as "tiny"."""
    from oreal_jax.loading import load_model
    from oreal_jax.sampling.session import Session
    from oreal_jax.serve.app import Service
    from oreal_jax.serve.scorer import Scorer
    from oreal_jax.serve.server import Server, listen, warm_up
    from oreal_jax.serve.worker import Worker

    model = load_model(directory, devices=jax.devices()[:1])
    engine = model.make_engine(rows=rows)
    session = Session(engine, engine.weights(model.params), length, 512)
    warm_up(session, model.chat)
    listener = listen("127.0.0.1", 0)
    messages: list[str] = []
    scorer = Scorer(model) if token_scores else None
    service = Service("tiny", model.chat, Worker(session, queue), keys, scorer)
    server = Server(service, messages.append)
    thread = threading.Thread(target=server.run_on, args=(listener,))
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    size = f"{rows} slots, {length} tokens"
    try:
        served = Served(url, server)
        served.client.get("/health").raise_for_status()
        assert messages == [f"serving tiny on {url} ({size})"]
        yield served
        served.client.close()
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()
