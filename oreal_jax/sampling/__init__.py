"""Sampling of completions: engine, scheduler, sampler and stop strings."""

from oreal_jax.sampling.completion import Completion, Request, Statistics
from oreal_jax.sampling.engine import Engine
from oreal_jax.sampling.parameters import Sampling
from oreal_jax.sampling.sampler import sampling_distribution
from oreal_jax.sampling.stops import make_stop_table

__all__ = [
    "Completion",
    "Engine",
    "Request",
    "Sampling",
    "Statistics",
    "make_stop_table",
    "sampling_distribution",
]
