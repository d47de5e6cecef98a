"""A small Hugging Face hub on loopback, for downloads by its client."""

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Files = dict[str, bytes]


class Hub:
    """`models` and `datasets` by name; requests for a file in `broken` fail."""

    def __init__(self):
        self.models: dict[str, Files] = {}
        self.datasets: dict[str, Files] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        self.downloads: list[str] = []
        self.url = ""


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format, *args):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.partition("?")[0]
            api = re.match(r"/api/(models|datasets)/(\w+/[\w.-]+)(/.*)?$", path)
            file = re.match(r"/(datasets/)?(\w+/[\w.-]+)/resolve/(\w+)/(.*)$", path)
            if api:
                self.describe(getattr(hub, api[1]).get(api[2]), api[2], api[3] or "")
            elif file:
                files = hub.datasets if file[1] else hub.models
                self.send_file(files[file[2]][file[4]], file[4])
            else:
                self.reply(404, {}, b"")

        def describe(self, files: Files | None, name: str, rest: str):
            """Reply with the files of a repository."""
            if files is None:
                self.reply(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
            elif name in hub.gated:
                self.reply(403, {"X-Error-Code": "GatedRepo"}, b"{}")
            elif rest.startswith("/tree/"):
                blob = lambda text: hashlib.sha1(text).hexdigest()
                self.send_json(
                    [
                        {"type": "file", "path": path, "size": len(text)}
                        | {"oid": blob(text)}
                        for path, text in files.items()
                    ]
                )
            elif rest in ("", "/revision/main", f"/revision/{COMMIT}"):
                siblings = [{"rfilename": path} for path in files]
                self.send_json({"id": name, "sha": COMMIT, "siblings": siblings})
            else:
                self.reply(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")

        def send_json(self, value):
            kind = {"Content-Type": "application/json"}
            self.reply(200, kind, json.dumps(value).encode())

        def send_file(self, text: bytes, path: str):
            if path in hub.broken:
                return self.reply(400, {}, b"")  # which is not tried again
            if self.command == "GET":
                hub.downloads.append(path)
            tag = f'"{hashlib.sha1(text).hexdigest()}"'
            self.reply(200, {"ETag": tag, "X-Repo-Commit": COMMIT}, text)

        def reply(self, status: int, headers: dict[str, str], body: bytes):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
