"""Decoder-only transformers as pure functions of a nested dict of parameters.

The only package that imports Flax. Elsewhere a model is a `ModelConfig` and its
`Params`: `init` or `abstract` makes the tree, `axes` names the axes of every weight,
`hidden` applies the layers, and `log_probs`, `logits` and `token_scores` are the heads.
`decoding` applies the same model to one new token per sequence.
"""

from oreal_jax.model.config import ModelConfig, Rope
from oreal_jax.model.execution import ONE_DEVICE, Execution, Remat, exact_matmuls
from oreal_jax.model.functional import (
    Params,
    abstract,
    axes,
    cast,
    hidden,
    init,
    parameter_count,
    token_reward_params,
)
from oreal_jax.model.head import (
    Distribution,
    full_softmax,
    log_probs,
    logits,
    token_scores,
)

__all__ = [
    "ONE_DEVICE",
    "Distribution",
    "Execution",
    "ModelConfig",
    "Params",
    "Remat",
    "Rope",
    "abstract",
    "axes",
    "cast",
    "exact_matmuls",
    "full_softmax",
    "hidden",
    "init",
    "log_probs",
    "logits",
    "parameter_count",
    "token_reward_params",
    "token_scores",
]
