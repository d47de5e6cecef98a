"""`oreal serve`: replies, limits, errors, cancellation and the page."""

import re
import socket
import time
from concurrent import futures
from unittest import mock

import httpx
import make_tiny
import numpy as np
import pytest
from served import Served, events, serving

from oreal_jax.data import Chat
from oreal_jax.sampling import Request, Sampling
from oreal_jax.sampling import session as sessions
from oreal_jax.serve.scorer import Scorer
from oreal_jax.serve.server import listen

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served(start):
    with serving(start / "hf") as served:
        yield served


@pytest.fixture(params=[0.015])
def slow(served, monkeypatch, request):
    """Return the same server, slowed to one token per 15 ms or another time."""
    step = sessions.Session.step

    def step_slowly(session):
        time.sleep(request.param)
        return step(session)

    monkeypatch.setattr(sessions, "ROUND_SECONDS", 0)
    monkeypatch.setattr(sessions.Session, "step", step_slowly)
    yield served
    served.wait_until_idle(5)


def text(reply: dict, index: int = 0) -> str:
    choice = reply["choices"][index]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def expected(served: Served, prompt: list[int], samples: int, **options) -> list:
    """Completions by the engine, without the server."""
    seed = options.pop("seed", 0)
    engine = served.session.engine
    request = Request(prompt, Sampling(**options), key=0, seed=seed)
    # As many as the server has slots: the same compiled program.
    (group,) = engine.sample(served.session._runner.weights, [request], 32)
    return group[:samples]


# -- completions


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_replies_are_the_engines_completions(served, kind):
    chat = served.service.chat
    prompt = "max 3 4?"
    tokens = chat.encode(prompt) if kind == "chat" else list(prompt.encode())
    if kind == "complete":
        tokens = chat.encode_text(prompt, special=True)
    logprobs = {"logprobs": True if kind == "chat" else 0}
    options = {"temperature": 0.7, "top_p": 0.8, "seed": 5}
    fields = {"max_tokens": 20, "n": 3, **options, **logprobs}
    reply = getattr(served, kind)(prompt, **fields)
    completions = expected(served, tokens, 3, max_tokens=20, **options)
    for index, completion in enumerate(completions):
        choice = reply["choices"][index]
        assert choice["index"] == index
        assert text(reply, index) == chat.decode(completion.tokens)
        assert choice["finish_reason"] == completion.finish_reason
        if kind == "chat":
            log_probs = [each["logprob"] for each in choice["logprobs"]["content"]]
        else:
            log_probs = choice["logprobs"]["token_logprobs"]
            offsets = choice["logprobs"]["text_offset"]
            lengths = [len(token) for token in choice["logprobs"]["tokens"]]
            assert offsets == [sum(lengths[:i]) for i in range(len(lengths))]
        np.testing.assert_allclose(log_probs, completion.log_probs, atol=1e-4)
    count = sum(len(completion.tokens) for completion in completions)
    assert reply["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": count,
        "total_tokens": len(tokens) + count,
    }


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_joins_to_the_complete_reply(slow, path):
    """With stop strings, and characters of several tokens."""
    call = slow.chat if path == CHAT else slow.complete
    fields = {"max_tokens": 30, "n": 3, "seed": 2, "stop": ["q", "yz"]}
    whole = call(**fields)
    prompt = {"prompt": "max 3 4?"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "max 3 4?"}]}
    body = {"model": "tiny", **prompt, **fields, "stream": True}
    body["stream_options"] = {"include_usage": True}
    with slow.client.stream("POST", path, json=body) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        chunks = events(stream.iter_lines())
    assert len(chunks) > 20  # not all at the end
    usage = chunks.pop()
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    for index in range(3):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        if path == CHAT:
            assert ["role" in each["delta"] for each in parts].index(True) == 0
            assert sum("role" in each["delta"] for each in parts) == 1
            joined = "".join(each["delta"]["content"] for each in parts)
        else:
            joined = "".join(each["text"] for each in parts)
        assert joined == text(whole, index)
        reasons = [each["finish_reason"] for each in parts]
        assert reasons[:-1] == [None] * (len(parts) - 1)
        assert reasons[-1] == whole["choices"][index]["finish_reason"]


def test_a_completion_is_the_same_alone_and_among_31_others(served):
    fields = {"max_tokens": 100, "seed": 9, "logprobs": 0}
    (alone,) = served.complete("max 8 1?", **fields)["choices"]
    others = [
        {"prompt": "x" * (1 + n), "max_tokens": 20 + 3 * n, "temperature": n / 20}
        for n in range(31)
    ]
    with futures.ThreadPoolExecutor(32) as pool:
        replies = [pool.submit(served.complete, **other) for other in others[:16]]
        again = pool.submit(served.complete, "max 8 1?", **fields)
        replies += [pool.submit(served.complete, **other) for other in others[16:]]
        (same,) = again.result()["choices"]
        log_probs = [each["logprobs"].pop("token_logprobs") for each in (alone, same)]
        assert same == alone
        np.testing.assert_allclose(*log_probs, atol=1e-5)
        for other, answer in zip(others, replies, strict=True):
            reply = answer.result()
            assert reply["usage"]["prompt_tokens"] == len(other["prompt"])
            assert reply["usage"]["completion_tokens"] <= other["max_tokens"]


def test_a_seed_repeats_a_completion_and_none_does_not(served):
    once = text(served.chat(max_tokens=20, seed=3))
    assert text(served.chat(max_tokens=20, seed=3)) == once
    assert text(served.chat(max_tokens=20, seed=4)) != once
    assert text(served.chat(max_tokens=20)) != text(served.chat(max_tokens=20))


def test_every_sampling_parameter_reaches_the_engine(served):
    plain = {"max_tokens": 24, "seed": 1}
    base = text(served.chat(**plain))
    greedy = text(served.chat(**plain, temperature=0))
    for option in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}):
        assert text(served.chat(**plain, **option)) == greedy != base
    cold = plain | {"temperature": 0}
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert text(served.chat(**cold, **{name: 9.0})) != greedy
    biased = served.chat(**plain, logit_bias={str(ord("a")): 100})
    assert text(biased) == make_tiny.tokenizer().decode([ord("a")]) * 24
    assert len(served.chat(n=3, max_tokens=2)["choices"]) == 3


def test_a_stop_string_ends_the_text_before_it(served):
    letters = {str(token): 8 for token in range(32, 58)}
    fields = {"max_tokens": 100, "seed": 1, "logit_bias": letters}
    whole = served.complete(**fields)
    stop = text(whole)[40:42]
    reply = served.complete(**fields, stop=stop)
    end = text(whole).index(stop)
    assert text(reply) == text(whole)[:end]
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] < 60
    served.wait_until_idle(5)


def test_several_prompts_of_texts_or_tokens_are_completed_in_order(served):
    fields = {"max_tokens": 8, "seed": 6, "n": 2}
    prompts = ["max 3 4?", "max 9 9?"]
    together = served.complete(prompts, **fields)
    tokens = [served.service.chat.encode_text(p, special=True) for p in prompts]
    again = served.complete(tokens, **fields)
    texts = [choice["text"] for choice in together["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    for index, prompt in enumerate(prompts):
        alone = served.complete(prompt, **fields)
        pair = texts[2 * index : 2 * index + 2]
        assert pair == [choice["text"] for choice in alone["choices"]]


def test_a_conversation_goes_through_the_chat_template(served):
    """A system prompt of the server precedes messages without their own."""
    messages = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "max"},
                {"type": "text", "text": " 3 4?"},
            ],
        },
        {"role": "assistant", "content": "4", "name": "ignored"},
        {"role": "user", "content": "max 1 2?"},
    ]
    reply = served.post(CHAT, messages=messages, max_tokens=4).json()
    roles = ["s\nBe brief.", "u\nmax 3 4?", "a\n4", "u\nmax 1 2?"]
    prompt = "".join(f"<|im_start|>{x}<|im_end|>\n" for x in roles) + "<|im_start|>a\n"
    chat = served.service.chat
    assert reply["usage"]["prompt_tokens"] == len(
        chat.encode_text(prompt, special=False)
    )
    briefed = Chat(make_tiny.tokenizer(), "Be brief.")
    user = {"role": "user", "content": "?"}
    system = {"role": "system", "content": "Be brief."}
    assert briefed.encode_messages([user]) == chat.encode_messages([system, user])
    assert briefed.encode_messages([system, user]) == chat.encode_messages(
        [system, user]
    )


# -- errors


@pytest.mark.parametrize(
    ("path", "fields", "status", "param", "message"),
    [
        (CHAT, {}, 400, "messages", "Field required"),
        (CHAT, {"messages": []}, 400, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"role": "x"}]}, 400, "messages.0.role", "'user'"),
        (COMPLETIONS, {"model": "gpt-4"}, 404, "model", "only has the model 'tiny'"),
        (COMPLETIONS, {"model": 4}, 400, "model", "valid string"),
        (COMPLETIONS, {"prompt": []}, 400, "prompt", "prompt of 0 tokens"),
        (COMPLETIONS, {"prompt": [1, "x"]}, 400, "prompt", "a list of token ids"),
        (COMPLETIONS, {"prompt": [264]}, 400, "prompt", "no token 264"),
        (COMPLETIONS, {"max_tokens": 161}, 400, "max_tokens", "length is 160"),
        (COMPLETIONS, {"max_tokens": 0}, 400, "max_tokens", "at least 1"),
        (COMPLETIONS, {"max_tokens": "7"}, 400, "max_tokens", "valid integer"),
        (COMPLETIONS, {"max_tokens": True}, 400, "max_tokens", "valid integer"),
        (COMPLETIONS, {"temperature": 2.5}, 400, "temperature", "or equal to 2"),
        (COMPLETIONS, {"top_p": 0}, 400, "top_p", "above 0"),
        (COMPLETIONS, {"top_k": -1}, 400, "top_k", "at least 0"),
        (COMPLETIONS, {"n": 0}, 400, "n", "greater than or equal to 1"),
        (COMPLETIONS, {"n": 97}, 400, "n", "97 completions; this server accepts 96"),
        (COMPLETIONS, {"stop": ["a"] * 17}, 400, "stop", "at most 16"),
        (COMPLETIONS, {"stop": ""}, 400, "stop", "1 to 256 characters"),
        (COMPLETIONS, {"logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        (COMPLETIONS, {"logit_bias": {"264": 1}}, 400, "logit_bias", "no token 264"),
        (COMPLETIONS, {"logprobs": 5}, 400, "logprobs", "logprobs=0"),
        (COMPLETIONS, {"echo": True}, 400, "echo", "not supported"),
        (CHAT, {"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        (COMPLETIONS, {"nonsense": 1}, 400, "nonsense", "Unrecognized request"),
    ],
)  # fmt: skip
def test_invalid_requests_are_rejected(served, path, fields, status, param, message):
    code, error = served.error(path, **fields)
    assert code == status
    assert error["type"] == "invalid_request_error" and error["param"] == param
    assert message in error["message"]


def test_fields_without_effect_are_accepted(served):
    served.complete(user="me", best_of=1, echo=False, suffix=None, n=None, seed=None)
    fields = {
        "store": True,
        "metadata": {"a": "b"},
        "response_format": {"type": "text"},
    }
    served.chat(tools=[], top_logprobs=None, max_completion_tokens=3, **fields)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"[]", 400),
        (b'{"model": "tiny", "prompt": "\xff"}', 400),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400),
        (b'{"model": "tiny", "prompt": "?", "top_p": NaN}', 400),
        (b"[" * 100_000, 400),
        (b" " * (1 << 20) + b"{}", 413),
    ],
)
def test_a_body_that_is_no_valid_json_is_rejected(served, content, status):
    headers = {"content-type": "application/json"}
    reply = served.client.post(COMPLETIONS, content=content, headers=headers)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_replies_do_not_wait_for_the_clients_receipt_of_a_packet():
    """Which takes 40 ms, if the system joins small packets."""
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_other_paths_methods_and_types_are_rejected(served):
    for reply, status in [
        (served.client.get("/v1/nothing"), 404),
        (served.client.get("/v1/models/nothing"), 404),
        (served.client.get(COMPLETIONS), 405),
        (served.client.post(COMPLETIONS, content=b"{}"), 415),
    ]:
        assert reply.status_code == status
        assert reply.json()["error"]["message"]
    assert served.client.get("/v1/models/tiny").json()["max_model_len"] == 160


def test_more_completions_than_can_wait_get_429(slow):
    with futures.ThreadPoolExecutor(2) as pool:
        fields = {"prompt": "?", "n": 96, "max_tokens": 10}
        first = pool.submit(slow.complete, **fields)
        while not slow.metric("oreal_waiting"):
            time.sleep(0.01)
        code, error = slow.error(prompt="?")
        assert code == 429 and error["type"] == "rate_limit_error"
        assert len(first.result()["choices"]) == 96
    slow.complete(max_tokens=1)


def test_keys_are_checked(served, monkeypatch):
    monkeypatch.setattr(served.service, "keys", ["one", "two"])
    for key, status in [(None, 401), ("three", 401), ("tw\u00f6", 401), ("two", 200)]:
        headers = {"authorization": f"Bearer {key}".encode()} if key else {}
        reply = served.client.get("/v1/models", headers=headers)
        assert reply.status_code == status
    assert served.error()[1]["code"] == "invalid_api_key"
    assert served.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST.", 200),
        ("[::1]:8000", 200),
        ("example.com", 403),
        ("localhost.example.com:8000", 403),
    ],
)
def test_a_local_server_answers_to_local_names_only(served, monkeypatch, host, status):
    monkeypatch.setattr(served.service, "hosts", ("localhost", "::1"))
    reply = served.client.get("/v1/models", headers={"host": host})
    assert reply.status_code == status
    if status == 403:
        message = reply.json()["error"]["message"]
        assert message.startswith(f"Host '{host}': ") and "OREAL_API_KEYS" in message


# -- clients that leave, and the page


@pytest.mark.parametrize("slow", [0.1], indirect=True)
@pytest.mark.parametrize("streamed", [True, False])
def test_slots_are_free_soon_after_the_client_leaves(slow, streamed):
    """Within a second on an idle machine: test_serve_load.py."""
    body = {"model": "tiny", "prompt": "?", "n": 40, "max_tokens": 150}
    body["logit_bias"] = {"256": -100}  # no stop token: 15 seconds
    with httpx.Client(base_url=slow.url) as client:
        if streamed:
            body["stream"] = True
            with client.stream("POST", COMPLETIONS, json=body) as stream:
                lines = stream.iter_lines()  # garbage collection would disconnect
                assert "choices" in next(lines)
                assert slow.metric("oreal_slots_used") == 32
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(COMPLETIONS, json=body, timeout=0.3)
    slow.wait_until_idle(5)


def test_the_page_shows_model_text_as_text_only(served):
    page = served.client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "<script>" not in page.text and "onclick" not in page.text
    script = served.client.get("/page.js").text
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write", script)
    for name in re.findall(r'element\("(\w+)"\)', script):
        assert f'id="{name}"' in page.text
    assert served.client.get("/page.css").status_code == 200


def test_answers_that_differ_in_spelling_are_one_group(served):
    texts = ["So \\boxed{0.5}", "It is \\boxed{\\frac12}.", "no idea", "\\boxed{7}"]
    texts.append("2 * 3.5 = 7.")
    answers = served.post("/answers", texts=texts).json()["answers"]
    half, same, none, seven, product = answers
    assert half["answer"] == "0.5" and half["group"] == same["group"]
    assert none is None and seven["answer"] == "7"
    assert product["group"] == seven["group"]
    assert served.error("/answers", texts=[1])[0] == 400


def test_scores_are_those_of_the_texts_tokens(served, monkeypatch):
    messages = [{"role": "user", "content": "?"}]
    body = {"messages": messages, "text": "It is \u4e16."}
    reply = served.client.post("/scores", json=body)
    assert reply.status_code == 404  # no token reward model
    scorer = mock.MagicMock(spec=Scorer)
    scorer.credits = lambda prompt, completion: [0.5] * len(completion)
    monkeypatch.setattr(served.service, "scorer", scorer)
    tokens = served.client.post("/scores", json=body).json()["tokens"]
    assert "".join(token["text"] for token in tokens) == body["text"]
    assert [token["score"] for token in tokens] == [0.5] * 10
    for invalid in ({"text": 1}, {"text": "x" * 200}, {"messages": []}):
        reply = served.client.post("/scores", json=body | invalid)
        assert reply.status_code == 400
    assert served.client.get("/v1/models").json()["data"][0]["has_token_scores"]
