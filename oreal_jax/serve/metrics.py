"""Metrics of the server, in Prometheus' text format."""

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from oreal_jax.serve.worker import Worker

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of requests and tokens, and the load of a worker."""

    def __init__(self, worker: Worker):
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "oreal_requests",
            "Replies, by path and status; 499: the client disconnected.",
            ["path", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "oreal_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self.completion_tokens = Counter(
            "oreal_completion_tokens", "Generated tokens.", registry=registry
        )
        self.first_token = Histogram(
            "oreal_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=SECONDS,
            registry=registry,
        )
        self.seconds = Histogram(
            "oreal_request_seconds",
            "Seconds from a request to the end of its reply.",
            buckets=SECONDS,
            registry=registry,
        )
        for name, text, value in [
            ("slots", "Decoding slots.", lambda: worker.session.slots),
            ("slots_used", "Slots in use.", lambda: worker.running),
            (
                "waiting",
                "Completions waiting for a slot.",
                lambda: max(0, worker.pending - worker.running),
            ),
        ]:
            gauge = Gauge(f"oreal_{name}", text, registry=registry)
            gauge.set_function(value)

    def text(self) -> bytes:
        """Return all metrics."""
        return prometheus_client.generate_latest(self._registry)
