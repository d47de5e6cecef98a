"""What int8 weights and a float8 cache cost: log-probabilities against the trainer's.

    python tools/bench_eight_bits.py runs/demo/start        # after `make demo`

Completions are drawn by an engine in eight bits, then scored by the full forward pass
in float32; natural stops, at most 64 new tokens.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from oreal_jax import hardware

hardware.hide_absent_devices()  # before what follows imports JAX

import jax
import jax.numpy as jnp
import numpy as np
from bench_sampling import HOW, QUESTIONS
from jax.sharding import Mesh

from oreal_jax import model, program_cache
from oreal_jax.checkpoints.source import ModelSource, open_model
from oreal_jax.console import Screen
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import Params
from oreal_jax.sampling import Completion, Engine, Request, Sampling

OPTIONS = {
    "float32": {},
    "int8 weights": {"weights": "int8"},
    "float8 cache": {"cache": "float8"},
    "both": {"weights": "int8", "cache": "float8"},
}


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path)
    options.add_argument(
        "--smoke", action="store_true", help="quick check with few short rows"
    )
    return options


def sample(
    source: ModelSource,
    mesh: Mesh,
    params: Params,
    chat: Chat,
    requests: Sequence[Request],
    **options,
) -> list[Completion]:
    """A completion of each request, from an engine with these `options`."""
    engine = Engine(
        source.config,
        mesh,
        chat.stop_tokens(),
        rows=len(requests),
        **options,
    )
    groups = engine.sample(engine.weights(params), requests, 1)
    return [group[0] for group in groups]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each option."""
    parsed = parser().parse_args(arguments)
    questions, limit = (QUESTIONS[:2], 4) if parsed.smoke else (QUESTIONS, 64)
    screen = Screen()
    source = open_model(parsed.model)
    config = source.config
    mesh = make_mesh(MeshShape(), config)
    program_cache.enable()
    chat = Chat(load_tokenizer(source.files))
    params = source.load(mesh)
    sampling = Sampling(max_tokens=limit, **HOW)
    requests = [Request(chat.encode(q), sampling, i) for i, q in enumerate(questions)]
    longest = max(len(r.prompt) for r in requests) + limit

    @jax.jit
    def score(tokens, targets):
        positions = jnp.broadcast_to(jnp.arange(longest)[None], tokens.shape)
        states = model.hidden(config, params, tokens, positions, jnp.ones_like(tokens))
        return model.log_probs(config, params, states, targets)[0]

    for name, options in OPTIONS.items():
        completions = sample(source, mesh, params, chat, requests, **options)
        tokens = np.zeros((len(requests), longest + 1), np.int32)
        for row, request, c in zip(tokens, requests, completions, strict=True):
            whole = [*request.prompt, *c.tokens]
            row[: len(whole)] = whole
        found = np.asarray(score(tokens[:, :-1], tokens[:, 1:]))
        ours = np.concatenate([c.log_probs for c in completions])
        exact = np.concatenate(
            [
                row[len(r.prompt) - 1 :][: len(c.tokens)]
                for row, r, c in zip(found, requests, completions, strict=True)
            ]
        )
        difference = np.abs(ours - exact)
        correlation = np.corrcoef(np.exp(ours), np.exp(exact))[0, 1]
        screen.log(
            f"{name:13s} {len(ours)} tokens: log-probabilities differ by "
            f"{difference.mean():.2g} on average, {difference.max():.2g} at most; "
            f"probabilities by {np.abs(np.exp(ours) - np.exp(exact)).mean():.2g}, "
            f"correlation {correlation:.5f}"
        )


if __name__ == "__main__":
    main()
