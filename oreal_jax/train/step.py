"""One update of the policy and of its token reward model, as one jitted program.

The models turn packed rows into per-token arrays, the losses turn those into scalars.
Micro-batches run in a loop whose length is data: gradients and metrics of the filled
ones are summed. Losses divide by counts of the whole batch, so the sum is the gradient
of the batch. The backward pass adds each layer's gradient to the sum in place.
"""

import functools
from collections.abc import Callable
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
    vocabulary, or as sampled.
    """

    loss: PolicyLoss
    distribution: model.Distribution
    execution: Execution


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
    starts at zero, which gives every token the weight 0). `distribution`: see
    `Objective`; `remat`, `dtype`, `gradient_sums`: see `Execution`.
    """
    execution = model_parallel.make_execution(mesh, remat, dtype, gradient_sums)
    objective = Objective(loss, distribution, execution)
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
    """Sums of gradients by model; None where a model is frozen or absent."""

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
    jitted = jax.jit(functools.partial(add_micro_batch, models, objective))
    add_gradients = functools.partial(
        jitted, state.policy.params, reward_params, counts
    )
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
    start = Gradients(
        zeros(None if frozen else state.policy.params), zeros(reward_params)
    )
    _, metrics, scores = jax.eval_shape(add_gradients, micro_batch(batch, 0), start)
    blank = jnp.zeros_like(batch.reference_log_probs)

    def add(index, total):
        gradients, sums, record = total
        gradients, metrics, scores = add_gradients(micro_batch(batch, index), gradients)
        put = lambda array, part: array.at[index].set(part)
        return (
            gradients,
            jax.tree.map(jnp.add, sums, metrics),
            jax.tree.map(put, record, scores),
        )

    total = (start, zeros(metrics), jax.tree.map(lambda _: blank, scores))
    return jax.lax.fori_loop(0, batch.filled, add, total)


def add_micro_batch(
    models: TrainedModels,
    objective: Objective,
    policy_params: Params,
    reward_params: Params | None,
    counts: Counts,
    part: Batch,
    gradients: Gradients,
) -> tuple[Gradients, Metrics, Scores]:
    """Return `gradients` plus those of a micro-batch, its metrics and scores.

    First the token reward model, whose scores weight the tokens of the policy's loss
    and are constants to it.
    """
    metrics, reward_sum = {}, None
    token_scores = jnp.zeros_like(part.reference_log_probs)
    if models.token_reward and reward_params:
        loss = functools.partial(
            token_reward_loss, models.token_reward.config, objective, part, counts
        )
        reward_sum, (metrics, token_scores) = add_gradient(
            loss, reward_params, gradients.token_reward
        )
        # One after the other: only one model's activations are in memory.
        policy_params, reward_sum = jax.lax.optimization_barrier(
            (policy_params, reward_sum)
        )
    loss = functools.partial(
        policy_loss, models.policy.config, objective, part, counts, token_scores
    )
    if gradients.policy is None:
        policy_sum, (_, (more, scores)) = None, loss(policy_params)
    else:
        policy_sum, (more, scores) = add_gradient(loss, policy_params, gradients.policy)
    return Gradients(policy_sum, reward_sum), metrics | more, scores


def add_gradient(
    loss: Callable[[Params], tuple[Array, Any]], params: Params, gradient: Params
) -> tuple[Params, Any]:
    """Return `gradient` plus that of `loss(params)`; and the loss's second result.

    The backward pass gets the sum as mutable references, and each layer adds to its own
    slice. Apart from the sum, only the gradients of one layer, the embedding and the
    head are in memory.
    """
    pull_back: Any  # `with_refs` is missing in the declared type
    value, pull_back, extra = jax.vjp(loss, params, has_aux=True)
    total = jax.tree.map(jax.new_ref, gradient)
    pull_back.with_refs(total)(jnp.ones_like(value))
    return jax.tree.map(jax.freeze, total), extra


def token_reward_loss(
    config: ModelConfig,
    objective: Objective,
    part: Batch,
    counts: Counts,
    params: Params,
) -> tuple[Array, tuple[Metrics, Array]]:
    """Return the token reward model's loss (equation 12); metrics and token scores."""
    states = completion_states(config, params, part, objective.execution)
    token_scores = unpack(model.token_scores(params, states), part)
    blank = jnp.zeros_like(token_scores)
    scored = loss_inputs(part, blank, blank, token_scores)
    with jax.named_scope("loss"):
        total, metrics = TokenReward()(scored, counts)
    return total, (metrics, token_scores)


def policy_loss(
    config: ModelConfig,
    objective: Objective,
    part: Batch,
    counts: Counts,
    token_scores: Float[Array, "N T"],
    params: Params,
) -> tuple[Array, tuple[Metrics, Scores]]:
    """Return the policy's loss; metrics and scores."""
    log_probs, entropy, full = completion_log_probs(
        config,
        params,
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
