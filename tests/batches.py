"""Random batches of many kinds, and losses evaluated on them."""

import jax
import jax.numpy as jnp
import numpy as np
from reference import Batch

from oreal_jax.losses import Counts, Scored, outcome

N, K, T = 2, 4, 7


def random_batch(seed: int = 0, rewards=None, lengths=None) -> Batch:
    """Completions of two prompts, of all lengths, a little off-policy."""
    random = np.random.default_rng(seed)
    normal = lambda mean, spread: random.normal(mean, spread, (N * K, T))
    log_probs = -np.abs(normal(2, 1))
    if lengths is None:
        lengths = [T, 1, 0, 4, 2, T, 3, 5]
    if rewards is None:
        rewards = [[1, -1, 1, -1], [-1, 1, -1, -1]]
    return Batch(
        log_probs=log_probs,
        old_log_probs=log_probs + normal(0, 0.6),
        reference_log_probs=log_probs + normal(0, 0.5),
        token_scores=normal(0, 2),
        entropy=np.abs(normal(1, 0.5)),
        completion=np.arange(T)[None] < np.array(lengths)[:, None],
        rewards=np.array(rewards, float),
    )


def batches() -> dict[str, Batch]:
    """Return a batch of each kind."""
    mixed, random = random_batch(), np.random.default_rng(1)
    ones = np.ones((N, K))
    far = random.choice([-40.0, -21.0, -3.0, 3.0, 19.0, 21.0, 40.0], (2, N * K, T))
    return {
        "mixed": mixed,
        "another": random_batch(2),
        "with_holes": mixed._replace(completion=random.random((N * K, T)) < 0.6),
        "on_policy": mixed._replace(old_log_probs=mixed.log_probs),
        "far_from_the_others": mixed._replace(
            old_log_probs=mixed.log_probs + far[0],
            reference_log_probs=mixed.log_probs + far[1],
        ),
        "no_scores": mixed._replace(token_scores=np.zeros((N * K, T))),
        "equal_scores": mixed._replace(token_scores=np.full((N * K, T), 0.7)),
        "all_correct": random_batch(3, rewards=ones),
        "all_incorrect": random_batch(4, rewards=-ones),
        "one_correct_token": random_batch(5, lengths=[1] + [0] * 7),
        "one_incorrect_token": random_batch(6, lengths=[0, 1] + [0] * 6),
        "empty": random_batch(7, lengths=[0] * 8),
    }


BATCHES = batches()


def close(ours, theirs, rtol=1e-9, scale=0.0):
    """Equal up to a relative error, of each entry or of the array's scale."""
    atol = scale * float(np.max(np.abs(theirs))) or 1e-12
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)


def count(scored: Scored) -> Counts:
    return Counts.of(scored.completion, scored.correct)


def as_scored(batch: Batch, advantage=outcome) -> Scored:
    """Return a batch as `Scored`, not yet masked."""
    fields = {
        name: jnp.asarray(values)
        for name, values in batch._asdict().items()
        if name != "rewards"
    }
    return Scored(
        **fields,
        correct=jnp.asarray(batch.rewards.reshape(-1) > 0),
        advantage=jnp.asarray(advantage(batch.rewards).reshape(-1)),
    )


def evaluate(loss, scored: Scored, name: str = "log_probs"):
    """Loss and metrics, and the gradient with respect to the field `name`."""
    value = lambda x: loss(scored._replace(**{name: x}).masked(), count(scored))
    (total, metrics), gradient = jax.value_and_grad(value, has_aux=True)(
        getattr(scored, name)
    )
    return total, metrics, gradient
