"""The sampling room: an engine that draws completions, and how a token is chosen."""

from oreal_jax.sampling.choice import sampled_from
from oreal_jax.sampling.completion import Completion, Request, Statistics
from oreal_jax.sampling.engine import Engine
from oreal_jax.sampling.parameters import Sampling
from oreal_jax.sampling.stops import token_table

__all__ = [
    "Completion",
    "Engine",
    "Request",
    "Sampling",
    "Statistics",
    "sampled_from",
    "token_table",
]
