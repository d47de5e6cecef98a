"""One update of the policy and of its token reward model, as one jitted program.

The models turn packed rows into per-token arrays, the losses turn those into scalars.
Micro-batches run in a loop whose length is data: gradients and metrics of the filled
ones are summed. Losses divide by counts of the whole batch, so the sum is the gradient
of the batch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from oreal_jax import model, model_parallel, sharding
from oreal_jax.data.packing import Batch
from oreal_jax.losses import (
    Counts,
    Metrics,
    PolicyLoss,
    Scored,
    TokenReward,
    token_mean,
)
from oreal_jax.model import Execution, ModelConfig, Params
from oreal_jax.train.scoring import (
    Jitted,
    completion_log_probs,
    completion_states,
    micro_batch,
    unpack,
)
from oreal_jax.train_state import TrainedModels, TrainState


class Scores(NamedTuple):
    """Model outputs for every completion token of a step."""

    log_probs: Float[Array, "M N T"]
    entropy: Float[Array, "M N T"]
    token_scores: Float[Array, "M N T"]
    full_log_probs: Float[Array, "M N T"] | None = None  # see `Scored`


class Objective(NamedTuple):
    """The loss, and how the models compute it.

    `distribution` gives the log-probabilities that the loss reads: of the whole
    vocabulary, or as sampled. `gradient_sums` is the dtype for sums of the layers'
    matrix gradients over devices; all other sums are float32.
    """

    loss: PolicyLoss
    distribution: model.Distribution
    execution: Execution
    gradient_sums: Any

    def cast(self, config: ModelConfig, params: Params) -> Params:
        """Cast the matrices to the dtype in which their gradients are summed."""
        return model.cast_matrices(config, params, dtype=self.gradient_sums)


class TrainStep(NamedTuple):
    """The jitted `program(state, batch, frozen)`.

    The policy is frozen in the first `freeze_steps` steps.
    """

    program: Jitted
    freeze_steps: int

    def __call__(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, Metrics, Scores]:
        """Take one training step; the state is donated."""
        return self.program(state, batch, int(state.step) < self.freeze_steps)


def make_train_step(
    models: TrainedModels,
    loss: PolicyLoss,
    mesh: Mesh,
    *,
    freeze_steps: int = 0,
    dtype: Any = jnp.float32,
    distribution: model.Distribution = model.full_softmax,
    remat: model.Remat = "everything",
    gradient_sums: Any = jnp.float32,
) -> TrainStep:
    """Return the jitted training step.

    During the first `freeze_steps` steps only the token reward model learns (its head
    starts at zero, which gives every token the weight 0). `remat` is what the
    backward pass recomputes; for the other options see `Objective`.
    """
    execution = model_parallel.make_execution(mesh, remat, dtype)
    objective = Objective(loss, distribution, execution, gradient_sums)
    replicated = sharding.replicated(mesh)

    def step(state: TrainState, batch: Batch, frozen: bool):
        return update(models, objective, state, batch, frozen)

    program = jax.jit(
        model.exact_matmuls(step, dtype),
        static_argnums=2,
        donate_argnums=0,
        out_shardings=(models.shardings(mesh), replicated, replicated),
    )
    return TrainStep(program, freeze_steps)


def update(
    models: TrainedModels,
    objective: Objective,
    state: TrainState,
    batch: Batch,
    frozen: bool,
) -> tuple[TrainState, Metrics, Scores]:
    """Update both models by the gradients of a batch, the policy unless `frozen`."""
    gradients, metrics, scores = accumulate(models, objective, state, batch, frozen)
    policy, token_reward = state.policy, state.token_reward
    metrics |= {
        "actor/grad_norm": optax.tree.norm(gradients.policy),
        "actor/lr": jnp.asarray(models.policy.rate(state.step)),
    }
    if not frozen:
        policy = models.policy.update(policy, gradients.policy, state.step)
    if models.token_reward and token_reward:
        metrics |= {
            "token_reward/grad_norm": optax.tree.norm(gradients.token_reward),
            "token_reward/lr": jnp.asarray(models.token_reward.rate(state.step)),
        }
        token_reward = models.token_reward.update(
            token_reward, gradients.token_reward, state.step
        )
    return TrainState(state.step + 1, policy, token_reward), metrics, scores


class Gradients(NamedTuple):
    """Gradients by model; None where a model is frozen or absent."""

    policy: Params | None
    token_reward: Params | None


def accumulate(
    models: TrainedModels,
    objective: Objective,
    state: TrainState,
    batch: Batch,
    frozen: bool,
) -> tuple[Gradients, Metrics, Scores]:
    """Sum gradients and metrics over the filled micro-batches; collect the scores."""
    counts = Counts.of(batch.completion(), batch.correct)
    reward_params = state.token_reward and state.token_reward.params
    # Used twice, and by jit traced only once.
    jitted = jax.jit(
        functools.partial(micro_batch_gradients, models, objective, frozen=frozen)
    )
    compute_gradients = functools.partial(
        jitted, state.policy.params, reward_params, counts
    )
    shapes, metrics, scores = jax.eval_shape(compute_gradients, micro_batch(batch, 0))
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    blank = jnp.zeros_like(batch.reference_log_probs)

    def add(index, total):
        gradients, metrics, scores = compute_gradients(micro_batch(batch, index))
        sums, record = total
        sums = jax.tree.map(jnp.add, sums, (gradients, metrics))
        put = lambda array, part: array.at[index].set(part)
        return sums, jax.tree.map(put, record, scores)

    start = (zeros((shapes, metrics)), jax.tree.map(lambda _: blank, scores))
    (gradients, metrics), scores = jax.lax.fori_loop(0, batch.filled, add, start)
    return gradients, metrics, scores


def micro_batch_gradients(
    models: TrainedModels,
    objective: Objective,
    policy_params: Params,
    reward_params: Params | None,
    counts: Counts,
    part: Batch,
    *,
    frozen: bool,
) -> tuple[Gradients, Metrics, Scores]:
    """Return gradients, metrics and scores of one micro-batch.

    First the token reward model, whose scores weight the tokens of the policy's loss
    and are constants to it.
    """
    metrics, reward_gradient = {}, None
    token_scores = jnp.zeros_like(part.reference_log_probs)
    if models.token_reward and reward_params:
        reward_gradient, (metrics, token_scores) = jax.grad(
            token_reward_loss, has_aux=True
        )(
            reward_params,
            models.token_reward.config,
            objective,
            part,
            counts,
        )
        # One after the other: only one model's activations are in memory.
        policy_params, reward_gradient = jax.lax.optimization_barrier(
            (policy_params, reward_gradient)
        )
    arguments = (
        policy_params,
        models.policy.config,
        objective,
        part,
        counts,
        token_scores,
    )
    if frozen:
        policy_gradient, (_, (more, scores)) = None, policy_loss(*arguments)
    else:
        gradient = jax.grad(policy_loss, has_aux=True)
        policy_gradient, (more, scores) = gradient(*arguments)
    return Gradients(policy_gradient, reward_gradient), metrics | more, scores


def token_reward_loss(
    params: Params,
    config: ModelConfig,
    objective: Objective,
    part: Batch,
    counts: Counts,
) -> tuple[Array, tuple[Metrics, Array]]:
    """Return the token reward model's loss (equation 12); metrics and token scores."""
    params = objective.cast(config, params)
    states = completion_states(config, params, part, objective.execution)
    token_scores = unpack(model.token_scores(params, states), part)
    blank = jnp.zeros_like(token_scores)
    scored = loss_inputs(part, blank, blank, token_scores)
    with jax.named_scope("loss"):
        total, metrics = TokenReward()(scored, counts)
    return total, (metrics, token_scores)


def policy_loss(
    params: Params,
    config: ModelConfig,
    objective: Objective,
    part: Batch,
    counts: Counts,
    token_scores: Float[Array, "N T"],
) -> tuple[Array, tuple[Metrics, Scores]]:
    """Return the policy's loss; metrics and scores."""
    log_probs, entropy, full = completion_log_probs(
        config,
        objective.cast(config, params),
        part,
        objective.distribution,
        objective.execution,
    )
    scored = loss_inputs(part, log_probs, entropy, token_scores, full)
    with jax.named_scope("loss"):
        total, metrics = objective.loss(scored, counts)
    mean_entropy = token_mean(entropy, scored.completion, counts.all)
    metrics |= {"actor/loss": total, "actor/entropy": mean_entropy}
    return total, (metrics, Scores(log_probs, entropy, token_scores, full))


def loss_inputs(part: Batch, log_probs, entropy, token_scores, full=None) -> Scored:
    """Return the per-token arrays that a loss is a function of, masked."""
    return Scored(
        log_probs=log_probs,
        old_log_probs=part.old_log_probs,
        reference_log_probs=part.reference_log_probs,
        token_scores=token_scores,
        entropy=entropy,
        completion=jnp.arange(log_probs.shape[1])[None] < part.length[:, None],
        correct=part.correct,
        advantage=part.advantage,
        full_log_probs=full,
    ).masked()
