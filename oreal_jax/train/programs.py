"""What a run executes on its devices, made from its config.

The loop runs these programs, `oreal plan` compiles the same ones ahead of time.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from oreal_jax import model, rollout, sharding
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.data.packing import SizeLimits
from oreal_jax.errors import InputError
from oreal_jax.model import Distribution, ModelConfig
from oreal_jax.sampling import Engine, sampled_from
from oreal_jax.train.state import Learners, learners
from oreal_jax.train.step import TrainStep, train_step


def mesh_of(
    config: TrainConfig | SftConfig, shape: ModelConfig, devices: Sequence | None = None
) -> Mesh:
    """The mesh of a run.

    Raises:
        InputError: devices, model, rows and dtypes do not go together.
    """
    mesh = sharding.make_mesh(config.mesh, shape, devices)
    length, context = config.packing.row_length, mesh.shape["context"]
    if length % context:
        raise InputError(
            f"packing.row_length={length} does not divide by mesh.context={context}"
        )
    is_float32 = compute_dtype(config.compute, mesh) == jnp.float32
    if is_float32 and config.gradient_sums != "float32":
        raise InputError(
            f"gradient_sums={config.gradient_sums!r} with compute={config.compute!r}, "
            "which is float32 here: it needs compute='bfloat16'"
        )
    return mesh


def compute_dtype(name: str, mesh: Mesh):
    """The dtype of activations: "auto" is bfloat16, on CPU float32."""
    if name == "auto":
        name = "float32" if sharding.platform(mesh) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def learners_of(
    config: TrainConfig | SftConfig, shape: ModelConfig, mesh: Mesh, steps: int
) -> Learners:
    """The models that a run trains."""
    rewards = config.token_reward if isinstance(config, TrainConfig) else None
    return learners(shape, config.policy, rewards, steps, mesh)


def update_of(
    config: TrainConfig | SftConfig, learners: Learners, mesh: Mesh
) -> TrainStep:
    """The training step of a run."""
    is_train = isinstance(config, TrainConfig)
    return train_step(
        learners,
        config.loss,
        mesh,
        freeze_steps=config.freeze_steps if is_train else 0,
        dtype=compute_dtype(config.compute, mesh),
        distribution=distribution_of(config) if is_train else model.full,
        remat=config.remat,
        gradient_sums=jnp.dtype(config.gradient_sums),
    )


def distribution_of(config: TrainConfig) -> Distribution:
    """The distribution whose probabilities the loss is about."""
    if config.log_probs == "sampled":
        return sampled_from(config.sampling)
    return model.full


def engine_of(
    config: TrainConfig,
    shape: ModelConfig,
    mesh: Mesh,
    stop_tokens: Sequence[int],
    stop_table: Int[np.ndarray, "V S"] | None,
    longest_prompt: int,
    devices: Sequence | None = None,
) -> Engine:
    """The engine of a run, for training and evaluation, with prompts of at most
    `longest_prompt` tokens. `devices` are those of this process (None: JAX's default).

    Raises:
        InputError: the devices do not divide into engines, or a token of
            `config.sampling` or `stop_tokens` is outside the vocabulary, or the longest
            completion exceeds the model or the cache.
    """
    engine = Engine(
        shape,
        mesh,
        stop_tokens,
        stop_table=stop_table,
        rows=config.decode_rows,
        cache_tokens=config.cache_tokens,
        dtype=compute_dtype(config.compute, mesh),
        weights=config.decode_weights,
        cache=config.decode_cache,
        tensor=config.decode_tensor,
        devices=devices,
        longest=(longest_prompt, config.sampling.max_tokens),
    )
    engine.check_sampling(config.sampling)
    engine.check_length(longest_prompt, config.sampling.max_tokens)
    return engine


def limits_of(config: TrainConfig, shortest_prompt: int = 0) -> SizeLimits:
    """The limits of a run's steps; prompts have at least `shortest_prompt` tokens."""
    per_prompt = 2 if config.keep is rollout.one_pair else config.samples_per_prompt
    return SizeLimits(
        completions=per_prompt * config.prompts_per_step,
        sequence=config.max_prompt_tokens + config.sampling.max_tokens,
        completion=config.sampling.max_tokens,
        shortest_prompt=shortest_prompt,
    )
