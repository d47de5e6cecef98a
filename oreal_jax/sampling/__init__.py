"""The sampling room: an engine that draws completions, and how a token is chosen."""

from oreal_jax.sampling.choice import Sampling
from oreal_jax.sampling.engine import Completion, Engine, Request

__all__ = ["Completion", "Engine", "Request", "Sampling"]
