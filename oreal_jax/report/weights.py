"""Token weights omega of saved completions, by the loss in a run's config.json."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oreal_jax.losses import Scored, weights
from oreal_jax.losses.scored import PerToken
from oreal_jax.losses.weights import Credit, Weighting

ROWS = 16  # completions of one call
MIN_LENGTH = 64  # padded lengths are this times powers of two: few programs

# Only these names are read from config.json; no code is imported because of it.
MODULE = "oreal_jax.losses.weights."
CREDITS = {
    f"{MODULE}{function.__name__}": function
    for function in (weights.running_credit, weights.token_credit)
}
WEIGHTINGS = {
    f"{MODULE}{kind.__name__}": kind
    for kind in (weights.ThresholdWeights, weights.TopKWeights)
}

# Returns a weight per token from token scores and the outcome of each completion.
TokenWeights = Callable[[Sequence[np.ndarray], Sequence[bool]], list[np.ndarray]]


def read_weights(settings: Mapping[str, Any]) -> TokenWeights | None:
    """Return the token weights of a run's loss; None if it is not one of ours."""
    loss = settings.get("loss")
    if not isinstance(loss, dict):
        return None
    if loss.get("class") == "oreal_jax.losses.oreal.OrealPaper":
        half = weights.ThresholdWeights(threshold=0.5)
        return _batched(weights.token_credit, half, half)
    credit = CREDITS.get(str(loss.get("credit")))
    correct, incorrect = (
        _read_weighting(loss.get(f"weight_{outcome}"))
        for outcome in ("correct", "incorrect")
    )
    is_known = loss.get("class") == "oreal_jax.losses.oreal.Oreal"
    if not is_known or credit is None or correct is None or incorrect is None:
        return None
    return _batched(credit, correct, incorrect)


def _read_weighting(value: Any) -> Weighting | None:
    if value == f"{MODULE}unweighted":
        return weights.unweighted
    if not isinstance(value, dict):
        return None
    kind = WEIGHTINGS.get(str(value.get("class")))
    fields = {name: x for name, x in value.items() if name != "class"}
    try:
        return kind and kind(**{name: float(x) for name, x in fields.items()})
    # A field of another version, or no number.
    except (TypeError, ValueError, OverflowError):
        return None


def _batched(credit: Credit, correct: Weighting, incorrect: Weighting) -> TokenWeights:
    """Return the weights of any number of completions, computed `ROWS` at a time."""

    @jax.jit
    def compute(scored: Scored) -> PerToken:
        return weights.token_weights(scored, credit, correct, incorrect)

    def call(scores: Sequence[np.ndarray], outcomes: Sequence[bool]):
        results: list[np.ndarray] = []
        for start in range(0, len(scores), ROWS):
            part = scores[start : start + ROWS]
            length = MIN_LENGTH
            while length < max(map(len, part)):
                length *= 2
            padded = np.zeros((ROWS, length), np.float32)
            where, is_correct = np.zeros((ROWS, length), bool), np.zeros(ROWS, bool)
            for row, values in enumerate(part):
                padded[row, : len(values)], where[row, : len(values)] = values, True
                is_correct[row] = outcomes[start + row]
            per_token = jnp.asarray(padded)
            scored = Scored(
                log_probs=per_token,
                old_log_probs=per_token,
                reference_log_probs=per_token,
                token_scores=per_token,
                entropy=per_token,
                completion=jnp.asarray(where),
                correct=jnp.asarray(is_correct),
                advantage=jnp.zeros(ROWS),
            )
            omega = np.asarray(compute(scored))
            results += [omega[row, : len(values)] for row, values in enumerate(part)]
        return results

    return call
