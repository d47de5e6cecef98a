"""Useful tokens a second: our engine, transformers.generate, the matrix products alone.

    python tools/bench_sampling.py runs/demo/start          # after `make demo`

16 prompts x 16 samples of a pretrained model, natural stops, float32; a useful token is
one up to its completion's stop. All in one process, ours before and after each of
theirs; medians. google-tunix is measured too where it is installed, with random weights
of the same shape: they never stop, so of its tokens that share counts which is useful
where batches of our completions run until the longest has stopped. Before them, slots
are simulated on the published run's lengths.
"""

import argparse
import importlib.util
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oreal_jax import hardware

hardware.hide_absent_devices()  # before what follows imports JAX

import jax
import jax.numpy as jnp
import torch
import transformers
from simulate_slots import published_lengths

from oreal_jax import model, program_cache
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import open_model
from oreal_jax.console import Screen
from oreal_jax.data import Chat, load_tokenizer
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig, Params, decoding
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling import Completion, Engine, Request, Sampling
from oreal_jax.sampling.simulation import simulate

QUESTIONS = [f"What is {a} + {20 - a}?" for a in range(1, 17)]
SAMPLES = 16
HOW: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}


def matrix_products(config: ModelConfig, weights: Weights, rows: int) -> Callable:
    """All matrix products of one decoding step of `rows` rows, and nothing else."""
    D = config.embed

    @jax.jit
    def step(weights, x):
        for layer in weights["layers"]:
            attention, mlp = layer["attention"], layer["mlp"]
            flat = lambda w: w.reshape(D, -1)
            query = x @ flat(attention["query"])
            keys = x @ flat(attention["key"]), x @ flat(attention["value"])
            x = x + query @ attention["output"].reshape(-1, D)
            up = (x @ mlp["gate"]) * (x @ mlp["up"])
            x = x + up @ mlp["down"] + sum(k.sum() for k in keys)
        return model.logits(config, weights, x[:, None])[:, 0].sum()

    x = jnp.ones((rows, D))
    return lambda: jax.block_until_ready(step(weights, x))


def seconds(work: Callable) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def sample(
    engine: Engine,
    params: Params,
    requests: Sequence[Request],
    samples: int,
    seed: int,
    renormalise: bool = False,
) -> list[list[Completion]]:
    """Completes all requests, including the preparation of weights for decoding."""
    seeded = [request._replace(seed=seed) for request in requests]
    weights = engine.weights(params)
    return engine.sample(weights, seeded, samples, renormalise=renormalise)


def without_end(
    requests: Sequence[Request], stops: Sequence[int], max_tokens: int
) -> list[Request]:
    """Requests whose completions never stop: the stop tokens are banned. With as many
    samples as slots, every slot decodes a token in every step."""
    bans = tuple((stop, -math.inf) for stop in stops)
    sampling = Sampling(max_tokens=max_tokens, logit_bias=bans, **HOW)
    return [request._replace(sampling=sampling) for request in requests]


def of_transformers(loaded: Any, requests, batch: int, limit: int, stops) -> float:
    """Useful tokens a second of `transformers.generate` on one batch of samples."""
    rows = [list(r.prompt) for r in requests for _ in range(SAMPLES)]
    rows = rows[:: max(1, len(rows) // batch)][:batch]  # of all prompts
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
            top_k=0,
            eos_token_id=list(stops),
            pad_token_id=pad,
            **HOW,
        )
    elapsed = time.perf_counter() - start
    useful = 0
    for row in drawn[:, longest:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        useful += ends[0] + 1 if ends else len(row)
    return useful / elapsed


def useful_share(lengths: list[int], rows: int) -> float:
    """What part of their tokens is useful where `rows` at a time run until the longest
    of them has stopped."""
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def of_tunix(config: ModelConfig, tokenizer, lengths: list[int], limit: int) -> float:
    """Useful tokens a second of google-tunix's sampler on one batch, once compiled."""
    rows = 32
    from flax import nnx
    from tunix.generate import sampler  # pyright: ignore[reportMissingImports]
    from tunix.models.llama3 import model as llama  # pyright: ignore

    shape = llama.ModelConfig(
        num_layers=config.layers,
        vocab_size=config.vocab,
        embed_dim=config.embed,
        hidden_dim=config.mlp,
        num_heads=config.heads,
        head_dim=config.head_dim,
        num_kv_heads=config.kv_heads,
        rope_theta=int(config.rope.theta),
        norm_eps=config.norm_epsilon,
        weight_tying=config.tied,
    )
    cache = sampler.CacheConfig(
        cache_size=64 + limit,
        num_layers=config.layers,
        num_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
    )
    draw = sampler.Sampler(llama.Llama3(shape, rngs=nnx.Rngs(0)), tokenizer, cache)
    prompts = [(QUESTIONS * 2)[i % 32] for i in range(rows)]
    work = lambda new: draw(
        prompts, max_generation_steps=new, max_prompt_length=64, **HOW, seed=0
    )
    work(4)  # compiles
    rate = rows * limit / seconds(lambda: work(limit))
    return rate * useful_share(lengths, rows)


def peers(parsed, source, chat, requests, stops, exported, lengths) -> Iterator[tuple]:
    """(name, how to measure it) of all others."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    for batch in parsed.batches:
        yield (
            f"transformers_{batch}",
            lambda b=batch: of_transformers(loaded, requests, b, parsed.limit, stops),
        )
    if importlib.util.find_spec("tunix"):
        yield (
            "tunix_32",
            lambda: of_tunix(source.config, chat.tokenizer, lengths, parsed.limit),
        )


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path)
    options.add_argument("--rows", type=int, default=64, help="slots of our engine")
    options.add_argument("--limit", type=int, default=256, help="maximum of new tokens")
    options.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[16, 32, 64],
        help="batch sizes that transformers may choose the best of",
    )
    options.add_argument(
        "--smoke", action="store_true", help="quick check with few short rows"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints one JSON line per measurement."""
    parsed = parser().parse_args(arguments)
    questions, samples, full_tokens = QUESTIONS, SAMPLES, 128
    if parsed.smoke:
        questions, samples, full_tokens = QUESTIONS[:2], 2, 8
        parsed.rows, parsed.limit = 4, 8
        parsed.batches = [2 for _ in parsed.batches[:1]]
    screen = Screen()
    say = lambda row: screen.log(json.dumps({k: round(v, 3) for k, v in row.items()}))
    say(
        {
            f"simulated_occupancy_{slots}_slots": simulate(
                published_lengths(), slots=slots, pages=40_000, size=64, longest=14_000
            ).occupancy
            for slots in (64, 256)
        }
    )
    source = open_model(parsed.model)
    mesh = make_mesh(MeshShape(), source.config)
    program_cache.enable()
    chat = Chat(load_tokenizer(source.files))
    params = source.load(mesh)
    stops = chat.stop_tokens()
    sampling = Sampling(max_tokens=parsed.limit, **HOW)
    requests = [Request(chat.encode(q), sampling, i) for i, q in enumerate(questions)]
    engine = Engine(source.config, mesh, stops, rows=parsed.rows)
    weights = decoding.lay_out(source.config, params, jnp.float32)
    products = matrix_products(source.config, weights, parsed.rows)
    products()
    groups = sample(engine, params, requests, samples, seed=0)  # compiles
    lengths = [len(c.tokens) for row in zip(*groups, strict=True) for c in row]
    ours, alone, decode, truncated, others = [], [], [], [], {}
    full = without_end(requests, stops, full_tokens)

    def full_slots(renormalise: bool) -> float:
        sample(engine, params, full, parsed.rows // len(requests), 1, renormalise)
        counts = engine.statistics
        assert counts.new_tokens == parsed.rows * full_tokens  # none stopped
        return counts.metrics()["perf/decode_throughput"]

    def measure(seed: int) -> None:
        rates = lambda: [parsed.rows / seconds(products) for _ in range(9)]
        before = rates()
        took = seconds(lambda: sample(engine, params, requests, samples, seed=seed))
        found = engine.statistics
        ours.append(found.new_tokens / took)
        decode.append(full_slots(False))
        truncated.append(full_slots(True))
        alone.append(statistics.median(before + rates()))
        say(
            {
                "ours": ours[-1],
                "decode": found.metrics()["perf/decode_throughput"],
                "full_slots": decode[-1],
                "full_slots_nucleus_log_probs": truncated[-1],
                "prefill": found.metrics()["perf/prefill_throughput"],
                "matrix_products": alone[-1],
                "occupancy": found.occupancy,
                "mean_length": found.new_tokens / len(lengths),
            }
        )

    full_slots(False)  # compiles
    measure(1)
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        hf.save(params, source.config, exported, source=source.files)
        for seed, (name, work) in enumerate(
            peers(parsed, source, chat, requests, stops, exported, lengths), start=2
        ):
            others[name] = work()
            say({name: others[name]})
            measure(seed)
    middle, shares = statistics.median(ours), []
    for drew, products_alone in zip(decode, alone, strict=True):
        shares.append(drew / products_alone)
    screen.log(
        f"ours {middle:.0f} useful tokens/s; "
        + ", ".join(f"{middle / rate:.1f} x {name}" for name, rate in others.items())
        + f"; full slots decode at {statistics.median(shares):.0%} of the matrix "
        f"products alone; log-probabilities of the nucleus cost "
        f"{1 - statistics.median(truncated) / statistics.median(decode):.0%}"
    )


if __name__ == "__main__":
    main()
