"""A tiny random model for tests of the engine, and calls of it."""

from typing import Any

import jax
import numpy as np

from oreal_jax import model, sharding
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig
from oreal_jax.sampling import Completion, Engine, Request, Sampling

CONFIG = ModelConfig(
    vocab=64,
    embed=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    mlp=32,
    max_length=256,
)
STOP = 3
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.4,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
}
PIECES = [bytes([97 + t % 5, 97 + t // 13]) for t in range(64)]  # two letters a token
MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 12},
    {"top_p": 1.0, "temperature": 0.7, "seed": 5},
    {"top_p": 0.3, "max_tokens": 40},
    {"top_k": 4, "min_p": 0.1, **PENALTIES},
    {"top_p": 0.7, "logit_bias": ((7, 1.5), (STOP, float("-inf")))},
]
ENGINE_OPTIONS = (
    "mesh",
    "rows",
    "stop_table",
    "cache_tokens",
    "weights",
    "cache",
    "tensor",
    "real_tokens",
)
CALL_OPTIONS = ("step", "renormalise")


def make_params():
    # Larger weights: a distribution that is far from flat.
    params = model.init(CONFIG, jax.random.key(0))
    return jax.tree.map(lambda w: w * 8 if w.ndim > 1 else w, params)


def make_prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 64, n).tolist() for n in (5, 17, 1, 30, 9)]


def make_tiny_mesh(shape: MeshShape | None = None):
    if shape is None:
        devices = jax.devices()[:1]
        return make_mesh(MeshShape(), CONFIG, devices)
    return make_mesh(shape, CONFIG)


def make_engine(mesh=None, rows=64, **options) -> Engine:
    return Engine(CONFIG, mesh or make_tiny_mesh(), [STOP], rows=rows, **options)


def make_requests(
    prompts, *, keys=None, first_sample=0, seed=1, **options
) -> list[Request]:
    """Return requests for 90 tokens with a nucleus of 0.9, or with `options`."""
    sampling = Sampling(**({"max_tokens": 90, "top_p": 0.9} | options))
    return [
        Request(prompt, sampling, key, first_sample, seed)
        for prompt, key in zip(prompts, keys or range(len(prompts)), strict=True)
    ]


def put_weights(engine: Engine, params):
    placed = jax.device_put(params, sharding.param_shardings(CONFIG, engine.mesh))
    return engine.weights(placed)


def sample(params, prompts, samples=3, **options) -> list[list[Completion]]:
    """Completions of `prompts`, with options of the engine, the call and `Sampling`."""
    pop = lambda names: {name: options.pop(name) for name in names if name in options}
    engine, call = make_engine(**pop(ENGINE_OPTIONS)), pop(CALL_OPTIONS)
    requests = make_requests(prompts, **options)
    return engine.sample(put_weights(engine, params), requests, samples, **call)


def tokens_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens for completion in group] for group in groups]
