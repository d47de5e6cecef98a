"""`oreal serve`: text of streams, the process, its options and its scorer."""

import dataclasses
import socket
import sys
from concurrent import futures
from pathlib import Path
from unittest import mock

import httpx
import make_tiny
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import serving
from tiny_runs import oreal_in_process

from oreal_jax.data import Chat
from oreal_jax.errors import Failure
from oreal_jax.sampling import session as sessions
from oreal_jax.serve.app import Service
from oreal_jax.serve.scorer import Scorer
from oreal_jax.serve.server import Server, listen
from oreal_jax.serve.worker import Worker


@pytest.fixture(scope="module")
def served(start):
    with serving(start / "hf") as served:
        yield served


# -- text


def reference(chat, tokens: list[int], stops: list[str]) -> tuple[str, int]:
    """Decode from the start for every number of tokens."""
    for count in range(1, len(tokens) + 1):
        text = chat.decode_all(tokens[:count])
        if ends := [text.find(stop) for stop in stops if stop in text]:
            return text[: min(ends)], count
    return chat.decode_all(tokens), len(tokens)


@given(
    st.text("ab\u00e9\u4e16\U0001f600 ", max_size=20),
    st.lists(st.sampled_from(["ab", "ba", "aab", "\u00e9a", " "]), max_size=2),
    st.lists(st.integers(1, 5), min_size=80, max_size=80),
)
@settings(max_examples=50)
def test_text_does_not_depend_on_how_tokens_arrive(text, stops, sizes):
    from oreal_jax.serve.text import TextStream

    chat = Chat(make_tiny.tokenizer())
    tokens = chat.encode_text(text, special=False)
    stream, parts, used, start = TextStream(chat.decode_all, stops), "", 0, 0
    for size in sizes:
        piece = tokens[start : start + size]
        start += size
        part, count = stream.add(piece, last=start >= len(tokens))
        parts, used = parts + part, used + count
        assert not any(stop in parts for stop in stops)
        if stream.stopped or start >= len(tokens):
            break
    assert (parts, used) == reference(chat, tokens, stops)


# -- the process


def test_a_failed_engine_ends_requests_and_the_server(served):
    parts = {"slots": 4, "length": 160, "biases": 1, "running": 0, "is_busy": False}
    session = mock.MagicMock(spec=sessions.Session, **parts)
    session.engine = served.session.engine
    session.add = lambda *_: setattr(session, "is_busy", True) or 0
    session.step = mock.Mock(side_effect=RuntimeError("broken"))
    service = Service("tiny", served.service.chat, Worker(session, 0))
    with listen("127.0.0.1", 0) as listener, futures.ThreadPoolExecutor() as pool:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        body = {"model": "tiny", "prompt": "?"}
        reply = pool.submit(httpx.post, url, json=body, timeout=30)
        with pytest.raises(Failure, match="the engine failed: RuntimeError: broken"):
            Server(service, lambda text: None).run_on(listener)
        assert reply.result().json()["error"]["message"] == "the engine has failed"


def test_a_port_in_use_is_an_error(start):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = oreal_in_process("serve", "--model", start / "hf", "--port", port)
    assert result.code == 2
    address = f"127.0.0.1:{port}: address already in use"
    message = f"cannot listen on {address}; choose another --port or --host"
    assert result.errors == f"oreal: {message}\n"


def test_without_the_extra_an_error_names_it(monkeypatch):
    import oreal_jax.serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "oreal_jax.serve.server", raising=False)
    monkeypatch.delattr(oreal_jax.serve, "server", raising=False)
    result = oreal_in_process("serve", "--model", "m")
    message = "oreal serve needs the extra `serve`: no module uvicorn"
    assert (result.code, result.errors) == (
        2,
        f"oreal: {message}; pip install 'oreal-jax[serve]'\n",
    )


@pytest.fixture
def started(monkeypatch) -> list:
    """Return what servers are started with; none serves."""
    from oreal_jax.serve import server

    started = []
    monkeypatch.setattr(server.Server, "run_on", lambda *given: started.append(given))
    monkeypatch.setattr(server, "warm_up", lambda *given: None)
    return started


def test_options_of_the_verb_reach_the_server(start, started, monkeypatch):
    monkeypatch.setenv("OREAL_API_KEYS", "one, two")
    options = {"--rows": 4, "--length": 99, "--queue": 3, "--name": "m", "--port": 0}
    words = [word for option in options.items() for word in option]
    result = oreal_in_process("serve", "--model", start / "hf", *words)
    assert result.code == 0, result.errors
    ((server, listener),) = started
    service = server.service
    assert service.name == "m" and service.keys == ["one", "two"]
    assert not service.hosts
    assert service.worker.capacity == 4 + 3 and service.worker.session.length == 99
    assert oreal_in_process("serve", "--model", "m", "--length", 1).code == 2


@pytest.mark.parametrize(("address", "is_local"), [("localhost", 1), ("0.0.0.0", 0)])
def test_only_a_local_server_without_keys_checks_its_name(
    start, started, monkeypatch, address, is_local
):
    monkeypatch.delenv("OREAL_API_KEYS", raising=False)
    words = ("--model", start / "hf", "--port", 0, "--host", address, "--rows", 8)
    assert oreal_in_process("serve", *words).code == 0
    ((server, _),) = started
    assert ("localhost" in server.service.hosts) == is_local


def test_token_scores_need_a_run_with_a_token_reward_model(start, tiny):
    for model in (start / "hf", tiny / "sft"):
        words = ("serve", "--model", model, "--token-scores", "--port", 0, "--rows", 8)
        result = oreal_in_process(*words)
        assert result.code == 2
        assert "not a run with a token reward model" in result.errors


def test_the_scorer_applies_the_runs_token_reward_model(whole):
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint as ocp

    from oreal_jax import model
    from oreal_jax.checkpoints.run import newest_step
    from oreal_jax.loading import load_model

    policy = load_model(whole, devices=jax.devices()[:1])
    prompt, completion = policy.chat.encode("max 3 4?"), [52, 256]
    credits = Scorer(policy).credits(prompt, completion)
    path = whole / "checkpoints" / str(newest_step(whole)) / "trainer"
    with ocp.PyTreeCheckpointer() as checkpointer:
        params = checkpointer.restore(path.absolute())["token_reward"][0]
    config = dataclasses.replace(policy.config, head="score")
    tokens = jnp.array([prompt + completion])
    positions = jnp.arange(tokens.shape[1])[None]
    states = model.hidden(config, params, tokens, positions, jnp.ones_like(tokens))
    scores = states[0, len(prompt) - 1 : -1] @ params["score"]
    np.testing.assert_allclose(credits, jax.nn.sigmoid(scores), atol=1e-5)
    assert max(credits) != min(credits)


def test_the_page_is_package_data():
    import oreal_jax.serve.app

    names = {path.name for path in oreal_jax.serve.app.PAGE.iterdir()}
    assert names == {"index.html", "page.js", "page.css"}
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    assert '"oreal_jax.serve" = ["page/*"]' in pyproject.read_text()
