"""Scores of the tokens of a solution, by the token reward model of a run."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np

from oreal_jax import model, sharding
from oreal_jax.checkpoints.run import load_token_reward
from oreal_jax.errors import InputError
from oreal_jax.loading import OpenModel
from oreal_jax.shapes import bucket


class Scorer:
    """The token reward model that was trained along with a policy."""

    def __init__(self, policy: OpenModel):
        """Load the weights.

        Raises:
            InputError: the policy is not from a run with a token reward model.
        """
        path, settings = policy.source.path, policy.source.settings
        if not settings.get("token_reward"):
            message = "not a run with a token reward model"
            raise InputError(f"--token-scores: {path}: {message}")
        config = dataclasses.replace(policy.config, head="score")
        shardings = sharding.param_shardings(config, policy.mesh)
        shapes = model.abstract(config, policy.dtype)
        target = sharding.with_shardings(shapes, shardings)
        self._params = load_token_reward(path, target)
        self._lock = threading.Lock()

        def score(params, tokens):
            ones, positions = jnp.ones_like(tokens), jnp.arange(tokens.shape[1])[None]
            states = model.hidden(config, params, tokens, positions, ones)
            return model.token_scores(params, states)

        self._score = jax.jit(model.exact_matmuls(score, policy.dtype))

    def credits(self, prompt: list[int], completion: list[int]) -> list[float]:
        """Return the predicted probability of a correct answer at each token.

        That is sigmoid(w), of the score of the state that predicts the token.
        """
        tokens = [*prompt, *completion]
        padded = np.zeros((1, bucket(len(tokens), 64)), np.int32)
        padded[0, : len(tokens)] = tokens
        with self._lock:
            scores = np.asarray(self._score(self._params, padded))[0]
        scores = scores[len(prompt) - 1 : len(tokens) - 1].astype(float)
        return (1 / (1 + np.exp(-scores))).tolist()
