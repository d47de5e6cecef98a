"""Trained tokens per second: this train step, transformers, matrix products alone.

    python tools/bench_train.py runs/demo/start
    python tools/bench_train.py runs/demo/start --compile

after `make demo`, which writes the model, and `make test`, which installs torch.

Completions of heavy-tailed lengths, float32. A trained token is one of a prompt or a
completion, never padding. This project packs rows; transformers pads batches (prompts
left, completions right, the head on completions only, sdpa) and sums their gradients.
Both do one AdamW step with clipping over all trajectories and the same loss: policy
alone, mean over completion tokens of -A log p; the gradient norms must agree. OREAL
itself trains two models. The matrix products are those of forward and backward pass,
none computed twice. All in one process, ours before and after theirs; medians.
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

from oreal_jax import efficiency, load_model, model
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
    """Return pairs of a correct and an incorrect completion, of random tokens."""
    rng = np.random.default_rng(0)
    tokens = lambda size: rng.integers(0, config.vocab, size).tolist()
    prompts = [tokens(size) for size in rng.integers(40, 160, count // 2)]
    lengths = heavy_tailed(count, mean, longest)
    return [
        Example(prompts[i // 2], tokens(size), i % 2 == 0, (0.5, -0.5)[i % 2])
        for i, size in enumerate(lengths.tolist())
    ]


def seconds(work: Callable) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def one_device(config: ModelConfig) -> Mesh:
    """Return a mesh of one device: a row is a micro-batch, as for torch."""
    return make_mesh(MeshShape(), config, jax.devices()[:1])


class Ours:
    """This project's train step, repeated on the same trajectories."""

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
        models = TrainedModels.create(config, OPTIMIZER, token_reward, 1000, mesh)
        self.state = models.initializer(mesh)(params)
        batch, _ = pack(examples, rows=1, row_length=row_length)
        self.rows, self.batch = int(batch.filled), put_batch(batch, mesh)
        self.update = make_train_step(models, loss, mesh, remat=remat)

    def __call__(self) -> float:
        """Take a step; return the gradient norm."""
        self.state, metrics, _ = self.update(self.state, self.batch)
        jax.block_until_ready(self.state)
        return float(metrics["actor/grad_norm"])


@dataclasses.dataclass(frozen=True)
class Setting:
    """How transformers is run.

    `batch` sequences per batch, sorted by length or not, with activation checkpointing
    or without.
    """

    batch: int
    by_length: bool
    checkpointing: bool

    @classmethod
    def parse(cls, text: str) -> "Setting":
        """Parse e.g. "4_sorted" or "8_unsorted_checkpointing"."""
        batch, order, *options = text.split("_")
        return cls(int(batch), order == "sorted", options == ["checkpointing"])

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

    def __call__(self, setting: Setting) -> float:
        """Take a step; return the gradient norm."""
        if setting.checkpointing:
            options = {"use_reentrant": False}
            self.model.gradient_checkpointing_enable(options)
        else:
            self.model.gradient_checkpointing_disable()
        examples = list(self.examples)
        if setting.by_length:
            examples.sort(key=lambda e: len(e.prompt) + len(e.completion))
        completion_tokens = sum(len(e.completion) for e in examples)
        self.optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(examples), setting.batch):
            loss = self.loss(examples[first : first + setting.batch])
            (loss / completion_tokens).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return norm.item()

    def loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Return the sum over completion tokens of -A log p."""
        prompt = max(len(e.prompt) for e in examples)
        completion = max(len(e.completion) for e in examples)
        shape = len(examples), prompt + completion
        tokens, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
        for row, e in enumerate(examples):
            columns = slice(prompt - len(e.prompt), prompt + len(e.completion))
            tokens[row, columns] = torch.tensor([*e.prompt, *e.completion])
            mask[row, columns] = 1
        logits = self.model(
            tokens, attention_mask=mask.long(), logits_to_keep=completion + 1
        ).logits[:, :-1]
        chosen = logits.gather(-1, tokens[:, prompt:, None])[..., 0]
        log_probs = chosen - logits.logsumexp(-1)
        advantages = torch.tensor([[e.advantage] for e in examples])
        return -(advantages * log_probs * mask[:, prompt:]).sum()


def products(config: ModelConfig, work: efficiency.Work, row_length: int) -> Callable:
    """Return a function that runs the matrix products of a forward and backward pass.

    Rows have `row_length` tokens. The FLOPs are those of `efficiency.training_flops`.
    """
    rows = work.tokens / row_length
    m, D, F = row_length, config.embed, config.mlp
    H, G, K = config.heads, config.kv_heads, config.head_dim
    context = round(work.pairs / work.tokens)  # mean keys per query
    predicted = round(work.predicted / rows)
    keys = iter(jax.random.split(jax.random.key(0), 99))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    # (left, right) of each product; both gradients have as many FLOPs.
    layer = [
        (normal(m, D), normal(D, H * K)),
        (normal(m, D), normal(D, 2 * G * K)),
        (normal(m, H * K), normal(H * K, D)),
        (normal(m, D), normal(D, F)),
        (normal(m, D), normal(D, F)),
        (normal(m, F), normal(F, D)),
        (normal(G, H // G * m, K), normal(G, K, context)),
        (normal(G, H // G * m, context), normal(G, context, K)),
    ]
    chunk = min(predicted, HEAD_CHUNK)
    head = [(normal(chunk, D), normal(D, config.vocab))]

    @jax.jit
    def repeat(pairs, count):
        def body(_, pairs):
            def three_products(left, right):
                out = left @ right
                return out @ right.mT, left.mT @ out

            # The carry changes, so XLA cannot drop an iteration.
            return [three_products(left, right) for left, right in pairs]

        return jax.lax.fori_loop(0, count, body, pairs)

    def run() -> float:
        """Return the seconds of the products of all rows."""
        in_layers = seconds(lambda: jax.block_until_ready(repeat(layer, config.layers)))
        in_head = seconds(lambda: jax.block_until_ready(repeat(head, 1)))
        return rows * (in_layers + in_head * predicted / chunk)

    run()  # compiles
    return run


def compile_seconds(config: ModelConfig, layers: int) -> float:
    """Return the seconds to trace and compile a narrow train step of many layers."""
    config = dataclasses.replace(config, layers=layers, embed=96, mlp=128, vocab=512)
    params = model.init(config, jax.random.key(0))
    examples = [Example([1] * 8, [2] * 8)]
    step = Ours(config, params, examples, Oreal(), OPTIMIZER, 1024, "everything")
    program = step.update.program
    return seconds(lambda: program.lower(step.state, step.batch, False).compile())


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
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
        type=Setting.parse,
        nargs="*",
        default=[Setting(1, False, False)],
        help="how transformers is run: 4_sorted, 8_unsorted_checkpointing, ...",
    )
    options.add_argument(
        "--remat",
        choices=get_args(model.Remat),
        default="elementwise",
        help="what our backward pass recomputes",
    )
    options.add_argument(
        "--compile", action="store_true", help="measure compilation by depth instead"
    )
    options.add_argument(
        "--smoke", action="store_true", help="quick check with few short rows"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison and print one JSON line per measurement."""
    args = parser().parse_args(arguments)
    depths, longest = (28, 64, 28, 64), 1800
    if args.smoke:
        depths, longest = (1, 2), 64
        args.completions, args.mean, args.row_length = 4, 16, 256
        args.rounds = 1
    screen = Screen()
    show = lambda row: screen.log(json.dumps({k: round(v, 3) for k, v in row.items()}))
    if args.compile:  # without the program cache
        config = open_model(args.model).config
        for layers in depths:
            show({f"compile_seconds_{layers}_layers": compile_seconds(config, layers)})
        return
    loaded = load_model(args.model, devices=jax.devices()[:1], dtype="float32")
    config, params = loaded.config, loaded.params
    examples = trajectories(config, args.completions, args.mean, longest)
    work = efficiency.full_pass((len(e.prompt), len(e.completion)) for e in examples)
    flops = efficiency.training_flops(config, work)
    alone = products(config, work, args.row_length)
    make_ours = lambda loss, token_reward: Ours(
        config, params, examples, loss, token_reward, args.row_length, args.remat
    )
    policy, oreal = make_ours(POLICY_ALONE, None), make_ours(Oreal(), OPTIMIZER)
    show(
        {
            "trained_tokens": work.tokens,
            "longest": max(len(e.prompt) + len(e.completion) for e in examples),
            "row_fill": work.tokens / (policy.rows * args.row_length),
            "model_tflop": flops / 1e12,
        }
    )
    rates: dict[str, list[float]] = {}

    def measure(name: str, duration: float) -> None:
        rates.setdefault(name, []).append(work.tokens / duration)
        show({name: rates[name][-1]})

    with tempfile.TemporaryDirectory() as scratch:
        exported = Path(scratch) / "hf"
        loaded.save(exported)
        theirs = Theirs(exported, examples)
    our_norm, their_norm = policy(), theirs(args.theirs[0])  # compiles
    show({"gradient_norm_ours": our_norm, "gradient_norm_theirs": their_norm})
    assert abs(our_norm - their_norm) < 1e-3 * their_norm
    oreal()
    for _ in range(args.rounds):
        measure("products", alone())
        measure("ours", seconds(policy))
        for setting in args.theirs:
            measure(f"transformers_{setting}", seconds(lambda s=setting: theirs(s)))
        measure("products", alone())
        measure("ours", seconds(policy))
        measure("oreal", seconds(oreal))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    show(medians)
    best = max(map(str, args.theirs), key=lambda n: medians[f"transformers_{n}"])
    ours = medians["ours"]
    screen.log(
        f"ours {ours:.0f} trained tokens/s, "
        f"{ours * flops / work.tokens / 1e9:.0f} GFLOP/s of the model's; "
        f"{ours / medians[f'transformers_{best}']:.2f} x transformers {best}; "
        f"{ours / medians['products']:.0%} of the matrix products alone; "
        f"OREAL's two models {medians['oreal']:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
