"""Inputs that a loss depends on, determined by evaluating it: for any user's loss.

A probe is a small batch of random numbers. A field that a run cannot provide is 0 in
`Scored`; a loss that reads it would train something else, or nothing, without notice.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from oreal_jax.errors import InputError, summarize
from oreal_jax.losses.scored import Counts, PerToken, PolicyLoss, Scalar, Scored

LENGTHS = (5, 3, 4)  # tokens of the completions, in turn


def fields_read(loss: PolicyLoss, *names: str) -> list[str]:
    """Return the fields of `Scored`, among `names`, that change a loss or its gradient.

    All completions are correct with advantage 1, as in SFT.

    Raises:
        InputError: the loss fails.
    """
    scored, other = (_random(np.ones((1, len(LENGTHS))), seed) for seed in (0, 1))
    evaluate = jax.jit(lambda scored: _evaluate(loss, scored))
    expected = jax.tree.leaves(evaluate(scored))

    def differs(name: str) -> bool:
        values = evaluate(scored._replace(**{name: getattr(other, name)}))
        same = lambda a, b: np.array_equal(a, b, equal_nan=True)
        return not all(map(same, jax.tree.leaves(values), expected))

    return [name for name in names if differs(name)]


def has_gradient(loss: PolicyLoss, group_size: int, *, token_scores: bool) -> bool:
    """Return whether a token has a gradient while the policy is the reference.

    Half of the group is correct. Without `token_scores`, they are 0.

    Raises:
        InputError: the loss fails.
    """
    rewards = np.where(np.arange(group_size) % 2, -1.0, 1.0)[None]
    with _locate_errors(loss):
        advantage = jnp.asarray(loss.advantage(rewards)[0], jnp.float32)
    scored = _random(rewards, seed=0)
    scored = scored._replace(
        old_log_probs=scored.log_probs,
        reference_log_probs=scored.log_probs,
        token_scores=scored.token_scores * token_scores,
        advantage=advantage,
    )
    _, gradient = jax.jit(lambda scored: _evaluate(loss, scored))(scored)
    return any(np.any(np.asarray(part) != 0) for part in gradient)


def _evaluate(
    loss: PolicyLoss, scored: Scored
) -> tuple[Scalar, tuple[PerToken, PerToken]]:
    """Return the loss, and its gradient with respect to the policy's outputs."""

    def total(log_probs, entropy):
        own = scored._replace(log_probs=log_probs, entropy=entropy).masked()
        with _locate_errors(loss):
            value, metrics = loss(own, Counts.of(scored.completion, scored.correct))
            for name, array in {"the loss": value, **metrics}.items():
                if jnp.shape(array):
                    shape = jnp.shape(array)
                    raise TypeError(f"{name} has shape {shape}, expected a scalar")
        return value

    return jax.value_and_grad(total, argnums=(0, 1))(scored.log_probs, scored.entropy)


@contextlib.contextmanager
def _locate_errors(loss: PolicyLoss) -> Iterator[None]:
    """Convert errors of a loss to InputError with file and line."""
    try:
        yield
    except Exception as error:
        module = sys.modules.get(type(loss).__module__)
        path = getattr(module, "__file__", None) or "?"
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        reason = summarize(error)
        raise InputError(f"{where}: loss={loss} fails: {reason}") from error


def _random(rewards: Float[np.ndarray, "1 K"], seed: int) -> Scored:
    """Make random completions with these rewards and advantage 1."""
    count, longest = rewards.size, max(LENGTHS)
    normal = np.random.default_rng(seed).normal(0, 1, (5, count, longest))
    policy, old, reference, scores, entropy = jnp.asarray(normal, jnp.float32)
    return Scored(
        log_probs=-jnp.abs(policy),
        old_log_probs=-jnp.abs(old),
        reference_log_probs=-jnp.abs(reference),
        token_scores=2 * scores,
        entropy=jnp.abs(entropy),
        completion=jnp.arange(longest)[None] < np.resize(LENGTHS, count)[:, None],
        correct=jnp.asarray(rewards[0] > 0),
        advantage=jnp.ones(count),
    )
