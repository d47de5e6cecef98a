"""Useful tokens per second: this engine, transformers.generate, matrix products alone.

    python tools/bench_sampling.py runs/demo/start          # after `make demo`

16 prompts x 16 samples of a pretrained model, natural stops, float32; a useful token is
one up to its completion's stop. All in one process, this engine before and after each
of the others; medians. google-tunix is measured too if installed, with random weights
of the same shape: its completions never stop, so its tokens are multiplied by the share
that is useful if batches of our completions run until the longest has stopped. First,
slots are simulated on the published run's lengths.
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

from oreal_jax import Completion, Engine, Request, Sampling, load_model
from oreal_jax.console import Screen
from oreal_jax.model import ModelConfig, Params, decoding, logits
from oreal_jax.model.decoding import Weights
from oreal_jax.sampling.simulation import simulate

QUESTIONS = [f"What is {a} + {20 - a}?" for a in range(1, 17)]
SAMPLES = 16
TRUNCATION: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9}


def matrix_products(config: ModelConfig, weights: Weights, rows: int) -> Callable:
    """Return a function that runs the matrix products of one decoding step."""
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
        return logits(config, weights, x[:, None])[:, 0].sum()

    x = jnp.ones((rows, D))
    return lambda: jax.block_until_ready(step(weights, x))


def seconds(work: Callable) -> float:
    """Return the seconds that a call takes."""
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
    """Complete all requests, including the preparation of weights for decoding."""
    seeded = [request._replace(seed=seed) for request in requests]
    weights = engine.weights(params)
    return engine.sample(weights, seeded, samples, renormalise=renormalise)


def without_end(
    requests: Sequence[Request], stops: Sequence[int], max_tokens: int
) -> list[Request]:
    """Return requests whose completions never stop: the stop tokens are banned.

    With as many samples as slots, every slot decodes a token in every step.
    """
    bans = tuple((stop, -math.inf) for stop in stops)
    sampling = Sampling(max_tokens=max_tokens, logit_bias=bans, **TRUNCATION)
    return [request._replace(sampling=sampling) for request in requests]


def run_transformers(loaded: Any, requests, batch: int, limit: int, stops) -> float:
    """Return useful tokens per second of `transformers.generate` on one batch."""
    rows = [list(r.prompt) for r in requests for _ in range(SAMPLES)]
    rows = rows[:: max(1, len(rows) // batch)][:batch]  # of all prompts
    longest = max(map(len, rows))
    pad = stops[0]
    tokens = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.no_grad():
        sequences = loaded.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=limit,
            do_sample=True,
            top_k=0,
            eos_token_id=list(stops),
            pad_token_id=pad,
            **TRUNCATION,
        )
    elapsed = time.perf_counter() - start
    useful = 0
    for row in sequences[:, longest:].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        useful += ends[0] + 1 if ends else len(row)
    return useful / elapsed


def useful_share(lengths: list[int], rows: int) -> float:
    """Return the useful share of tokens where batches run until the last row stops."""
    batches = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
    return sum(lengths) / sum(len(batch) * max(batch) for batch in batches)


def run_tunix(config: ModelConfig, tokenizer, lengths: list[int], limit: int) -> float:
    """Return useful tokens per second of google-tunix on one batch, once compiled."""
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
    generate = sampler.Sampler(llama.Llama3(shape, rngs=nnx.Rngs(0)), tokenizer, cache)
    prompts = [(QUESTIONS * 2)[i % 32] for i in range(rows)]
    work = lambda new: generate(
        prompts, max_generation_steps=new, max_prompt_length=64, **TRUNCATION, seed=0
    )
    work(4)  # compiles
    rate = rows * limit / seconds(lambda: work(limit))
    return rate * useful_share(lengths, rows)


def baselines(args, model, requests, stops, exported, lengths) -> Iterator[tuple]:
    """Yield the name of each other implementation, and a function that measures it."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    for batch in args.batches:
        yield (
            f"transformers_{batch}",
            lambda b=batch: run_transformers(loaded, requests, b, args.limit, stops),
        )
    if importlib.util.find_spec("tunix"):
        yield (
            "tunix_32",
            lambda: run_tunix(model.config, model.chat.tokenizer, lengths, args.limit),
        )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path)
    options.add_argument("--rows", type=int, default=64, help="slots of the engine")
    options.add_argument(
        "--limit", type=int, default=256, help="maximum number of new tokens"
    )
    options.add_argument(
        "--batches",
        type=int,
        nargs="*",
        default=[16, 32, 64],
        help="batch sizes of transformers",
    )
    options.add_argument(
        "--smoke", action="store_true", help="quick check with few short rows"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print one JSON line per measurement."""
    args = parser().parse_args(arguments)
    questions, samples, full_tokens = QUESTIONS, SAMPLES, 128
    if args.smoke:
        questions, samples, full_tokens = QUESTIONS[:2], 2, 8
        args.rows, args.limit = 4, 8
        args.batches = [2 for _ in args.batches[:1]]
    screen = Screen()
    show = lambda row: screen.log(json.dumps({k: round(v, 3) for k, v in row.items()}))
    show(
        {
            f"simulated_occupancy_{slots}_slots": simulate(
                published_lengths(),
                slots=slots,
                pages=40_000,
                page_size=64,
                longest=14_000,
            ).occupancy
            for slots in (64, 256)
        }
    )
    model = load_model(args.model, dtype="float32")
    config, params, stops = model.config, model.params, model.chat.stop_tokens()
    sampling = Sampling(max_tokens=args.limit, **TRUNCATION)
    requests = [
        Request(model.chat.encode(question), sampling, key)
        for key, question in enumerate(questions)
    ]
    engine = model.make_engine(rows=args.rows)
    weights = decoding.lay_out(config, params, jnp.float32)
    products = matrix_products(config, weights, args.rows)
    products()
    groups = sample(engine, params, requests, samples, seed=0)  # compiles
    lengths = [len(c.tokens) for row in zip(*groups, strict=True) for c in row]
    ours, alone, decode, truncated, others = [], [], [], [], {}
    full = without_end(requests, stops, full_tokens)

    def full_slots(renormalise: bool) -> float:
        sample(engine, params, full, args.rows // len(requests), 1, renormalise)
        counts = engine.statistics
        assert counts.new_tokens == args.rows * full_tokens  # none stopped
        return counts.metrics()["perf/decode_throughput"]

    def measure(seed: int) -> None:
        rates = lambda: [args.rows / seconds(products) for _ in range(9)]
        before = rates()
        duration = seconds(lambda: sample(engine, params, requests, samples, seed))
        counts = engine.statistics
        ours.append(counts.new_tokens / duration)
        decode.append(full_slots(False))
        truncated.append(full_slots(True))
        alone.append(statistics.median(before + rates()))
        show(
            {
                "ours": ours[-1],
                "decode": counts.metrics()["perf/decode_throughput"],
                "full_slots": decode[-1],
                "full_slots_nucleus_log_probs": truncated[-1],
                "prefill": counts.metrics()["perf/prefill_throughput"],
                "matrix_products": alone[-1],
                "occupancy": counts.occupancy,
                "mean_length": counts.new_tokens / len(lengths),
            }
        )

    full_slots(False)  # compiles
    measure(1)
    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        model.save(exported)
        for seed, (name, work) in enumerate(
            baselines(args, model, requests, stops, exported, lengths), start=2
        ):
            others[name] = work()
            show({name: others[name]})
            measure(seed)
    middle, shares = statistics.median(ours), []
    for decoded, products_alone in zip(decode, alone, strict=True):
        shares.append(decoded / products_alone)
    screen.log(
        f"ours {middle:.0f} useful tokens/s; "
        + ", ".join(f"{middle / rate:.1f} x {name}" for name, rate in others.items())
        + f"; full slots decode at {statistics.median(shares):.0%} of the matrix "
        f"products alone; log-probabilities of the nucleus cost "
        f"{1 - statistics.median(truncated) / statistics.median(decode):.0%}"
    )


if __name__ == "__main__":
    main()
