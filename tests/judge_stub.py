"""A host of the LLM judge that misbehaves on demand."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 100, "completion_tokens": 10}


def reply(text: str | None, reason: str = "stop", **fields: str) -> bytes:
    message = {"message": {"content": text, **fields}, "finish_reason": reason}
    return json.dumps({"choices": [message], "usage": USAGE}).encode()


class Stub:
    """`behave(handler, question)` replies to requests, `healthy` to health checks."""

    def __init__(self, behave: Callable):
        self.behave, self.healthy = behave, True
        self.requests = self.busy = self.max_busy = 0
        self.bodies: list[dict] = []
        self.lock = threading.Lock()
        self.url = ""


@contextlib.contextmanager
def serving(behave: Callable) -> Iterator[Stub]:
    stub = Stub(behave)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

        open = False  # whether a reply is due

        def done(self):
            with stub.lock:
                stub.busy -= self.open
                self.open = False

        def do_GET(self):
            send(self, b'{"data": []}', 200 if stub.healthy else 503)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.requests += 1
                stub.busy += 1
                stub.max_busy = max(stub.max_busy, stub.busy)
                stub.bodies.append(body)
                self.open = True
            try:
                stub.behave(self, body["messages"][-1]["content"])
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                self.done()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    stub.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()


def send(handler, content: bytes, status: int = 200, length: int | None = None):
    handler.done()  # before the reply, after which the next request may come
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(length or len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def honest(handler, question):
    """RIGHT if the student's text contains the words `is correct`."""
    word = "RIGHT" if "is correct" in question else "WRONG"
    send(handler, reply(f"Compared.\nVERDICT: {word}"))


def replies(text: str | None, reason: str = "stop", **fields: str):
    return lambda handler, question: send(handler, reply(text, reason, **fields))


def raw(content: bytes, status: int = 200):
    return lambda handler, question: send(handler, content, status)


def slow(handler, question):
    time.sleep(1.5)
    honest(handler, question)


def dripping(handler, question):
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def half(handler, question):
    whole = reply("VERDICT: RIGHT")
    send(handler, whole[: len(whole) // 2], length=len(whole))
    handler.close_connection = True


def disconnects(handler, question):
    handler.close_connection = True
    handler.connection.close()


MISBEHAVIOURS = {
    "slow": (slow, "timeout"),
    "dripping": (dripping, "timeout"),
    "500": (raw(b"oops", 500), "status"),
    "429": (raw(b"later", 429), "status"),
    "400": (raw(b"too long", 400), "status"),
    "html": (raw(b"<html>VERDICT: RIGHT</html>"), "garbage"),
    "another object": (raw(b'{"ok": true}'), "garbage"),
    "a list": (raw(b"[1]"), "garbage"),
    "deep": (raw(b"[" * 100_000), "garbage"),
    "no text": (raw(reply("").replace(b'""', b"null")), "garbage"),
    "huge": (raw(b" " * 2**21), "garbage"),
    "half a reply": (half, "connection"),
    "disconnects": (disconnects, "connection"),
    "cut short": (replies("VERDICT: RIGHT", "length"), "cut_short"),
    "cut short in thought": (replies("<think>VERDICT: RIGHT", "length"), "cut_short"),
    "only thought": (replies(None, reasoning_content="VERDICT: RIGHT"), "no_verdict"),
    "endless thought": (replies("<think>hm\nVERDICT: RIGHT"), "no_verdict"),
    "verdict in thought": (replies("<think>\nVERDICT: RIGHT\n</think>"), "no_verdict"),
    "empty": (replies(""), "no_verdict"),
    "no verdict": (replies("The answer is RIGHT."), "no_verdict"),
    "two verdicts": (replies("VERDICT: RIGHT\nVERDICT: WRONG"), "no_verdict"),
    "an echo": (replies("VERDICT: RIGHT\nsaid the student."), "no_verdict"),
    "more words": (replies("VERDICT: RIGHT, I think"), "no_verdict"),
    "lower case": (replies("verdict: right"), "no_verdict"),
}
