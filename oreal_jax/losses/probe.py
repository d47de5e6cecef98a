"""What a loss depends on, found by evaluating it: true of anybody's loss.

A probe is a small batch of random numbers. A field that a run cannot provide is 0
there, and a loss that reads it would silently learn something else, or nothing.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oreal_jax.losses.scored import Counts, PolicyLoss, Scored

LENGTHS = (5, 3, 4)  # tokens of the completions, in turn


def fields_read(loss: PolicyLoss, *names: str) -> list[str]:
    """The fields of `Scored`, among `names`, that change the loss or its gradient where
    every completion is correct with advantage 1, as in SFT."""
    scored = _random(np.ones((1, len(LENGTHS))), seed=0)
    other = _random(np.ones((1, len(LENGTHS))), seed=1)
    evaluate = jax.jit(lambda scored: _evaluate(loss, scored))
    expected = evaluate(scored)

    def differs(name: str) -> bool:
        values = evaluate(scored._replace(**{name: getattr(other, name)}))
        same = lambda a, b: np.array_equal(a, b, equal_nan=True)
        return not all(map(same, jax.tree.leaves(values), jax.tree.leaves(expected)))

    return [name for name in names if differs(name)]


def has_gradient(loss: PolicyLoss, samples: int, *, token_scores: bool) -> bool:
    """Whether any token of a prompt's `samples` completions, half of them correct, has
    a gradient while the policy still is the reference model. Without `token_scores`
    they are 0."""
    rewards = np.where(np.arange(samples) % 2, -1.0, 1.0)[None]
    scored = _random(rewards, seed=0)
    scored = scored._replace(
        old_log_probs=scored.log_probs,
        reference_log_probs=scored.log_probs,
        advantage=jnp.asarray(loss.advantage(rewards)[0], jnp.float32),
    )
    if not token_scores:
        scored = scored._replace(token_scores=jnp.zeros_like(scored.token_scores))
    _, gradient = jax.jit(lambda scored: _evaluate(loss, scored))(scored)
    return any(np.any(np.asarray(part) != 0) for part in gradient)


def _evaluate(
    loss: PolicyLoss, scored: Scored
) -> tuple[Float[Array, ""], tuple[Float[Array, "B T"], Float[Array, "B T"]]]:
    """The loss, and its gradient in what the policy computes."""

    def total(log_probs, entropy):
        own = scored._replace(log_probs=log_probs, entropy=entropy)
        return loss(own, Counts.of(scored.completion, scored.correct))[0]

    return jax.value_and_grad(total, argnums=(0, 1))(scored.log_probs, scored.entropy)


def _random(rewards: Float[np.ndarray, "1 K"], seed: int) -> Scored:
    """Completions with these rewards and advantage 1."""
    count, longest = rewards.size, max(LENGTHS)
    draw = np.random.default_rng(seed)
    normal = lambda: jnp.asarray(draw.normal(0, 1, (count, longest)), jnp.float32)
    length = np.resize(LENGTHS, count)
    return Scored(
        log_probs=-jnp.abs(normal()),
        old_log_probs=-jnp.abs(normal()),
        reference_log_probs=-jnp.abs(normal()),
        token_scores=2 * normal(),
        entropy=jnp.abs(normal()),
        completion=jnp.arange(longest)[None] < length[:, None],
        correct=jnp.asarray(rewards[0] > 0),
        advantage=jnp.ones(count),
    )
