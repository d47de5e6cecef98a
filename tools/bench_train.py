"""Trained tokens a second: our train step, transformers with torch, the products alone.

    python tools/bench_train.py runs/demo/start
    python tools/bench_train.py runs/demo/start --compile

after `make demo`, which writes the model, and `make test`, which installs torch.

Completions of heavy-tailed lengths, float32. A trained token is one of a prompt or a
completion, never padding. Ours packs rows; theirs pads batches (prompts left,
completions right, the head on completions alone, sdpa) and adds up their gradients;
both do one AdamW step with clipping over all trajectories and the same loss: policy
alone, mean over completion tokens of -A log p; their gradients' norms must agree.
OREAL itself trains two models. The matrix products are those of forward and backward
pass, nothing done twice. All in one process, ours before and after theirs; medians.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from oreal_jax import hardware

hardware.hide_absent_devices()  # before what follows imports JAX

import jax
import numpy as np
import torch
import transformers
from jax.sharding import Mesh

from oreal_jax import efficiency, model, program_cache
from oreal_jax.checkpoints import hf
from oreal_jax.checkpoints.source import open_model
from oreal_jax.console import Screen
from oreal_jax.data.packing import Example, pack
from oreal_jax.losses import Oreal, PolicyLoss, Reinforce
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig, Params
from oreal_jax.model.head import HEAD_CHUNK
from oreal_jax.optimizer import Optimizer
from oreal_jax.sampling.simulation import heavy_tailed
from oreal_jax.train.scoring import put_batch
from oreal_jax.train.step import make_train_step
from oreal_jax.train_state import TrainedModels

OPTIMIZER = Optimizer(learning_rate=1e-6, final_learning_rate=1e-6, warmup_steps=0)
POLICY_ALONE = Reinforce(kl_weight=0.0)


def trajectories(
    config: ModelConfig, count: int, mean: int, longest: int
) -> list[Example]:
    """Pairs of a right and a wrong completion, in random tokens."""
    draw = np.random.default_rng(0)
    tokens = lambda size: draw.integers(0, config.vocab, size).tolist()
    prompts = [tokens(size) for size in draw.integers(40, 160, count // 2)]
    lengths = heavy_tailed(count, mean, longest)
    return [
        Example(prompts[i // 2], tokens(size), i % 2 == 0, (0.5, -0.5)[i % 2])
        for i, size in enumerate(lengths.tolist())
    ]


def seconds(work: Callable) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_device(config: ModelConfig) -> Mesh:
    """A mesh of one device: a row is a micro-batch, as for torch."""
    return make_mesh(MeshShape(), config, jax.devices()[:1])


class Ours:
    """Our train step on these trajectories, again and again."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        examples: Sequence[Example],
        loss: PolicyLoss,
        token_reward: Optimizer | None,
        row_length: int,
        remat: model.Remat,
    ):
        mesh = one_device(config)
        both = TrainedModels.create(config, OPTIMIZER, token_reward, 1000, mesh)
        self.state = both.initializer(mesh)(params)
        batch, _ = pack(examples, rows=1, row_length=row_length)
        self.rows, self.batch = int(batch.filled), put_batch(batch, mesh)
        self.update = make_train_step(both, loss, mesh, remat=remat)

    def __call__(self) -> float:
        """Takes a step; the norm of the gradient."""
        self.state, metrics, _ = self.update(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["actor/grad_norm"])


@dataclasses.dataclass(frozen=True)
class Manner:
    """How transformers is run: sequences a batch, sorted by length or as they come,
    activations kept or computed again."""

    batch: int
    by_length: bool
    checkpointing: bool

    @classmethod
    def read(cls, text: str) -> "Manner":
        """From how it is written."""
        batch, order, *rest = text.split("_")
        return cls(int(batch), order == "sorted", rest == ["checkpointing"])

    def __str__(self):
        order = "sorted" if self.by_length else "unsorted"
        return f"{self.batch}_{order}" + "_checkpointing" * self.checkpointing


class Theirs:
    """The same step in transformers and torch."""

    def __init__(self, directory: Path, examples: Sequence[Example]):
        self.examples = examples
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).train()
        self.model.config.use_cache = False
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=1e-6, weight_decay=0.01, fused=True
        )

    def __call__(self, manner: Manner) -> float:
        """Takes a step; the norm of the gradient."""
        if manner.checkpointing:
            options = {"use_reentrant": False}
            self.model.gradient_checkpointing_enable(options)
        else:
            self.model.gradient_checkpointing_disable()
        examples = list(self.examples)
        if manner.by_length:
            examples.sort(key=lambda e: len(e.prompt) + len(e.completion))
        answers = sum(len(e.completion) for e in examples)
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(examples), manner.batch):
            loss = self.loss(examples[first : first + manner.batch]) / answers
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return norm.item()

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Sum over completion tokens of -A log p."""
        before = max(len(e.prompt) for e in examples)
        after = max(len(e.completion) for e in examples)
        shape = len(examples), before + after
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, e in enumerate(examples):
            here = slice(before - len(e.prompt), before + len(e.completion))
            tokens[row, here] = torch.tensor([*e.prompt, *e.completion])
            mask[row, here] = 1
        logits = self.model(
            tokens, attention_mask=mask.long(), logits_to_keep=after + 1
        ).logits[:, :-1]
        chosen = logits.gather(-1, tokens[:, before:, None])[..., 0]
        log_probs = chosen - logits.logsumexp(-1)
        advantages = torch.tensor([[e.advantage] for e in examples])
        return -(advantages * log_probs * mask[:, before:]).sum()


def products(config: ModelConfig, work: efficiency.Work, row_length: int) -> Callable:
    """All matrix products of a forward and a backward pass over such work, in rows of
    `row_length` tokens, and nothing else; their FLOPs are those of
    `efficiency.training_flops`."""
    rows = work.tokens / row_length
    m, D, F = row_length, config.embed, config.mlp
    H, G, K = config.heads, config.kv_heads, config.head_dim
    seen = round(work.pairs / work.tokens)  # keys of a query, on average
    predicted = round(work.predicted / rows)
    numbers = iter(jax.random.split(jax.random.key(0), 99))
    normal = lambda *shape: jax.random.normal(next(numbers), shape)
    # (left, right) of each product; both gradients have as many FLOPs.
    layer = [
        (normal(m, D), normal(D, H * K)),
        (normal(m, D), normal(D, 2 * G * K)),
        (normal(m, H * K), normal(H * K, D)),
        (normal(m, D), normal(D, F)),
        (normal(m, D), normal(D, F)),
        (normal(m, F), normal(F, D)),
        (normal(G, H // G * m, K), normal(G, K, seen)),
        (normal(G, H // G * m, seen), normal(G, seen, K)),
    ]
    chunk = min(predicted, HEAD_CHUNK)
    head = [(normal(chunk, D), normal(D, config.vocab))]

    @jax.jit
    def times(pairs, count):
        def all_three(_, pairs):
            def three(left, right):
                out = left @ right
                return out @ right.mT, left.mT @ out

            # What is carried changes the next round: no round can be left out.
            return [three(left, right) for left, right in pairs]

        return jax.lax.fori_loop(0, count, all_three, pairs)

    def run() -> float:
        """Seconds of the products of all rows."""
        of_layers = seconds(lambda: jax.block_until_ready(times(layer, config.layers)))
        of_head = seconds(lambda: jax.block_until_ready(times(head, 1)))
        return rows * (of_layers + of_head * predicted / chunk)

    run()  # compiles
    return run


def compile_seconds(config: ModelConfig, layers: int) -> float:
    """How long a narrow train step of so many layers takes to trace and compile."""
    config = dataclasses.replace(config, layers=layers, embed=96, mlp=128, vocab=512)
    params = model.init(config, jax.random.key(0))
    examples = [Example([1] * 8, [2] * 8)]
    step = Ours(config, params, examples, Oreal(), OPTIMIZER, 1024, "everything")
    program = step.update.program
    return seconds(lambda: program.lower(step.state, step.batch, False).compile())


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("model", type=Path)
    options.add_argument("--completions", type=int, default=40)
    options.add_argument(
        "--mean", type=int, default=250, help="mean tokens per completion"
    )
    options.add_argument("--row-length", type=int, default=2048)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument(
        "--theirs",
        type=Manner.read,
        nargs="*",
        default=[Manner(1, False, False)],
        help="how transformers is run: 4_sorted, 8_unsorted_checkpointing, ...",
    )
    options.add_argument(
        "--remat",
        choices=get_args(model.Remat),
        default="elementwise",
        help="what our backward pass computes again",
    )
    options.add_argument(
        "--compile", action="store_true", help="measure compilation by depth instead"
    )
    options.add_argument(
        "--smoke", action="store_true", help="quick check with few short rows"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the comparison and prints one JSON line per measurement."""
    parsed = parser().parse_args(arguments)
    depths, longest = (28, 64, 28, 64), 1800
    if parsed.smoke:
        depths, longest = (1, 2), 64
        parsed.completions, parsed.mean, parsed.row_length = 4, 16, 256
        parsed.rounds = 1
    screen = Screen()
    say = lambda row: screen.log(json.dumps({k: round(v, 3) for k, v in row.items()}))
    source = open_model(parsed.model)
    config = source.config
    if parsed.compile:
        for layers in depths:
            say({f"compile_seconds_{layers}_layers": compile_seconds(config, layers)})
        return
    program_cache.enable()
    params = source.load(one_device(config))
    examples = trajectories(config, parsed.completions, parsed.mean, longest)
    work = efficiency.full_pass((len(e.prompt), len(e.completion)) for e in examples)
    flops = efficiency.training_flops(config, work)
    alone = products(config, work, parsed.row_length)
    of = lambda loss, rewarder: Ours(
        config, params, examples, loss, rewarder, parsed.row_length, parsed.remat
    )
    policy, oreal = of(POLICY_ALONE, None), of(Oreal(), OPTIMIZER)
    say(
        {
            "trained_tokens": work.tokens,
            "longest": max(len(e.prompt) + len(e.completion) for e in examples),
            "row_fill": work.tokens / (policy.rows * parsed.row_length),
            "model_tflop": flops / 1e12,
        }
    )
    found: dict[str, list[float]] = {}

    def measure(name: str, took: float) -> None:
        found.setdefault(name, []).append(work.tokens / took)
        say({name: found[name][-1]})

    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        hf.save(params, config, exported, source=source.files)
        theirs = Theirs(exported, examples)
    ours_says, theirs_says = policy(), theirs(parsed.theirs[0])  # compiles
    say({"gradient_norm_ours": ours_says, "gradient_norm_theirs": theirs_says})
    assert abs(ours_says - theirs_says) < 1e-3 * theirs_says
    oreal()
    for _ in range(parsed.rounds):
        measure("products", alone())
        measure("ours", seconds(policy))
        for manner in parsed.theirs:
            measure(f"transformers_{manner}", seconds(lambda m=manner: theirs(m)))
        measure("products", alone())
        measure("ours", seconds(policy))
        measure("oreal", seconds(oreal))
    middle = {name: statistics.median(rates) for name, rates in found.items()}
    say(middle)
    best = max(map(str, parsed.theirs), key=lambda n: middle[f"transformers_{n}"])
    screen.log(
        f"ours {middle['ours']:.0f} trained tokens/s, "
        f"{middle['ours'] * flops / work.tokens / 1e9:.0f} GFLOP/s of the model's; "
        f"{middle['ours'] / middle[f'transformers_{best}']:.2f} x transformers {best}; "
        f"{middle['ours'] / middle['products']:.0%} of the matrix products alone; "
        f"OREAL's two models {middle['oreal']:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
