"""`oreal serve` under load, with junk, with signals, and with others' evaluators."""

import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from served import Served, events, serving
from tiny_runs import check_ok, oreal, oreal_in_process

from oreal_jax.sampling import Request, Sampling

pytestmark = pytest.mark.slow
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served(start):
    with serving(start / "hf", length=256, queue=512) as served:
        yield served


def mixed_bodies(count: int, max_tokens: int) -> list[dict[str, Any]]:
    """Return requests that differ in all parameters."""
    generator = random.Random(0)
    bodies = []
    for number in range(count):
        body: dict[str, Any] = {
            "prompt": f"max {number % 10} {generator.randrange(10**6)}?",
            "seed": number,
            "max_tokens": generator.randint(max_tokens // 2, max_tokens),
            "temperature": generator.choice([0.0, 0.5, 1.0, 1.3]),
            "logit_bias": {"256": -100},  # no stop token
        }
        options = {"top_p": 0.9, "top_k": 20, "min_p": 0.05, "presence_penalty": 0.5}
        options |= {"frequency_penalty": 0.3, "repetition_penalty": 1.2}
        names = generator.sample(sorted(options), generator.randint(0, 3))
        bodies.append(body | {name: options[name] for name in names})
    return bodies


def direct(served: Served, bodies: list[dict]) -> tuple[list[str], float]:
    """Complete the same requests by the engine; also returns tokens per second."""
    chat, engine = served.service.chat, served.session.engine
    requests = []
    for body in bodies:
        options = {k: v for k, v in body.items() if k not in ("prompt", "seed")}
        options["logit_bias"] = tuple(
            (int(token), float(bias)) for token, bias in body["logit_bias"].items()
        )
        prompt = chat.encode_text(body["prompt"], special=True)
        requests.append(Request(prompt, Sampling(**options), 0, seed=body["seed"]))
    weights = served.session._runner.weights
    engine.sample(weights, requests[:40], 1)  # compiles
    start = time.perf_counter()
    groups = engine.sample(weights, requests, 1)
    seconds = time.perf_counter() - start
    texts = [chat.decode(completion.tokens) for (completion,) in groups]
    return texts, sum(len(c.tokens) for (c,) in groups) / seconds


def through_server(served: Served, bodies: list[dict], streams: bool) -> list[str]:
    """Complete the requests by 32 clients, every second one as a stream."""

    def client(first: int) -> dict[int, str]:
        texts = {}
        with httpx.Client(base_url=served.url, timeout=300) as client:
            for number in range(first, len(bodies), 32):
                body = bodies[number] | {"model": "tiny"}
                if number % 2 and streams:
                    body["stream"] = True
                    with client.stream("POST", COMPLETIONS, json=body) as stream:
                        chunks = events(stream.iter_lines())
                    choices = [chunk["choices"][0] for chunk in chunks]
                else:
                    reply = client.post(COMPLETIONS, json=body)
                    assert reply.status_code == 200, reply.text
                    choices = reply.json()["choices"]
                texts[number] = "".join(choice["text"] for choice in choices)
        return texts

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        texts = {k: v for each in pool.map(client, range(32)) for k, v in each.items()}
    return [texts[number] for number in range(len(bodies))]


def test_256_requests_of_32_clients_are_neither_lost_nor_mixed_up(served):
    bodies = mixed_bodies(256, max_tokens=60)
    expected, _ = direct(served, bodies)
    assert through_server(served, bodies, streams=True) == expected
    assert len(set(expected)) > 200
    served.wait_until_idle(1)


def test_killed_clients_free_their_slots_within_a_second(served, monkeypatch):
    from oreal_jax.sampling import session

    monkeypatch.setattr(session, "ROUND_SECONDS", 0)
    step = session.Session.step
    pause = lambda s: time.sleep(0.02) or step(s)
    monkeypatch.setattr(session.Session, "step", pause)
    script = f"""
        import httpx, sys
        body = {{"model": "tiny", "prompt": "?", "max_tokens": 250, "n": 8}}
        body |= {{"logit_bias": {{"256": -100}}, "stream": sys.argv[1] == "1"}}
        url = "{served.url}{COMPLETIONS}"
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                print("line", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    clients = [
        subprocess.Popen([*command, str(n % 2)], stdout=subprocess.PIPE)
        for n in range(5)
    ]
    deadline = time.monotonic() + 20
    while not (served.metric("oreal_slots_used") == 32 and served.metric("oreal_wait")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for client in clients:
        client.kill()
    served.wait_until_idle(1)
    for client in clients:
        client.communicate()


# -- junk

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 3, 1e308, -1e308, 1e-320, 0.5, 10**15, 2**63, 2**64),
    *(10**400, "", "x", "\0", "\u202e\U0001f600", "9" * 400, "NaN", "x" * 5000),
    *([], {}, [[]], [None], {"a": {"b": [{}]}}, [1, "x", None], [0, 5, 263], [264]),
    *({"7": 3}, {"7": "x"}, {"-1": 1}, {"999999999": 1}, {"1": 1e30, "2": -1e30}),
    *([{"role": "user", "content": "?"}], [{"role": "user"}], [{"role": {}}]),
    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
]
NAMES = ["model", "messages", "prompt", "max_tokens", "max_completion_tokens", "n"]
NAMES += ["seed", "stop", "stream", "stream_options", "temperature", "top_p", "top_k"]
NAMES += ["min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
NAMES += ["logit_bias", "logprobs", "top_logprobs", "echo", "tools", "user", "suffix"]
NAMES += ["best_of", "response_format", "nonsense", "__class__", "texts"]


def junk(generator: random.Random) -> tuple[str, bytes]:
    """Return a path and a body; few are valid."""
    path = generator.choice([CHAT, COMPLETIONS, "/answers"])
    body: dict[Any, Any] = {"model": "tiny", "max_tokens": 4}
    body["prompt" if path == COMPLETIONS else "messages"] = (
        "?" if path == COMPLETIONS else [{"role": "user", "content": "?"}]
    )
    for _ in range(generator.choice([1, 1, 2, 4])):
        value = generator.choice(VALUES)
        for _ in range(generator.choice([0, 0, 0, 1, 3, 200])):
            value = generator.choice([[value], {generator.choice(NAMES): value}])
        body[generator.choice(NAMES)] = value
    if generator.random() < 0.1:
        body.pop(generator.choice(sorted(body)))
    data = json.dumps(body).encode()
    data = data.replace(b'"NaN"', generator.choice([b"NaN", b"Infinity", b'"NaN"']))
    if generator.random() < 0.3:
        cut = generator.randrange(len(data))
        bytes_ = generator.randbytes(generator.randint(0, 3))
        data = data[:cut] + bytes_ + data[cut + generator.randint(0, 2) :]
    return path, data


def test_2000_malformed_requests_do_not_stop_the_server(served):
    before = served.complete(max_tokens=20, seed=1)["choices"]
    generator, counts = random.Random(0), {}
    for _ in range(2000):
        path, data = junk(generator)
        headers = {"content-type": "application/json"}
        reply = served.client.post(path, content=data, headers=headers)
        counts[reply.status_code] = counts.get(reply.status_code, 0) + 1
        assert reply.status_code == 200 or 400 <= reply.status_code < 500, data
        if reply.status_code != 200:
            fields = {"message", "type", "param", "code"}
            assert set(orjson.loads(reply.content)["error"]) == fields, data
    assert counts[400] > 1000 and counts[200] > 20, counts
    served.wait_until_idle(1)
    assert served.complete(max_tokens=20, seed=1)["choices"] == before


# -- the process


def start_server(model: Path, *options) -> tuple[subprocess.Popen, str]:
    """Start the verb in a process; returns it and its address."""
    words = ("serve", "--model", model, "--name", "tiny", "--port", 0, *options)
    process = oreal(*words)
    assert process.stderr
    line = process.stderr.readline()
    match = re.fullmatch(
        r"serving tiny on (http://\S+) \(.* slots, .* tokens\)\n", line
    )
    assert match, line + process.stderr.read()
    return process, match[1]


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_running_requests_and_a_second_ends_at_once(start, kind):
    process, url = start_server(start / "hf", "--rows", 2, "--length", 256)
    body = {"model": "tiny", "prompt": "?", "n": 60, "max_tokens": 200}
    replies: list = []

    def post() -> None:
        try:
            replies.append(httpx.post(url + COMPLETIONS, json=body, timeout=60))
        except httpx.HTTPError as error:
            replies.append(error)

    for second in (False, True):
        client = threading.Thread(target=post)
        client.start()
        while "oreal_slots_used 2.0" not in httpx.get(f"{url}/metrics").text:
            time.sleep(0.01)
        process.send_signal(kind)
        if second:
            time.sleep(0.3)
            process.send_signal(kind)
        client.join()
        output, errors = process.communicate(timeout=60)
        assert "finishing running requests" in errors
        if not second:
            assert len(replies[0].json()["choices"]) == 60
            assert process.returncode == 0, errors
            process, url = start_server(start / "hf", "--rows", 2, "--length", 256)
    assert isinstance(replies[1], httpx.HTTPError) or replies[1].status_code == 500
    assert process.returncode == 130, errors


# -- evaluators, unmodified, in an environment of their own


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """Return the programs of an environment with the evaluators."""
    folder = tmp_path_factory.mktemp("evaluators")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = ["openai", "lm_eval[api]", "inspect-ai"]
    install = [folder / "bin/python", "-m", "pip", "install", "-q", *packages]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip("the evaluators cannot be installed")
    return folder / "bin"


@pytest.fixture(scope="module")
def evaluated(tiny, tmp_path_factory):
    """Return a server of the fine-tuned model, and `oreal eval`'s correct answers."""
    folder = tmp_path_factory.mktemp("evaluated")
    data = tiny / "start" / "prompts.jsonl"
    options = ("--max-tokens", 8, "--rows", 32, "--json", folder / "report.json")
    words = ("eval", "--model", tiny / "sft", "--data", data, *options)
    check_ok(oreal_in_process(*words))
    items = json.loads((folder / "report.json").read_text())["items"]
    correct = sum(item["verdict"] == "correct" for item in items)
    assert 5 < correct < 100
    with serving(tiny / "sft", length=128) as served:
        yield served, data, correct


def run(program: Path, *words, cwd: Path, **variables: str) -> str:
    """Run a program of the environment; returns its output."""
    result = subprocess.run(
        [program, *map(str, words)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd)} | variables,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


OPENAI = """
import json, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
assert [model.id for model in client.models.list()] == ["tiny"]
correct = 0
how = {"model": "tiny", "temperature": 0, "max_tokens": 8}
for line in open(sys.argv[2]):
    row = json.loads(line)
    messages = [{"role": "user", "content": row["question"]}]
    reply = client.chat.completions.create(messages=messages, **how)
    text = reply.choices[0].message.content
    assert reply.usage.total_tokens > 0
    stream = client.chat.completions.create(messages=messages, stream=True, **how)
    assert text == "".join(c.choices[0].delta.content or "" for c in stream)
    correct += text == row["gold_answer"]
reply = client.chat.completions.create(messages=messages, n=3, logprobs=True, **how)
assert len(reply.choices) == 3 and reply.choices[2].logprobs.content[0].logprob <= 0
reply = client.completions.create(model="tiny", prompt="?", max_tokens=3, logprobs=0)
assert len(reply.choices[0].logprobs.token_logprobs) <= 3
for kind, call in [
    (openai.BadRequestError, dict(how, max_tokens=10**6)),
    (openai.NotFoundError, dict(how, model="other")),
]:
    try:
        client.chat.completions.create(messages=messages, **call)
    except kind:
        continue
    raise AssertionError(kind)
print(correct)
"""


def test_openais_client_gets_as_many_correct_answers(environment, evaluated, tmp_path):
    served, data, correct = evaluated
    (tmp_path / "client.py").write_text(OPENAI)
    words = ("client.py", served.url, data)
    assert int(run(environment / "python", *words, cwd=tmp_path)) == correct


LM_EVAL = """
task: maximum
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{gold_answer}}}}"
generation_kwargs: {{until: ["Problem:"], max_gen_toks: 8, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def test_lm_eval_gets_as_many_correct_answers(environment, evaluated, tmp_path):
    served, data, correct = evaluated
    (tmp_path / "maximum.yaml").write_text(LM_EVAL.format(data=data))
    arguments = f"model=tiny,base_url={served.url}{CHAT},num_concurrent=8"
    words = ["run", "--model", "local-chat-completions", "--model_args", arguments]
    words += ["--include_path", ".", "--tasks", "maximum", "--apply_chat_template"]
    words += ["--output_path", "out", "--limit", "100"]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    run(environment / "lm_eval", *words, cwd=tmp_path, **offline)
    (report,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(report.read_text())["results"]["maximum"]
    assert round(results["exact_match,none"] * 100) == correct


INSPECT = """
from inspect_ai import Task, task
from inspect_ai.dataset import FieldSpec, json_dataset
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import exact

@task
def maximum():
    fields = FieldSpec(input="question", target="gold_answer")
    data = json_dataset("{data}", fields)
    config = GenerateConfig(temperature=0, max_tokens=8)
    return Task(dataset=data, scorer=exact(), config=config)
"""


def test_inspect_gets_as_many_correct_answers(environment, evaluated, tmp_path):
    served, data, correct = evaluated
    (tmp_path / "maximum.py").write_text(INSPECT.format(data=data))
    words = ["eval", "maximum.py", "--model", "openai-api/local/tiny"]
    words += ["--log-dir", "logs", "--log-format", "json", "--display", "none"]
    variables = {"LOCAL_BASE_URL": f"{served.url}/v1", "LOCAL_API_KEY": "none"}
    run(environment / "inspect", *words, cwd=tmp_path, **variables)
    (log,) = (tmp_path / "logs").glob("*.json")
    (score,) = json.loads(log.read_text())["results"]["scores"]
    assert round(score["metrics"]["mean"]["value"] * 100) == correct
