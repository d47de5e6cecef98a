"""Gradients of a training step in bfloat16 against the same step in float32.

    python tools/gradient_error.py
    python tools/gradient_error.py --rows 16 --length 256

Eight simulated CPU devices. Token frequencies follow Zipf's law, so that the gradient
of a frequent token's embedding is a sum of thousands of terms. Every completion is
cloned: all terms have the same sign, so that a sum which stops growing shows. Prints
the relative error of every leaf of both models' gradients.
"""

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from oreal_jax import model
from oreal_jax.data.packing import Batch, Example, pack
from oreal_jax.losses import BestOfNCloning
from oreal_jax.mesh import MeshShape, make_mesh
from oreal_jax.model import ModelConfig
from oreal_jax.optimizer import Optimizer
from oreal_jax.train.scoring import put_batch
from oreal_jax.train.step import TrainStep, make_train_step
from oreal_jax.train_state import TrainedModels, TrainState

CONFIG = ModelConfig(
    vocab=256,
    embed=128,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=32,
    mlp=256,
    qkv_bias=True,
    qk_norm=True,
)
OPTIMIZER = Optimizer(
    learning_rate=1e-6, final_learning_rate=1e-6, warmup_steps=0, clip_norm=1e9
)


def make_batch(config: ModelConfig, rows: int, length: int) -> Batch:
    """Return one micro-batch of `rows` x `length` tokens, one example per row."""
    rng = np.random.default_rng(0)
    frequency = 1 / np.arange(1, config.vocab + 1)
    tokens = rng.choice(
        config.vocab, (rows, length + 1), p=frequency / frequency.sum()
    ).tolist()
    examples = [Example(row[:8], row[8:-1]) for row in tokens]
    return pack(examples, rows=rows, row_length=length)[0]


class Step:
    """One training step of both models from the same start, on one mesh."""

    def __init__(self, config: ModelConfig, shape: MeshShape, **dtypes: Any):
        """Make the step on the first devices; `dtypes` are for `make_train_step`."""
        self.mesh: Mesh = make_mesh(
            shape, config, jax.devices()[: math.prod(dataclasses.astuple(shape))]
        )
        self.models = TrainedModels.create(config, OPTIMIZER, OPTIMIZER, 9, self.mesh)
        self.update: TrainStep = make_train_step(
            self.models, BestOfNCloning(), self.mesh, **dtypes
        )
        self.config = config

    def start(self) -> TrainState:
        """Return random models; biases and token reward head are not zero."""
        keys = iter(jax.random.split(jax.random.key(1), 99))

        def perturb(x):
            return x + 0.1 * jax.random.normal(next(keys), x.shape) * (x.ndim < 4)

        params = model.init(self.config, jax.random.key(0))
        params["layers"] = jax.tree.map(perturb, params["layers"])
        state = self.models.initializer(self.mesh)(params)
        if state.token_reward:
            score = state.token_reward.params["score"]
            state.token_reward.params["score"] = jax.device_put(
                jax.random.normal(next(keys), score.shape) / score.size**0.5,
                score.sharding,
            )
        return state

    def lower(self, batch: Batch) -> jax.stages.Lowered:
        """Return the step before compilation."""
        state = self.models.abstract(self.mesh)
        return self.update.program.lower(state, put_batch(batch, self.mesh), False)

    def gradients(self, batch: Batch) -> dict[str, np.ndarray]:
        """Return all gradients: ten times Adam's first moments after one step."""
        state, *_ = self.update(self.start(), put_batch(batch, self.mesh))
        states = {"policy": state.policy, "token_reward": state.token_reward}
        moments = {
            name: next(x for x in trained.optimizer if hasattr(x, "mu")).mu
            for name, trained in states.items()
            if trained
        }
        leaves = jax.tree_util.tree_flatten_with_path(moments)[0]
        name = lambda path: "/".join(key.key for key in path)
        return {name(path): 10 * np.asarray(leaf, np.float64) for path, leaf in leaves}


def relative_errors(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return the norm of each leaf's difference, divided by the norm expected."""
    norm = np.linalg.norm
    return {k: float(norm(actual[k] - e) / norm(e)) for k, e in expected.items()}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--length", type=int, default=1024, help="tokens per row")
    options.add_argument(
        "--smoke", action="store_true", help="quick check with 8 rows of 64 tokens"
    )
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table: a line per leaf, a column per way to run the step."""
    args = parser().parse_args(arguments)
    rows, length = (8, 64) if args.smoke else (args.rows, args.length)
    batch = make_batch(CONFIG, rows, length)
    one, eight = MeshShape(fsdp=1), MeshShape(fsdp=8)
    expected = Step(CONFIG, one, dtype=jnp.float32).gradients(batch)
    ways = {
        "1 device": Step(CONFIG, one, dtype=jnp.bfloat16),
        "8 devices": Step(CONFIG, eight, dtype=jnp.bfloat16),
        "8, bfloat16 sums": Step(
            CONFIG, eight, dtype=jnp.bfloat16, gradient_sums=jnp.bfloat16
        ),
    }
    errors = {
        name: relative_errors(step.gradients(batch), expected)
        for name, step in ways.items()
    }
    print(f"{'':45}" + "".join(f"{name:>24}" for name in errors))
    for leaf in expected:
        print(f"{leaf:45}" + "".join(f"{e[leaf]:24.4f}" for e in errors.values()))
    return 0


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
