"""The programs of a run, made from its config.

The loop runs these programs, `oreal plan` compiles the same ones ahead of time.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax.sharding import Mesh

from oreal_jax import model, trajectory
from oreal_jax.config import SftConfig, TrainConfig
from oreal_jax.data.packing import SizeLimits
from oreal_jax.errors import InputError
from oreal_jax.loading import compute_dtype
from oreal_jax.mesh import make_mesh
from oreal_jax.model import Distribution, ModelConfig
from oreal_jax.sampling import Engine, sampling_distribution
from oreal_jax.train.step import TrainStep, make_train_step
from oreal_jax.train_state import TrainedModels


def make_run_mesh(
    config: TrainConfig | SftConfig, shape: ModelConfig, devices: Sequence | None = None
) -> Mesh:
    """Return the mesh of a run.

    Raises:
        InputError: devices, model, rows and dtypes do not go together.
    """
    mesh = make_mesh(config.mesh, shape, devices)
    length, context = config.packing.row_length, mesh.shape["context"]
    if length % context:
        raise InputError(
            f"packing.row_length={length} is not divisible by mesh.context={context}"
        )
    is_float32 = compute_dtype(config.compute, mesh) == jnp.float32
    if is_float32 and config.gradient_sums != "float32":
        raise InputError(
            f"gradient_sums={config.gradient_sums!r} with compute={config.compute!r}, "
            "which is float32 here: it needs compute='bfloat16'"
        )
    return mesh


def make_trained_models(
    config: TrainConfig | SftConfig, shape: ModelConfig, mesh: Mesh, steps: int
) -> TrainedModels:
    """Return the models that a run trains."""
    rewards = config.token_reward if isinstance(config, TrainConfig) else None
    return TrainedModels.create(shape, config.policy, rewards, steps, mesh)


def make_run_step(
    config: TrainConfig | SftConfig,
    models: TrainedModels,
    mesh: Mesh,
    real_tokens: int = 0,
) -> TrainStep:
    """Return the training step of a run; `real_tokens` is as in `Engine`."""
    is_train = isinstance(config, TrainConfig)
    return make_train_step(
        models,
        config.loss,
        mesh,
        freeze_steps=config.freeze_steps if is_train else 0,
        dtype=compute_dtype(config.compute, mesh),
        distribution=loss_distribution(config, real_tokens)
        if is_train
        else model.full_softmax,
        remat=config.remat,
        gradient_sums=jnp.dtype(config.gradient_sums),
    )


def loss_distribution(config: TrainConfig, real_tokens: int) -> Distribution:
    """Return the distribution whose probabilities the loss is about."""
    if config.log_probs == "sampled":
        return sampling_distribution(config.sampling, real_tokens)
    return model.full_softmax


def make_engine(
    config: TrainConfig, build: Callable[..., Engine], longest_prompt: int
) -> Engine:
    """Return the engine of a run, for training and evaluation.

    `build` makes an engine with the options of this config. Prompts have at most
    `longest_prompt` tokens.

    Raises:
        InputError: the devices do not divide into engines, or a token of
            `config.sampling` is outside the vocabulary, or the longest completion
            exceeds the model or the cache.
    """
    engine = build(
        rows=config.decode_rows,
        cache_tokens=config.cache_tokens,
        weights=config.decode_weights,
        cache=config.decode_cache,
        tensor=config.decode_tensor,
        longest=(longest_prompt, config.sampling.max_tokens),
    )
    engine.check_sampling(config.sampling)
    engine.check_length(longest_prompt, config.sampling.max_tokens)
    return engine


def step_size_limits(config: TrainConfig, shortest_prompt: int = 0) -> SizeLimits:
    """Return limits of all steps; prompts have at least `shortest_prompt` tokens."""
    pairs = config.keep is trajectory.select_pair
    per_prompt = 2 if pairs else config.samples_per_prompt
    return SizeLimits(
        completions=per_prompt * config.prompts_per_step,
        sequence=config.max_prompt_tokens + config.sampling.max_tokens,
        completion=config.sampling.max_tokens,
        shortest_prompt=shortest_prompt,
    )
