"""Verdicts on answers: correct, incorrect or undecided. Imports no JAX; usable alone.

The language model is in `oreal_jax.verify.llm_judge`, which workers need not load.
"""

from oreal_jax.verify.completions import verify_completions
from oreal_jax.verify.pool import Pool
from oreal_jax.verify.rule import judge
from oreal_jax.verify.verdict import Verdict

__all__ = ["Pool", "Verdict", "judge", "verify_completions"]
