"""Useful tokens a second: our engine, transformers.generate, the matrix products alone.

    python tools/bench_sampling.py runs/demo/start          # after `make demo`

16 prompts x 16 samples of a pretrained model, natural stops, float32; a useful token is
one up to its completion's stop. All in one process, ours and theirs in turns; medians.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
import transformers

from oreal_jax import model, sharding
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import open_model
from oreal_jax.console import Screen
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.model import ModelConfig, Params
from oreal_jax.sampling import Engine, Request, Sampling

QUESTIONS = [f"What is {a} + {20 - a}?" for a in range(1, 17)]


def matrix_products(config: ModelConfig, params: Params, rows: int) -> Callable:
    """All matrix products of one decoding step of `rows` rows, and nothing else."""
    D, layers = config.embed, params["layers"]
    heads = config.heads * config.head_dim

    def layer(x, weights):
        attention, mlp = weights["attention"], weights["mlp"]
        flat = lambda w: w.reshape(D, -1)
        query = x @ flat(attention["query"])
        keys = x @ flat(attention["key"]), x @ flat(attention["value"])
        x = x + query @ attention["output"].reshape(heads, D)
        up = (x @ mlp["gate"]) * (x @ mlp["up"])
        x = x + up @ mlp["down"]
        return x + sum(k.sum() for k in keys), None

    @jax.jit
    def step(x):
        x, _ = jax.lax.scan(layer, x, layers)
        return model.logits(config, params, x[:, None])[:, 0].sum()

    x = jnp.ones((rows, D))
    return lambda: jax.block_until_ready(step(x))


def seconds(work: Callable) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def theirs(directory: Path, requests, batch: int, limit: int, stops) -> float:
    """Useful tokens a second of `transformers.generate` on one batch of samples."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory)
    loaded.eval()
    rows = [list(r.prompt) for r in requests for _ in range(16)][:batch]
    longest = max(map(len, rows))
    pad = stops[0]
    tokens = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.no_grad():
        drawn = loaded.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=True,
            temperature=1.0,
            top_p=0.9,
            top_k=0,
            eos_token_id=list(stops),
            pad_token_id=pad,
        )
    elapsed = time.perf_counter() - start
    useful = 0
    for row in drawn[:, longest:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        useful += ends[0] + 1 if ends else len(row)
    return useful / elapsed


def main() -> None:
    """Runs the comparison and prints one JSON line a measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="slots of our engine")
    parser.add_argument("--limit", type=int, default=256, help="new tokens at most")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[32, 64],
        help="batch sizes that transformers may choose the best of",
    )
    parsed = parser.parse_args()
    screen = Screen()
    source = open_model(parsed.model)
    mesh = sharding.make_mesh(sharding.MeshShape(), source.config)
    chat = Chat(load_tokenizer(source.files))
    params = source.load(mesh)
    stops = chat.stop_tokens()
    requests = [Request(chat.encode(q), i) for i, q in enumerate(QUESTIONS)]
    sampling = Sampling(max_tokens=parsed.limit, top_p=0.9)
    engine = Engine(source.config, mesh, sampling, stops, rows=parsed.rows)
    products = matrix_products(source.config, params, parsed.rows)
    products()
    engine.sample(params, requests, 16, seed=0)  # compiles
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        hf.save(params, source.config, exported, source=source.files)
        ours, alone, other = [], [], {batch: [] for batch in parsed.batches}
        for repeat in range(parsed.repeats):
            took = seconds(
                lambda seed=repeat + 1: engine.sample(params, requests, 16, seed=seed)
            )
            found = engine.statistics
            ours.append(found.new_tokens / took)
            alone.append(
                parsed.rows / statistics.median(seconds(products) for _ in range(9))
            )
            row = {
                "ours": ours[-1],
                "decode_alone": found.new_tokens / found.decode_seconds,
                "matrix_products": alone[-1],
                "occupancy": found.occupancy,
                "mean_length": found.new_tokens / 256,
            }
            if repeat == 0:  # minutes each: once
                for batch in parsed.batches:
                    rate = theirs(exported, requests, batch, parsed.limit, stops)
                    other[batch].append(rate)
                    row[f"transformers_{batch}"] = rate
            screen.say(json.dumps({k: round(v, 3) for k, v in row.items()}))
    best = max((rates[0] for rates in other.values()), default=float("nan"))
    middle = statistics.median(ours)
    share = middle / statistics.median(alone)
    screen.say(
        f"ours {middle:.0f} useful tokens/s, transformers {best:.0f} at its best "
        f"batch: {middle / best:.1f} x; {share:.0%} of the matrix products alone"
    )


if __name__ == "__main__":
    main()
