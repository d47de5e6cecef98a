"""Headless Chromium, driven by the DevTools protocol over a pair of pipes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-dev-shm-usage"),
    *("--window-size=1400,1000", "--remote-debugging-pipe"),
)


class Chromium:
    """A browser with one page; `errors` are those of its console."""

    def __init__(self):
        assert PROGRAM
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [PROGRAM, *OPTIONS, f"--user-data-dir={self.profile.name}"]
        # It reads from descriptor 3 and writes to 4.
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                f"exec {shlex.join(command)} 3<&{theirs_in} 4>&{theirs_out}",
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.errors: list[str] = []
        self._buffer, self._number, self._session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Runtime", "Log", "Page", "Network"):
            self.call(f"{domain}.enable")
        self.requests: list[str] = []

    def call(self, method: str, **params) -> dict:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | self._session).encode() + b"\0")
        while True:
            reply = self._read()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return reply["result"]
            self._record(reply)

    def _read(self) -> dict:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 2**20)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _record(self, event: dict) -> None:
        kind, params = event.get("method"), event.get("params", {})
        if kind == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        is_error = params.get("type") == "error" or (
            params.get("entry", {}).get("level") == "error"
        )
        if kind == "Runtime.exceptionThrown" or is_error:
            self.errors.append(json.dumps(params))

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression, or of what it promises."""
        result = self.call(
            "Runtime.evaluate",
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, page: Path | str, condition: str) -> float:
        """Open a file or an address; return the seconds until `condition` holds."""
        start = time.perf_counter()
        url = page if isinstance(page, str) else page.absolute().as_uri()
        self.call("Page.navigate", url=url)
        return time.perf_counter() - start + self.wait(condition)

    def wait(self, condition: str) -> float:
        """Return the seconds until `condition` holds."""
        start = time.perf_counter()
        while not self.evaluate(condition):
            assert time.perf_counter() - start < 60, f"never: {condition}"
            time.sleep(0.02)
        return time.perf_counter() - start

    def screenshot(self, picture: Path) -> None:
        """Write what the window shows."""
        import base64

        data = self.call("Page.captureScreenshot")["data"]
        picture.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """End the browser with all of its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self.profile.cleanup()
