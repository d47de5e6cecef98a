"""An LLM judge on OpenAI-compatible hosts, for answers that the rule does not accept.

It sees the final answer only and must end its reply with one line, `VERDICT: RIGHT`,
`WRONG` or `UNSURE`. Anything else (no reply, an error, half a reply, two verdicts) is
retried and then undecided: a host that misbehaves makes no answer correct or incorrect.
A host that fails repeatedly is taken out of use until it passes a health check. Without
any host the judge waits for one, or keeps the rule's verdicts, as configured.
"""

import collections
import contextlib
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Literal

import httpx

from oreal_jax.errors import InputError
from oreal_jax.verify import extract
from oreal_jax.verify.judge_host import TOKENS, Host, RequestFailed, is_address
from oreal_jax.verify.judge_prompt import find_verdict, make_messages, reason
from oreal_jax.verify.verdict import Candidate, Verdict

MAX_FAILURES = 3  # in a row, then a host is taken out
CHECK_SECONDS = 5.0  # of a health check, and between two
KEY = "OREAL_JUDGE_KEY"  # the environment variable of the API key
COUNTS = (
    "asked", "correct", "incorrect", "undecided", "left_to_rule", "disagrees_with_rule",
    "retries", "failed_timeout", "failed_connection", "failed_status",
    "failed_garbage", "failed_cut_short", "failed_no_verdict", "failed_closed",
    "taken_out", "taken_back", *TOKENS, "latency/max", "latency/sum", "latency/count",
)  # fmt: skip


class NoHosts(Exception):
    """No host replies, and the rule's verdict is to stand."""


class Judge:
    """Distributes requests over hosts; safe from any thread."""

    def __init__(
        self,
        hosts: Sequence[str],
        model: str,
        *,
        concurrency: int = 16,
        max_tokens: int = 1024,
        timeout: float = 60.0,
        tries: int = 3,
        backoff: float = 1.0,
        patience: float = 30.0,
        lost: Literal["pause", "rule"] = "pause",
        log: Callable[[str], None] = lambda text: None,
    ):
        """Check the hosts' addresses and start `concurrency` threads for each.

        A reply has up to `max_tokens` tokens, thinking included. A request may take
        `timeout` seconds and is tried `tries` times, `backoff` seconds apart at first,
        then twice as long each time. When no host has been in use for `patience`
        seconds, "pause" waits for one and "rule" keeps the rule's verdicts; either is
        logged.

        Raises:
            InputError: a host is not a web address, or no model is named.
        """
        if not model:
            raise InputError(f"judge: {', '.join(hosts)}: no model is named")
        for url in hosts:
            if not is_address(url):
                raise InputError(
                    f"judge: {url!r} is not an address like http://host/v1"
                )
        settings = {"temperature": 0, "max_tokens": max_tokens}
        self._hosts = [Host(url.rstrip("/"), settings) for url in hosts]
        self._model, self._concurrency, self._timeout = model, concurrency, timeout
        self._tries, self._backoff, self._patience = tries, backoff, patience
        self._lost, self._log, self._outage_logged = lost, log, False
        self._max_tokens, self._cut_short_logged = max_tokens, False
        self._state = threading.Condition()
        self._counts: collections.Counter[str] = collections.Counter()
        self._closed = threading.Event()
        key = os.environ.get(KEY)
        self._client = httpx.Client(
            timeout=httpx.Timeout(timeout),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        # Daemons: a pending reply must delay neither Ctrl-C nor the end.
        work = [self._serve] * len(hosts) * concurrency + [self._check_hosts]
        self._threads = [threading.Thread(target=w, daemon=True) for w in work]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """End the judge; pending verdicts become undecided."""
        self._closed.set()
        for _ in self._threads:
            self._queue.put(None)
        with self._state:
            self._state.notify_all()
        self._client.close()

    def submit(self, candidate: Candidate, by_rule: Verdict) -> Future[Verdict]:
        """Return a future verdict, the rule's own if the judge is not needed."""
        future: Future[Verdict] = Future()
        if needs_judge(candidate, by_rule):
            future.set_running_or_notify_cancel()
            self._queue.put((candidate, by_rule, future))
        else:
            future.set_result(by_rule)
        return future

    def verdicts(
        self, candidates: Sequence[Candidate], by_rule: Sequence[Verdict]
    ) -> list[Verdict]:
        """Return a verdict for each candidate, in order, given the rule's verdicts."""
        futures = list(map(self.submit, candidates, by_rule))
        return [future.result() for future in futures]

    def take_counts(self) -> dict[str, float]:
        """Return and reset the counts since the last call; `hosts_up` is current."""
        with self._state:
            counts, self._counts = self._counts, collections.Counter()
            counts["hosts_up"] = sum(not host.out for host in self._hosts)
        return {name: float(number) for name, number in counts.items()}

    def _serve(self) -> None:
        """Judge one candidate after another until the judge is closed."""
        while task := self._queue.get():
            candidate, by_rule, future = task
            try:
                future.set_result(self._judge(candidate, by_rule))
            except Exception as error:  # its waiter must receive it
                future.set_exception(error)

    def _judge(self, candidate: Candidate, by_rule: Verdict) -> Verdict:
        self._count(asked=1)
        try:
            verdict = self._retry(make_messages(candidate))
        except NoHosts:
            self._count(left_to_rule=1)
            return by_rule
        self._count(**{verdict.outcome: 1})
        if verdict.outcome == "correct" and by_rule.outcome == "incorrect":
            self._count(disagrees_with_rule=1)
        return verdict

    def _retry(self, messages: list[dict[str, str]]) -> Verdict:
        """Request a verdict until one arrives or no try is left."""
        kind = "closed"
        for attempt in range(self._tries):
            if attempt:
                self._count(retries=1)
            try:
                with self._reserve_host() as host:
                    reply = self._request(host, messages)
                outcome = find_verdict(reply) or "undecided"
                return Verdict(outcome, reason(reply), "judge")
            except RequestFailed as failure:
                kind = failure.kind
                if kind == "cut_short":
                    self._log_cut_short()
                self._count(**{f"failed_{kind}": 1}, **failure.tokens)
                wait = self._backoff * 2**attempt * random.uniform(0.5, 1.0)
                if attempt + 1 < self._tries:
                    self._closed.wait(max(wait, failure.retry_after))
        return Verdict("undecided", f"the judge gave no verdict: {kind}", "judge")

    @contextlib.contextmanager
    def _reserve_host(self) -> Iterator[Host]:
        """Wait for a host with capacity, and yield the one with fewest requests.

        Raises:
            RequestFailed: the judge is closed.
            NoHosts: no host is in use, and the rule is to decide.
        """
        with self._state:
            since = time.monotonic()
            while not (free := self._free_hosts()):
                if self._closed.is_set():
                    raise RequestFailed("closed", host=False)
                if not all(host.out for host in self._hosts):
                    since = time.monotonic()
                elif time.monotonic() - since > self._patience:
                    self._log_outage()
                    if self._lost == "rule":
                        raise NoHosts
                self._state.wait(0.1)
            host = min(free, key=lambda host: host.requests)
            host.requests += 1
        try:
            yield host
            with self._state:
                host.failures = 0
        except RequestFailed as failure:
            if failure.host:
                self._record_failure(host, failure)
            raise
        finally:
            with self._state:
                host.requests -= 1
                self._state.notify_all()

    def _free_hosts(self) -> list[Host]:
        free = lambda host: not host.out and host.requests < self._concurrency
        return list(filter(free, self._hosts))

    def _record_failure(self, host: Host, failure: RequestFailed) -> None:
        with self._state:
            host.failures += 1
            if host.failures >= MAX_FAILURES and not host.out:
                host.out = True
                self._count(taken_out=1)
                if not host.reported:
                    host.reported = True
                    self._log(f"judge: {host.url} fails: {failure}")

    def _log_outage(self) -> None:
        if not self._outage_logged:
            self._outage_logged = True
            urls = ", ".join(host.url for host in self._hosts)
            consequence = "continuing without the judge"
            if self._lost == "pause":
                consequence = "paused until one is back"
            self._log(f"judge: no host replies ({urls}); {consequence}")

    def _log_cut_short(self) -> None:
        if not self._cut_short_logged:
            self._cut_short_logged = True
            self._log(
                f"judge: a reply was cut short at {self._max_tokens} tokens; a model "
                "that thinks needs more: raise judge_max_tokens"
            )

    def _request(self, host: Host, messages: list[dict[str, str]]) -> str:
        """Return one reply of a host that has a verdict.

        Raises:
            RequestFailed: there is none.
        """
        start = time.monotonic()
        body = {"model": self._model, "messages": messages}
        reply, tokens = host.request(
            self._client, body, self._timeout, self._closed.is_set
        )
        seconds = time.monotonic() - start
        with self._state:
            self._count(**tokens, **{"latency/sum": seconds, "latency/count": 1})
            longest = max(self._counts["latency/max"], seconds)
            self._counts["latency/max"] = longest  # pyright: ignore
        return reply

    def _check_hosts(self) -> None:
        """Bring hosts back into use that list their models again."""
        pause = min(CHECK_SECONDS, max(0.05, self._backoff))
        with httpx.Client(timeout=CHECK_SECONDS, trust_env=False) as client:
            client.headers.update(self._client.headers)
            while not self._closed.wait(pause):
                for host in self._hosts:
                    if not host.out or not host.is_healthy(client):
                        continue
                    with self._state:
                        # One more failure takes it out again.
                        host.out, host.failures = False, MAX_FAILURES - 1
                        self._count(taken_back=1)
                        if self._outage_logged:
                            self._log(f"judge: {host.url} is back")
                        self._outage_logged = False
                        self._state.notify_all()

    def _count(self, **amounts: int | float) -> None:
        with self._state:
            self._counts.update(amounts)  # pyright: ignore[reportArgumentType]


def judge_metrics(counts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics of a run, from the counts of the judges of its processes."""
    total: dict[str, float] = dict.fromkeys(COUNTS, 0.0)
    for name in {name for each in counts for name in each}:
        combine = {"latency/max": max, "hosts_up": min}.get(name, sum)
        total[name] = combine([each.get(name, 0.0) for each in counts])
    seconds, replies = total.pop("latency/sum"), total.pop("latency/count")
    total["latency/mean"] = seconds / replies if replies else 0.0
    return {f"judge/{name}": number for name, number in total.items()}


def needs_judge(candidate: Candidate, by_rule: Verdict) -> bool:
    """Return whether there may be an answer that the rule does not call correct."""
    # What another verifier decides, or its failure, is final.
    if by_rule.outcome == "correct" or by_rule.by not in ("rule", "timeout"):
        return False
    if not extract.has_answer(candidate.gold_answer):
        return False
    answer = extract.answer(candidate.text)
    return not isinstance(answer, Verdict) or answer.outcome == "undecided"
