"""What training carries from step to step, and how it is sharded."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from oreal_jax import model, sharding
from oreal_jax.model import ModelConfig, Params
from oreal_jax.optimizer import Optimizer


class ModelState(NamedTuple):
    """One trained model: float32 master weights and optimizer state."""

    params: Params
    optimizer: optax.OptState


class TrainState(NamedTuple):
    """Everything a training step changes. `token_reward` is None where not trained."""

    step: Int[Array, ""]
    policy: ModelState
    token_reward: ModelState | None


class TrainedModel(NamedTuple):
    """How one model is trained: shape, optimizer, learning rate and shardings.

    `update_shardings` are those of an offloaded optimizer state during an update, None
    without offloading.
    """

    config: ModelConfig
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    shardings: ModelState
    update_shardings: Any

    @classmethod
    def create(
        cls, config: ModelConfig, optimizer: Optimizer, steps: int, mesh: Mesh
    ) -> "TrainedModel":
        """Bind a model and its optimizer to a mesh, for a run of `steps` steps."""
        transformation = optimizer.transformation()
        params = sharding.param_shardings(config, mesh)
        moments = sharding.optimizer_shardings(
            transformation, model.abstract(config), params, mesh
        )
        stored = sharding.in_host_memory(moments) if optimizer.offload else moments
        return cls(
            config,
            transformation,
            optimizer.rate(steps),
            ModelState(params, stored),
            moments if optimizer.offload else None,
        )

    def initialize(self, params: Params) -> ModelState:
        """Return the state before the first update (call under jit)."""
        return ModelState(params, self.optimizer.init(params))

    def update(
        self, state: ModelState, gradient: Params, step: Int[Array, ""]
    ) -> ModelState:
        """Take one optimizer step at the learning rate of training step `step`."""
        params, moments = state
        if self.update_shardings is not None:
            moments = jax.device_put(moments, self.update_shardings)
        with jax.named_scope("optimizer"):
            direction, moments = self.optimizer.update(gradient, moments, params)
            rate = self.rate(step)
            move = lambda weight, change: weight - rate * change
            return ModelState(jax.tree.map(move, params, direction), moments)


class TrainedModels(NamedTuple):
    """The models under training; `token_reward` is None without token rewards."""

    policy: TrainedModel
    token_reward: TrainedModel | None

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        policy: Optimizer,
        token_reward: Optimizer | None,
        steps: int,
        mesh: Mesh,
    ) -> "TrainedModels":
        """The policy and, with an optimizer for it, a token reward model alike."""
        scoring = dataclasses.replace(config, head="score")
        return cls(
            TrainedModel.create(config, policy, steps, mesh),
            token_reward and TrainedModel.create(scoring, token_reward, steps, mesh),
        )

    def shardings(self, mesh: Mesh) -> TrainState:
        """Return the sharding of every leaf of the training state."""
        step: Any = sharding.replicated(mesh)
        return TrainState(
            step,
            self.policy.shardings,
            self.token_reward and self.token_reward.shardings,
        )

    def abstract(self, mesh: Mesh) -> TrainState:
        """Return shapes, dtypes and shardings of the training state."""
        shapes = jax.eval_shape(self._initialize, model.abstract(self.policy.config))
        return sharding.with_shardings(shapes, self.shardings(mesh))

    def initializer(self, mesh: Mesh):
        """Return a jitted function from parameters to the state at step 0: the policy,
        and a token reward model that begins with the policy's layers."""
        return jax.jit(self._initialize, out_shardings=self.shardings(mesh))

    def _initialize(self, params: Params) -> TrainState:
        # jit would return its input, and the two models must not share buffers.
        copy = lambda params: jax.tree.map(jnp.copy, params)
        token_reward = None
        if self.token_reward:
            layers = model.token_reward_params(params)
            token_reward = self.token_reward.initialize(copy(layers))
        return TrainState(
            jnp.zeros((), jnp.int32), self.policy.initialize(copy(params)), token_reward
        )
