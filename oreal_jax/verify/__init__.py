"""Verification of completions: correct, incorrect or undecided. Imports no JAX.

The LLM judge is `oreal_jax.verify.llm_judge`, which worker processes do not import.
"""

from oreal_jax.verify.completions import verify_completions
from oreal_jax.verify.pool import Pool
from oreal_jax.verify.rule import judge
from oreal_jax.verify.verdict import Candidate, Verdict

__all__ = ["Candidate", "Pool", "Verdict", "judge", "verify_completions"]
