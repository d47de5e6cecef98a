"""What training carries from step to step, and where it lies on the mesh."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

from oreal_jax import model, sharding
from oreal_jax.errors import InputError
from oreal_jax.model import ModelConfig, Params


class ModelState(NamedTuple):
    """One trained model: float32 master weights and optimizer state."""

    params: Params
    optimizer: optax.OptState


class TrainState(NamedTuple):
    """Everything a training step changes. `token_reward` is None where not trained."""

    step: Int[Array, ""]
    policy: ModelState
    token_reward: ModelState | None


def _require(name: str, value: float | int, fits: Callable, what: str) -> None:
    if not fits(value):
        raise InputError(f"optimizer: {name}={value} must be {what}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW under a linear warm-up and a cosine decay, counted in training steps.

    The rate is 0 at step 0, `learning_rate` after `warmup_steps`, and reaches
    `final_learning_rate` at the run's last step. `momentum` is the type of the first
    moment; the second needs float32's range. `offload` keeps both in the host's memory
    between steps.
    """

    learning_rate: float
    final_learning_rate: float
    warmup_steps: int = 10
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.999
    momentum: Literal["float32", "bfloat16"] = "float32"
    offload: bool = False

    def __post_init__(self):
        """Raises InputError where a number is out of range."""
        for name in ("learning_rate", "final_learning_rate", "warmup_steps"):
            _require(name, getattr(self, name), lambda x: x >= 0, "at least 0")
        _require("weight_decay", self.weight_decay, lambda x: x >= 0, "at least 0")
        _require("clip_norm", self.clip_norm, lambda x: x > 0, "above 0")
        for name in ("beta1", "beta2"):
            what = "at least 0 and below 1"
            _require(name, getattr(self, name), lambda x: 0 <= x < 1, what)

    def transformation(self) -> optax.GradientTransformation:
        """The update direction; the caller multiplies by the rate of the step."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.scale_by_adam(self.beta1, self.beta2, mu_dtype=self.momentum),
            optax.add_decayed_weights(self.weight_decay),
        )

    def rate(self, steps: int) -> optax.Schedule:
        """Learning rate as a function of the step, for a run of `steps` steps."""
        return optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=self.learning_rate,
            warmup_steps=self.warmup_steps,
            decay_steps=max(steps, self.warmup_steps + 1),
            end_value=self.final_learning_rate,
        )


class Trained(NamedTuple):
    """How one model is trained: shape, optimizer, rate, and where its numbers lie;
    `at_work` is where an offloaded optimizer's lie during an update."""

    config: ModelConfig
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    shardings: ModelState
    at_work: Any

    @classmethod
    def of(
        cls, config: ModelConfig, optimizer: Optimizer, steps: int, mesh: Mesh
    ) -> "Trained":
        """Binds a model and its optimizer to a mesh."""
        transformation = optimizer.transformation()
        params = sharding.of_params(config, mesh)
        moments = sharding.of_optimizer(
            transformation, model.abstract(config), params, mesh
        )
        stored = sharding.on_host(moments) if optimizer.offload else moments
        return cls(
            config,
            transformation,
            optimizer.rate(steps),
            ModelState(params, stored),
            moments if optimizer.offload else None,
        )

    def start(self, params: Params) -> ModelState:
        """The state before the first update (call under jit)."""
        return ModelState(params, self.optimizer.init(params))

    def update(
        self, state: ModelState, gradient: Params, step: Int[Array, ""]
    ) -> ModelState:
        """Take one optimizer step at the rate of training step `step`."""
        params, moments = state
        if self.at_work is not None:
            moments = jax.device_put(moments, self.at_work)
        with jax.named_scope("optimizer"):
            direction, moments = self.optimizer.update(gradient, moments, params)
            rate = self.rate(step)
            move = lambda weight, change: weight - rate * change
            return ModelState(jax.tree.map(move, params, direction), moments)


class Learners(NamedTuple):
    """The models under training; `token_reward` is None without token rewards."""

    policy: Trained
    token_reward: Trained | None

    def shardings(self, mesh: Mesh) -> TrainState:
        """The sharding of every leaf of the training state."""
        step: Any = sharding.replicated(mesh)
        return TrainState(
            step,
            self.policy.shardings,
            self.token_reward and self.token_reward.shardings,
        )

    def abstract(self, mesh: Mesh) -> TrainState:
        """Shapes, types and shardings of the training state, without its numbers."""
        shapes = jax.eval_shape(self._start, model.abstract(self.policy.config))
        return sharding.placed(shapes, self.shardings(mesh))

    def start(self, params: Params, mesh: Mesh) -> TrainState:
        """The state at step 0: the policy, and a token reward model with its body."""
        return self.starter(mesh)(params)

    def starter(self, mesh: Mesh):
        """`start` as a jitted function of the parameters."""
        return jax.jit(self._start, out_shardings=self.shardings(mesh))

    def _start(self, params: Params) -> TrainState:
        # Copies: jit would hand its input on, and the two models share no buffer.
        copy = lambda params: jax.tree.map(jnp.copy, params)
        scores = None
        if self.token_reward:
            body = model.token_reward_params(params)
            scores = self.token_reward.start(copy(body))
        return TrainState(
            jnp.zeros((), jnp.int32), self.policy.start(copy(params)), scores
        )


def learners(
    config: ModelConfig,
    policy: Optimizer,
    token_reward: Optimizer | None,
    steps: int,
    mesh: Mesh,
) -> Learners:
    """The policy and, where asked for, the token reward model of its architecture."""
    scoring = dataclasses.replace(config, head="score")
    return Learners(
        Trained.of(config, policy, steps, mesh),
        token_reward and Trained.of(scoring, token_reward, steps, mesh),
    )
