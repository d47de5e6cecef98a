"""One update of the policy and of its token reward model, as one jitted program.

The models turn packed rows into per-token arrays, the losses turn those into scalars.
Micro-batches run in a loop whose length is data: gradients and metrics of the filled
ones are added up, and because losses divide by counts of the whole batch, the sum is
the gradient of the batch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from oreal_jax import model, sharding
from oreal_jax.data.packing import Batch
from oreal_jax.losses import (
    Counts,
    Metrics,
    PolicyLoss,
    Scored,
    TokenReward,
    token_mean,
)
from oreal_jax.model import ALONE, Execution, ModelConfig, Params
from oreal_jax.train.state import Learners, TrainState

Jitted = Any  # callable, with `lower`


class Scores(NamedTuple):
    """What the models said of every completion token in a step, for the record."""

    log_probs: Float[Array, "M N T"]
    entropy: Float[Array, "M N T"]
    token_scores: Float[Array, "M N T"]
    full_log_probs: Float[Array, "M N T"] | None = None  # see `Scored`


class TrainStep(NamedTuple):
    """The jitted `program(state, batch, frozen)`, and in how many steps the policy is
    frozen."""

    program: Any
    freeze_steps: int

    def __call__(
        self, state: TrainState, batch: Batch
    ) -> tuple[TrainState, Metrics, Scores]:
        """One training step; the state is donated."""
        return self.program(state, batch, int(state.step) < self.freeze_steps)


def micro(batch: Batch, index) -> Batch:
    """Micro-batch `index`: the same arrays without their leading axis."""
    take = lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return Batch(batch.filled, *(take(x) for x in batch[1:]))


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Puts a batch on the mesh."""
    return Batch(*map(sharding.put, batch, of_batch(mesh)))


def of_batch(mesh: Mesh) -> Batch:
    """Where a batch lies: rows split over the data axes and their tokens over context,
    the rest everywhere."""
    rows, whole = sharding.of_tokens(mesh, leading=1), sharding.replicated(mesh)
    split = {"tokens", "positions", "segments", "predicts", "targets"}
    return Batch(*(rows if name in split else whole for name in Batch._fields))


def completion_states(
    config: ModelConfig,
    params: Params,
    part: Batch,
    execution: Execution = ALONE,
) -> Float[Array, "R C D"]:
    """The hidden states that predict completion tokens, row by row."""
    states = model.hidden(
        config, params, part.tokens, part.positions, part.segments, execution
    )
    return jnp.take_along_axis(states, part.predicts[..., None], axis=1)


def unpack(values: Float[Array, "R C"], part: Batch) -> Float[Array, "N T"]:
    """One row per completion; 0 behind its end."""
    T = part.reference_log_probs.shape[-1]
    column = jnp.minimum(part.first[:, None] + jnp.arange(T)[None], values.shape[1] - 1)
    inside = jnp.arange(T)[None] < part.length[:, None]
    return jnp.where(inside, values[part.row[:, None], column], 0)


def completion_log_probs(
    config: ModelConfig,
    params: Params,
    part: Batch,
    distribution: model.Distribution = model.full,
    execution: Execution = ALONE,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"], Float[Array, "N T"] | None]:
    """Log-probability of every completion token, and the entropy at each; also the
    log-probabilities of the model's own distribution if `distribution` is another, by
    a second pass of the head."""
    states = completion_states(config, params, part, execution)

    def score(distribution: model.Distribution) -> list[Float[Array, "N T"]]:
        scores = model.log_probs(
            config, params, states, part.targets, distribution, execution
        )
        return [unpack(x, part) for x in scores]

    log_probs, entropy = score(distribution)
    full = None if distribution is model.full else score(model.full)[0]
    return log_probs, entropy, full


def reference_scorer(config: ModelConfig, mesh: Mesh, dtype) -> Jitted:
    """A jitted function of parameters and batch: the batch with the reference model's
    log-probabilities filled in."""
    execution = sharding.execution(mesh)

    def score(params: Params, batch: Batch) -> Batch:
        params = model.cast(params, dtype)

        def one(index, filled):
            values, *_ = completion_log_probs(
                config, params, micro(batch, index), execution=execution
            )
            return filled.at[index].set(values)

        start = jnp.zeros_like(batch.reference_log_probs)
        scores = jax.lax.fori_loop(0, batch.filled, one, start)
        return batch._replace(reference_log_probs=scores)

    return jax.jit(model.exact(score, dtype), out_shardings=of_batch(mesh))


def train_step(
    learners: Learners,
    loss: PolicyLoss,
    mesh: Mesh,
    *,
    freeze_steps: int = 0,
    dtype: Any = jnp.float32,
    distribution: model.Distribution = model.full,
    remat: model.Remat = "everything",
    gradient_sums: Any = jnp.float32,
) -> TrainStep:
    """The jitted training step.

    During the first `freeze_steps` steps only the token reward model learns (its head
    starts at zero, which weighs every token 0). `distribution` says which of the
    policy's probabilities the loss is about, `remat` what the backward pass computes
    again, `gradient_sums` the dtype in which the gradients of the layers' matrices are
    summed over the devices (all others and the sums over micro-batches: float32).
    """
    policy, rewarder = learners
    # The gradient of a weight is summed in the dtype that the model is given it in.
    given = functools.partial(model.cast_matrices, dtype=gradient_sums)
    execution = sharding.execution(mesh, remat, dtype)

    def scored(part: Batch, log_probs, entropy, token_scores, full=None) -> Scored:
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

    def reward_objective(params, config: ModelConfig, part: Batch, counts: Counts):
        """Loss of the token reward model; metrics and token scores."""
        states = completion_states(config, given(config, params), part, execution)
        token_scores = unpack(model.token_scores(params, states), part)
        blank = jnp.zeros_like(token_scores)
        of_part = scored(part, blank, blank, token_scores)
        with jax.named_scope("loss"):
            total, metrics = TokenReward()(of_part, counts)
        return total, (metrics, token_scores)

    def policy_objective(params, part: Batch, counts: Counts, token_scores):
        """Loss of the policy; metrics and scores. Token scores are constants to it."""
        log_probs, entropy, full = completion_log_probs(
            policy.config,
            given(policy.config, params),
            part,
            distribution,
            execution,
        )
        of_part = scored(part, log_probs, entropy, token_scores, full)
        with jax.named_scope("loss"):
            total, metrics = loss(of_part, counts)
        mean_entropy = token_mean(entropy, of_part.completion, counts.all)
        metrics |= {"actor/loss": total, "actor/entropy": mean_entropy}
        return total, (metrics, Scores(log_probs, entropy, token_scores, full))

    def gradients(params, part: Batch, counts: Counts, frozen: bool):
        """Of the policy (None if frozen) and of the token reward model (None without);
        metrics and scores."""
        policy_params, reward_params = params
        metrics, reward_gradient = {}, None
        token_scores = jnp.zeros_like(part.reference_log_probs)
        if rewarder:
            reward_gradient, (metrics, token_scores) = jax.grad(
                reward_objective, has_aux=True
            )(reward_params, rewarder.config, part, counts)
            # One after the other: only one model's activations are in memory.
            policy_params, reward_gradient = jax.lax.optimization_barrier(
                (policy_params, reward_gradient)
            )
        of_policy = (policy_params, part, counts, token_scores)
        if frozen:
            gradient, (_, (more, scores)) = None, policy_objective(*of_policy)
        else:
            objective = jax.grad(policy_objective, has_aux=True)
            gradient, (more, scores) = objective(*of_policy)
        return (gradient, reward_gradient), metrics | more, scores

    def accumulate(params, batch: Batch, frozen: bool):
        """Gradient and metrics summed over the filled micro-batches, scores of each."""
        counts = Counts.of(batch.completion(), batch.correct)

        def one(part):
            return gradients(params, part, counts, frozen)

        gradient, metrics, scores = jax.eval_shape(one, micro(batch, 0))
        empty = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
        blank = jnp.zeros_like(batch.reference_log_probs)

        def add(index, total):
            gradient, metrics, scores = one(micro(batch, index))
            sums, record = total
            sums = jax.tree.map(jnp.add, sums, (gradient, metrics))
            put = lambda whole, part: whole.at[index].set(part)
            return sums, jax.tree.map(put, record, scores)

        start = (empty((gradient, metrics)), jax.tree.map(lambda _: blank, scores))
        (gradient, metrics), scores = jax.lax.fori_loop(0, batch.filled, add, start)
        return gradient, metrics, scores

    def step(state: TrainState, batch: Batch, frozen: bool):
        reward_params = state.token_reward and state.token_reward.params
        params = (state.policy.params, reward_params)
        (policy_gradient, reward_gradient), metrics, scores = accumulate(
            params, batch, frozen
        )
        metrics |= {
            "actor/grad_norm": optax.tree.norm(policy_gradient),
            "actor/lr": policy.rate(state.step),
        }
        if not frozen:
            state = state._replace(
                policy=policy.update(state.policy, policy_gradient, state.step)
            )
        if rewarder and state.token_reward:
            metrics |= {
                "token_reward/grad_norm": optax.tree.norm(reward_gradient),
                "token_reward/lr": rewarder.rate(state.step),
            }
            state = state._replace(
                token_reward=rewarder.update(
                    state.token_reward, reward_gradient, state.step
                )
            )
        return state._replace(step=state.step + 1), metrics, scores

    whole = sharding.replicated(mesh)
    program = jax.jit(
        model.exact(step, dtype),
        static_argnums=2,
        donate_argnums=0,
        out_shardings=(learners.shardings(mesh), whole, whole),
    )
    return TrainStep(program, freeze_steps)
