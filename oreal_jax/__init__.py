"""OREAL in JAX: outcome-reward reinforcement learning for mathematical reasoning.

The library's names are imported on first use, so that `import oreal_jax` is quick and
`oreal verify` needs no JAX.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oreal_jax import losses
    from oreal_jax.config import SftConfig, TrainConfig
    from oreal_jax.errors import InputError
    from oreal_jax.loading import LoadedModel, load_model
    from oreal_jax.sampling import Completion, Engine, Request, Sampling
    from oreal_jax.train.loop import train_oreal
    from oreal_jax.train.sft import train_sft
    from oreal_jax.verify import Candidate, Pool, Verdict
    from oreal_jax.verify.completions import verify_completions

__all__ = [
    "Candidate",
    "Completion",
    "Engine",
    "InputError",
    "LoadedModel",
    "Pool",
    "Request",
    "Sampling",
    "SftConfig",
    "TrainConfig",
    "Verdict",
    "load_model",
    "losses",
    "train_oreal",
    "train_sft",
    "verify_completions",
]

# Where a name is defined. Functions cannot have the names of subpackages.
MODULES = {
    "Candidate": "verify",
    "Completion": "sampling",
    "Engine": "sampling",
    "InputError": "errors",
    "LoadedModel": "loading",
    "Pool": "verify",
    "Request": "sampling",
    "Sampling": "sampling",
    "SftConfig": "config",
    "TrainConfig": "config",
    "Verdict": "verify",
    "load_model": "loading",
    "train_oreal": "train.loop",
    "train_sft": "train.sft",
    "verify_completions": "verify.completions",
}

# transformers advises to install torch, which is absent on purpose.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def __getattr__(name: str) -> Any:
    """Import a name of the library."""
    if name == "losses":
        return importlib.import_module("oreal_jax.losses")
    if name not in MODULES:
        raise AttributeError(f"module 'oreal_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"oreal_jax.{MODULES[name]}"), name)
